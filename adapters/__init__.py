"""Merging inside training loops: one module per framework, each imported by its own name."""
