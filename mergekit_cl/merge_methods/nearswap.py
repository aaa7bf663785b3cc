"""NearSwap (alchemonaut, 2024)."""

from typing import Annotated

import numpy as np

from mergekit_cl.formula import difference, moved
from mergekit_cl.registry import Advice, Between, Values, method


@method(
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    base="required",
    models=(1, 1),
)
def nearswap(
    base: Values, models: list[Values], *, t: Annotated[float, Between(0), Advice("the model that it was made for uses 0.0001")]
) -> Values:
    """Move each entry of the base towards the model by ``t`` at most, and all the way where they are nearer than that.

    Formula:
        share = min(t / max(|model - base|, 1e-6), 1)
        out = base + share * (model - base)

    An entry in which the two are no further apart than ``t`` becomes the model's; further apart, it moves by ``t``. As in
    mergekit, differences below 1e-6 count as 1e-6, which matters only if ``t`` is smaller than that.

    When to use:
        To give a base the flavour of another fine-tune without letting any weight move far. Choose ``t`` from the size of the
        differences of the two (1e-4 for large language models in bfloat16). To go a part of the way everywhere, use `wise_ft`
        or `slerp`.

    Args:
        t: The largest change of an entry.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([1.25, 3, -1])], method="nearswap", base=np.float32([1, 1, 1]), t=0.5)  # near; 1 + 0.5; 1 - 0.5
    array([1.25, 1.5 , 0.5 ], dtype=float32)
    """
    (model,) = models
    change = difference(model, base)
    share = np.minimum(t / np.maximum(np.abs(change), 1e-6), 1)
    return np.where(share == 1, model, moved(base, share * change))
