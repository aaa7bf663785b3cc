"""What went wrong, where, and what to do: every error that mergekit_cl raises on purpose is a `MergeError`."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_SHOWN = 5  # problems spelled out in one message; the rest are counted


class MergeError(ValueError):
    """The base of all errors of this library: the message names the model, the tensor, the fault and the way out."""


class UnknownNameError(MergeError):
    """A method, parameter, backend or dtype of that name does not exist."""


class MismatchError(MergeError):
    """Models that should have the same tensors (names, shapes, devices, ties) do not."""


class NonFiniteError(MergeError):
    """An input holds NaN or Inf, or a result would overflow its dtype. Nothing was written into the caller's tensors."""


class BackendError(MergeError):
    """The requested backend is not installed, or cannot reach the tensors."""


def unknown(kind: str, name: str, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """Build the error for an unknown name: with advice, or the nearest known one, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    advice = advice or (f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known) or 'none'}")
    return UnknownNameError(f'unknown {kind} "{name}": {advice}')


def listing(problems: Sequence[str]) -> str:
    """Join problems into one message, a line each; beyond the first five they are only counted."""
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n".join([*problems[:_SHOWN], *more])
