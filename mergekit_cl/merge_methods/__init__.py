"""The merge methods, a file for each: formula, parameters, documentation. Importing this package registers them all."""

from mergekit_cl.merge_methods import linear, sfa, task_arithmetic, wise_ft

__all__ = ["linear", "sfa", "task_arithmetic", "wise_ft"]
