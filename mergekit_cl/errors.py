"""What went wrong, where, and what to do: every error that mergekit_cl raises on purpose is a `MergeError`."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_SHOWN = 20  # problems spelled out in one message; the rest are counted


class MergeError(ValueError):
    """The base of all errors of this library: the message names the model, the tensor, the fault and the way out."""


class UnknownNameError(MergeError):
    """A method, parameter, backend or dtype of that name does not exist."""


class MismatchError(MergeError):
    """Models that should have the same tensors (names, shapes, devices, ties) do not."""


class NonFiniteError(MergeError):
    """An input holds NaN or Inf, or a result would overflow its dtype. Nothing was written into the caller's tensors."""


class CheckpointError(MergeError):
    """A file of a checkpoint is missing, damaged, of a kind that is not read, or changed; or a result cannot be written."""


class BackendError(MergeError):
    """The requested backend is not installed, or cannot reach the tensors."""


class Faults:
    """Collects the errors of several checks, each in a ``with`` block of its own, to report them at once."""

    def __init__(self) -> None:
        self._errors: list[MergeError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, MergeError):
            self._errors.append(error)
            return True
        return False

    def report(self) -> None:
        """Raise one error with the messages of all, of the kind of the first; nothing if there were none."""
        if self._errors:
            lines = [line for error in self._errors for line in str(error).splitlines()]
            raise type(self._errors[0])("\n".join(dict.fromkeys(lines))) from self._errors[0]


def unknown(kind: str, name: str, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """Build the error for an unknown name: with advice, or the nearest known one, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    advice = advice or (f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known) or 'none'}")
    return UnknownNameError(f'unknown {kind} "{name}": {advice}')


def listing(problems: Sequence[str]) -> str:
    """Join problems into one message, a line each; beyond the first twenty they are only counted."""
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n".join([*problems[:_SHOWN], *more])
