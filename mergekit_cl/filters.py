"""The parameters of a merge, which may differ from tensor to tensor: lists of ``{"filter": ..., "value": ...}``.

The first entry whose filter matches the name of a tensor counts; what a filter matches says `mergekit_cl.globs.matches`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from mergekit_cl.errors import Faults, MergeError, listing
from mergekit_cl.globs import matches, matches_any, names_near
from mergekit_cl.models import tensor
from mergekit_cl.registry import Method, Parameter

_NONE: Final = -1


class Entry(NamedTuple):
    """A value, checked, and the filter of the tensors that have it."""

    filter: str
    value: Any


class Parameters:
    """The parameters of a call.

    Args:
        method: The method that they are for.
        given: What the user gave, without ``scope``. A value is what `Method.resolve` takes; or a list of mappings with the
            keys ``filter`` and ``value``, or one of them; or, of a per-model parameter, a list with a value, or a list of such
            mappings, for each model. Tensors that no filter matches have the parameter's default, if it has one.
        models: How many models there are.
        merged: The names of the tensors that the method is called for; ``None`` if they are not known yet.
        names: Other tensors that a filter may match.

    Raises:
        MergeError: A parameter is missing, unknown or out of range, an entry is none, a filter matches no tensor, or a tensor
            has no value. One message lists all problems.

    """

    def __init__(
        self,
        method: Method,
        given: Mapping[str, object],
        models: int,
        merged: Sequence[str] | None = None,
        names: Iterable[str] = (),
    ) -> None:
        self.method = method
        known = {name.rstrip("_"): parameter for name, parameter in method.parameters.items()}
        own = {
            parameter.name: (parameter, value)
            for name, value in given.items()
            if (parameter := known.get(name.rstrip("_"))) is not None and _has_filters(parameter, value)
        }
        self.plain: dict[str, Any] = {}
        """The parameters that are the same for all tensors, by name."""
        self.columns: dict[str, list[list[Entry]]] = {}
        """The others: a list of entries for each model, or, where the parameter is not per model, one list."""
        self._chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._picked: dict[str, tuple[int, ...]] = {}
        faults = Faults()
        with faults:
            self.plain = method.resolve(given, models, without=own)
        for parameter, value in own.values():
            with faults:
                self.columns[parameter.name] = _columns(parameter, value, models, f"{method.name}:", faults)
        if merged is not None:
            with faults:
                self._check(merged, dict.fromkeys([*merged, *names]))
        faults.report()

    def at(self, name: str) -> dict[str, Any]:
        """Return what the method is called with for a tensor; for equal values that is the same object."""
        if not self.columns:
            return self.plain
        picks = iter(self._picks(name))
        values = []
        for parameter, columns in self.columns.items():
            each = tuple(column[next(picks)].value for column in columns)
            values.append(each if self.method.parameters[parameter].per_model else each[0])
        key = tuple(values)
        if key not in self._chosen:
            chosen = {**self.plain, **dict(zip(self.columns, values, strict=True))}
            self._chosen[key] = {parameter: chosen[parameter] for parameter in self.method.parameters}
        return self._chosen[key]

    def _picks(self, name: str) -> tuple[int, ...]:
        """Return for each column the number of the first entry whose filter matches a tensor's name."""
        if name not in self._picked:
            self._picked[name] = tuple(
                next((number for number, entry in enumerate(column) if matches(entry.filter, name)), _NONE)
                for columns in self.columns.values()
                for column in columns
            )
        return self._picked[name]

    def _check(self, merged: Sequence[str], names: Iterable[str]) -> None:
        """Check that every filter matches one of the names, and that every merged tensor has a value."""
        problems: dict[str, None] = {}
        place = 0
        for parameter, columns in self.columns.items():
            where = f"{self.method.name}: {parameter}"
            for pattern in dict.fromkeys(entry.filter for column in columns for entry in column):
                if not matches_any(pattern) and not any(matches(pattern, name) for name in names):
                    problems[f'{where}: the filter "{pattern}" matches no tensor; {names_near(pattern, list(names))}'] = None
            alike = all([entry.filter for entry in column] == [entry.filter for entry in columns[0]] for column in columns)
            for model in range(len(columns)):
                lacking = [tensor(name) for name in merged if self._picks(name)[place + model] == _NONE]
                if lacking:
                    which = listing(lacking).replace("\n", ", ")
                    of = "" if alike else f" of model {model}"
                    text = f'{where}{of}: no filter matches {which}; add {{"filter": "*", "value": ...}} as the last entry'
                    problems[text] = None
            place += len(columns)
        if problems:
            raise MergeError(listing(list(problems)))

    def check_equal(self, names: Sequence[str]) -> None:
        """Check that all tensors have the same values, as a method that surveys the whole model needs."""
        for name in names:
            one, other = self.at(names[0]), self.at(name)
            problems = [
                f"{self.method.name}: {parameter} is {one[parameter]} for {tensor(names[0])}, but {other[parameter]} for "
                f'{tensor(name)}; scope="model" needs one value for all tensors: leave the filters away, or the scope'
                for parameter in self.columns
                if one[parameter] != other[parameter]
            ]
            if problems:
                raise MergeError(listing(problems))

    @property
    def given(self) -> dict[str, Any]:
        """The parameters, defaults included, as they can be given again: filters as lists of plain mappings."""
        said = dict(self.plain)
        for name, columns in self.columns.items():
            values = [_as_given(column) for column in columns]
            said[name] = values if self.method.parameters[name].per_model else values[0]
        return {name: said[name] for name in self.method.parameters}


