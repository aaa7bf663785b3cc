"""One model, copied or scaled (mergekit): what stacks layers of several models into one."""

from mergekit_cl.registry import method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md", models=(1, 1))
def passthrough(scope: Scope, *, scale: float = 1.0) -> Sum:
    """Return the one model, times ``scale``.

    Formula:
        out = scale * x

    With scale 1 it is returned bit for bit.

    When to use:
        In recipes, to stack layers of several models, each of which is taken from one; or to scale some tensors of a model.
        Scaling what a model learned, and not the model, is `wise_ft`.

    Args:
        scale: What every entry is multiplied with.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([1, -2])], method="passthrough", scale=0.5)
    array([ 0.5, -1. ], dtype=float32)
    """
    return Sum([scale])
