"""Which tensors are meant, by their names: ``only`` and ``exclude`` of a merge, and the filters of parameters."""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
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
        f'{option}: "{glob}" matches no tensor; {names_near(glob, names)}'
        for option, given in (("only", only), ("exclude", exclude))
        for glob in globs_of(option, given)
        if not any(fnmatchcase(name, glob) for name in names)
    ]
    if problems:
        raise MergeError(listing(problems))


def matches(pattern: str | None, name: str) -> bool:
    """Whether the filter of a parameter matches a tensor's name; capitals count.

    With ``*``, ``?`` or ``[`` it is a glob on the whole name (``*`` matches dots too), else a part of the name, as in
    mergekit's recipes. ``None`` matches any name.

    >>> [matches(pattern, "h.0.mlp.weight") for pattern in ("mlp", "*.mlp.*", "mlp.*", None)]
    [True, True, False, True]
    """
    if pattern is None or pattern == "*":
        return True
    return fnmatchcase(name, pattern) if _MAGIC.search(pattern) else pattern in name


_MAGIC = re.compile(r"[*?[]")


def matches_any(pattern: str | None) -> bool:
    """Whether a filter is meant for all tensors."""
    return pattern is None or pattern == "*"


def names_near(pattern: str, names: Sequence[str]) -> str:
    """Advise on a pattern that matches nothing: name tensors with a part that is spelled nearly as its own, or the first ones.

    >>> names_near("*.mpl.*", ["h.0.attn.weight", "h.0.mlp.weight"])
    'names are such as h.0.mlp.weight'
    """
    if not any(names):
        return "there is none with a name"
    wider = f"*{pattern.strip('*')}*"
    if any(fnmatchcase(name, wider) for name in names):
        return f'a glob has to match the whole name, as "{wider}" would'
    parts = {part for name in names for part in name.split(".")}
    words = [word for word in re.split(r"[^\w-]+", pattern) if word and word not in parts]
    near = {part for word in words for part in get_close_matches(word, parts, n=1)}
    found = [name for name in names if near & set(name.split("."))]
    return f"names are such as {', '.join((found or list(names))[:3])}"
