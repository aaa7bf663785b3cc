"""mergekit_cl: merging the weights of models, trained or still training.

``merge`` merges models of any framework; ``method`` registers a merge method of your own; ``methods()`` lists them all.
`mergekit_cl.adapters` brings merging into training loops.
"""

from mergekit_cl import merge_methods as _registers_the_built_in_methods  # noqa: F401
from mergekit_cl.api import merge
from mergekit_cl.errors import BackendError, CheckpointError, MergeError, MismatchError, NonFiniteError, UnknownNameError
from mergekit_cl.formula import difference, moved, ranks
from mergekit_cl.registry import Advice, Between, Fraction, Models, PerModel, Values, each, method, methods
from mergekit_cl.steps import (
    AtLeast,
    AtRandom,
    Consensus,
    Cut,
    Elementwise,
    Gram,
    KeptMagnitude,
    KthMagnitude,
    KthOf,
    PerMatrix,
    PerRow,
    Scope,
    Steps,
    Sum,
    SumOf,
    SumOfSlices,
)

__all__ = [
    "Advice",
    "AtLeast",
    "AtRandom",
    "BackendError",
    "Between",
    "CheckpointError",
    "Consensus",
    "Cut",
    "Elementwise",
    "Fraction",
    "Gram",
    "KeptMagnitude",
    "KthMagnitude",
    "KthOf",
    "MergeError",
    "MismatchError",
    "Models",
    "NonFiniteError",
    "PerMatrix",
    "PerModel",
    "PerRow",
    "Scope",
    "Steps",
    "Sum",
    "SumOf",
    "SumOfSlices",
    "UnknownNameError",
    "Values",
    "difference",
    "each",
    "merge",
    "method",
    "methods",
    "moved",
    "ranks",
]
__version__ = "0.1.0"