def _as_given(column: Sequence[Entry]) -> Any:
    if matches_any(column[0].filter):
        return column[0].value
    return [{"filter": pattern, "value": value} for pattern, value in column]


def _has_filters(parameter: Parameter, value: object) -> bool:
    """Whether a value holds entries with filters, on either level."""
    if isinstance(value, Mapping):
        return True
    items = value if isinstance(value, list | tuple) else ()
    inner = [each for item in items if parameter.per_model and isinstance(item, list | tuple) for each in item]
    return any(isinstance(item, Mapping) for item in (*items, *inner))


def _columns(parameter: Parameter, value: Any, models: int, where: str, faults: Faults) -> list[list[Entry]]:
    """Read a value that has filters: the entries of each model, or one list. Values that are wrong become faults."""
    default = None if parameter.required else parameter.resolve(parameter.default, models, where)
    place = f"{where} {parameter.name}"
    items = [value] if isinstance(value, Mapping) else list(value)
    if any(isinstance(item, Mapping) for item in items):
        entries = _entries(parameter, items, models, place, where, faults)
        if not parameter.per_model:
            return [_complete(entries, parameter, default)]
        return [
            _complete([Entry(f, values[k]) for f, values in entries], parameter, default and default[k]) for k in range(models)
        ]
    if len(items) != models:
        raise MergeError(
            f"{place}: {len(items)} items for {models} models; give one list of filters for all of them, or an item "
            "for each, in their order"
        )
    single, columns = replace(parameter, per_model=False), []
    for model, item in enumerate(items):
        entries = [Entry("*", None)]
        if isinstance(item, list | tuple):
            entries = _entries(single, item, models, f"{place}[{model}]", f"{where} model {model},", faults)
        else:
            with faults:
                entries = [Entry("*", single.resolve(item, models, f"{where} model {model}:"))]
        columns.append(_complete(entries, parameter, default and default[model]))
    return columns


def _entries(parameter: Parameter, items: Sequence[Any], models: int, place: str, where: str, faults: Faults) -> list[Entry]:
    """Read mappings with the keys filter and value."""
    wanted = 'must be {"filter": ..., "value": ...}'
    problems = [] if items else [f"{place}: {wanted}, or a list of these, not an empty one"]
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            problems.append(
                f'{place}[{number}]={item!r}: {wanted} as the others; for all other tensors add {{"filter": "*", "value": ...}}'
                ", and put the filters of one model into a list of their own"
            )
        elif "value" not in item or any(key not in ("filter", "value") for key in item):
            problems.append(f"{place}[{number}]={dict(item)!r}: {wanted}, with these keys and no others")
        elif not isinstance(item.get("filter"), str | None):
            problems.append(
                f"{place}[{number}]: filter={item['filter']!r}: must be a glob on names of tensors, or a part of them"
            )
    if problems:
        raise MergeError(listing(problems))
    entries = []
    for item in items:
        pattern = "*" if item.get("filter") is None else item["filter"]
        value = (None,) * models if parameter.per_model else None
        with faults:
            value = parameter.resolve(item["value"], models, f'{where} filter "{pattern}":')
        entries.append(Entry(pattern, value))
    return entries


def _complete(entries: list[Entry], parameter: Parameter, default: Any) -> list[Entry]:
    """Let the default follow, where there is one and some tensor could need it."""
    if parameter.required or any(matches_any(entry.filter) for entry in entries):
        return entries
    return [*entries, Entry("*", default)]
