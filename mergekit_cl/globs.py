"""Which tensors are merged, and which are copied: ``only`` and ``exclude``, globs on their names."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias, cast

from mergekit_cl.errors import MergeError, listing

Globs: TypeAlias = str | Iterable[str] | None
"""One glob, or several; ``*`` matches dots too."""


def globs_of(option: str, globs: Globs) -> list[str]:
    """List the globs that an option was given."""
    found: list[object] = [globs] if isinstance(globs, str) or not isinstance(globs, Iterable | None) else list(globs or ())
    if not all(isinstance(glob, str) and glob for glob in found):
        raise MergeError(f"{option}={globs!r}: must be a glob on the names of tensors, or a list of them")
    return cast(list[str], found)


def chosen(only: Globs, exclude: Globs) -> Callable[[str], bool]:
    """Make the rule that tells of a name whether its tensor is merged.

    >>> [name for name in ("a.weight", "a.bias", "b.bias") if chosen("a.*", ["*.bias"])(name)]
    ['a.weight']
    """
    wanted, unwanted = globs_of("only", only), globs_of("exclude", exclude)

    def rule(name: str) -> bool:
        within = not wanted or any(fnmatchcase(name, glob) for glob in wanted)
        return within and not any(fnmatchcase(name, glob) for glob in unwanted)

    return rule


def check_globs(only: Globs, exclude: Globs, names: Iterable[str]) -> None:
    """Refuse a glob that matches no name: it would be a slip that nobody notices."""
    names = list(names)
    problems = [
        f'{option}: "{glob}" matches no tensor; names are such as {", ".join(names[:3])}'
        for option, given in (("only", only), ("exclude", exclude))
        for glob in globs_of(option, given)
        if not any(fnmatchcase(name, glob) for name in names)
    ]
    if problems:
        raise MergeError(listing(problems))
