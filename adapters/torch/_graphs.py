"""CUDA graphs that users capture of their own steps."""

import torch

from mergekit_cl.errors import MergeError


def capturing() -> bool:
    """Whether the present stream captures a CUDA graph."""
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def refuse_in_capture(owner: str) -> None:
    """Refuse what a replay would leave out: counting on the host, and looking at what was found.

    Raises:
        MergeError: The present stream captures a CUDA graph.

    """
    if capturing():
        raise MergeError(
            f"{owner}: a CUDA graph is being captured, whose replays would count no steps and raise no errors; leave "
            f"{owner} out of it (detach() it, if it is attached), and call step() after each replay"
        )
