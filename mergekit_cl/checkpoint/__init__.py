"""Checkpoints on disk: safetensors files and Hugging Face folders, read a window at a time, written so that nothing is lost."""
