"""mergekit's recipes (YAML, as of mergekit 0.1.5): read, and checked as far as that is possible without opening a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias, cast

import yaml

from mergekit_cl.chat_templates import TEMPLATES
from mergekit_cl.checkpoint.reference import ModelRef
from mergekit_cl.dtypes import type_of
from mergekit_cl.errors import MergeError, listing, unknown
from mergekit_cl.globs import matches
from mergekit_cl.recipe_parameters import REQUIRED, THEIRS, RecipeParameter, Scalar, recipe_parameters
from mergekit_cl.registry import Method, find, methods


@dataclass(frozen=True)
class Condition:
    """The values that a parameter has for tensors whose name ``filter`` matches: one, or a gradient over the layers."""

    filter: str | None
    values: tuple[Scalar, ...]

    def holds(self, name: str) -> bool:
        """Whether it is meant for a tensor of that name."""
        return matches(self.filter, name)

    def at(self, t: float) -> Scalar:
        """Return the value at the position t, 0 to 1: numbers are interpolated, others are steps of equal length."""
        scaled = t * (len(self.values) - 1)
        low = int(scaled)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values):
            return self.values[low]
        numbers = cast(tuple[float, ...], self.values)
        part = scaled - low
        return (1 - part) * numbers[low] + part * numbers[min(low + 1, len(numbers) - 1)] if part else numbers[low]


Settings: TypeAlias = Mapping[str, tuple[Condition, ...]]
"""What one ``parameters:`` says: conditions by the name of the parameter, of which the first that holds counts."""


@dataclass(frozen=True)
class Input:
    """A model that takes part in a slice, with its layers (from, to); ``None`` for all of them."""

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True)
class Slice:
    """Layers of the result that are merged from the same models. The base, where the method has one, is among the inputs."""

    inputs: tuple[Input, ...]
    base: ModelRef | None
    parameters: Settings
    place: str

    @property
    def order(self) -> tuple[Input, ...]:
        """The inputs with the base last."""
        return tuple(sorted(self.inputs, key=lambda source: source.model == self.base))

    @property
    def models(self) -> int:
        """How many of the inputs are not the base."""
        return sum(source.model != self.base for source in self.inputs)


@dataclass(frozen=True)
class Module:
    """A part of a model, such as its text decoder, and the slices that its layers are made of; the name "" means all of it."""

    name: str
    slices: tuple[Slice, ...]
    parameters: Settings
    place: str

    @property
    def sliced(self) -> bool:
        """Whether ranges of layers are given, so that layers are numbered anew."""
        return any(source.layers is not None for piece in self.slices for source in piece.inputs)


@dataclass(frozen=True)
class Options:
    """What only our recipes say, under ``mergekit_cl:``: the seed of random masks, and globs of what is merged."""

    seed: int = 0
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked as far as it can be without opening a model. ``given`` is what the YAML says.

    ``tokenizer`` is the model whose vocabulary the recipe asks for; ``None`` where it asks for none.
    """

    method: str
    modules: tuple[Module, ...]
    base: ModelRef | None
    parameters: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: ModelRef | None
    chat_template: str | None
    scope: str
    options: "Options"
    notes: tuple[str, ...]
    given: Mapping[str, Any] = field(repr=False)

    @property
    def models(self) -> list[ModelRef]:
        """All models that have to be opened, each once, in the order of the recipe; then the base and the tokenizer's."""
        inputs = [source.model for module in self.modules for piece in module.slices for source in piece.inputs]
        return list(dict.fromkeys([*inputs, *filter(None, [self.base, self.tokenizer])]))

    @property
    def donor(self) -> ModelRef:
        """The model whose config and other files the result gets: the base, or the first one."""
        return self.base or self.models[0]


def read_recipe(source: Path | str) -> Recipe:
    """Read a recipe from a file, or from its text, and check it.

    Raises:
        MergeError: Not YAML, or not a recipe; one message lists all problems, each with its place.

    """
    text = source
    if isinstance(source, Path):
        try:
            text = source.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise MergeError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    prefix = f"{source}: " if isinstance(source, Path) else ""
    reader = _Reader()
    try:
        recipe = reader.recipe(_load(cast(str, text), reader.problems))
    except MergeError as error:
        raise MergeError(f"{prefix}{error}") from None
    if recipe is None:
        raise MergeError(listing([f"{prefix}{problem}" for problem in dict.fromkeys(reader.problems)]))
    return recipe


def recipe_text(recipe: Recipe, options: Options | None = None) -> str:
    """Write a recipe as YAML, in the structure that it was given in, such that `read_recipe` reads the same recipe.

    ``options`` replace those of the recipe, where a caller has chosen others.
    """
    chosen = recipe.options if options is None else options
    said = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(chosen).items() if value}
    given = {key: value for key, value in recipe.given.items() if key != "mergekit_cl"}
    whole = {**given, "mergekit_cl": said} if said else given
    return yaml.dump(whole, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        """Write in full what the recipe had anchors for."""
        return True


class _Loader(yaml.SafeLoader):
    """Reads YAML, and notices keys that are given twice."""

    twice: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    self.twice.append(f'line {key.start_mark.line + 1}: the key "{key.value}" is given twice; keep one of them')
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _load(text: str, problems: list[str]) -> object:
    loader = None
    try:
        loader = _Loader(text)
        loader.twice = problems
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise MergeError(f"{where}not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise MergeError(f"not YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    finally:
        if loader is not None:
            loader.dispose()


_TOP = {
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "mergekit_cl",
}  # fmt: skip
_Read: TypeAlias = dict[str, Any]


class _Reader:
    """Reads a recipe and collects what is wrong with it, each problem with its place."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: dict[str, None] = {}
        self.method: Method | None = None
        self.known: dict[str, RecipeParameter] = {}
        self.everywhere = {p.name for theirs in THEIRS.values() for p in theirs}
        self.everywhere |= {p.rstrip("_") for method in methods().values() for p in method.shown}
        self.base: ModelRef | None = None
        self.top: Settings = {}

    def recipe(self, given: object) -> Recipe | None:
        if not isinstance(given, dict):
            is_path = isinstance(given, str) and given.endswith((".yml", ".yaml"))
            what = "is empty" if given is None else f"is just {_shown(given)}"
            hint = "; to read a file, pass a Path" if is_path else ""
            self.problems.append(f"the recipe {what}: it must be a mapping with at least merge_method and models{hint}")
            return None
        top = self.mapping(given, "", _TOP)
        self._method(top)
        self.base = self.model(top["base_model"], "base_model") if "base_model" in top else None
        self.top = self.settings(top.get("parameters"), "parameters", shared=True)
        modules = self._modules(top)
        dtype, out_dtype = (self._dtype(top.get(key), key) for key in ("dtype", "out_dtype"))
        tokenizer = self._tokenizer(top, modules)
        template = self._template(top.get("chat_template"))
        options = self._options(top.get("mergekit_cl"))
        if self.problems or self.method is None:
            return None
        scope = str(self.top["scope"][0].values[0]) if "scope" in self.top else "tensor"
        return Recipe(
            self.method.name, tuple(modules), self.base, self.top, dtype, out_dtype, tokenizer, template, scope,
            options, tuple(self.notes), given,
        )  # fmt: skip

    def mapping(self, value: object, place: str, keys: set[str], what: str = "a mapping") -> _Read:
        """Check that a value is a mapping with these keys; keys whose value is null count as absent."""
        if not isinstance(value, dict):
            self.problems.append(f"{at(place)}must be {what} of {', '.join(sorted(keys))}, not {_shown(value)}")
            return {}
        for key in value:
            if key not in keys:
                advice = f'"{key}" is a parameter: put it under parameters:' if key in self.everywhere else ""
                self.problems.append(f"{at(place)}{unknown('key', str(key), keys, advice)}")
        return {key: item for key, item in value.items() if item is not None and key in keys}

    def items(self, value: object, place: str, of: str) -> list[tuple[str, Any]]:
        """Check that a value is a list with something in it, and return its items with their places."""
        if not isinstance(value, list) or not value:
            self.problems.append(f"{at(place)}must be a list of {of}, not {_shown(value)}")
            return []
        return [(f"{place}[{index}]", item) for index, item in enumerate(value)]

    def model(self, value: object, place: str) -> ModelRef | None:
        """Read the name of a model, in its short form or as a mapping."""
        if isinstance(value, str) and value.strip():
            try:
                return ModelRef.parse(value)
            except MergeError as error:
                self.problems.append(f"{at(place)}{error}")
                return None
        if not isinstance(value, dict):
            self.problems.append(f"{at(place)}must be the path or the hub id of a model, not {_shown(value)}")
            return None
        read = self.mapping(value, place, {"model", "lora", "override_architecture"})
        if "override_architecture" in read:
            self.note(f"{place}.override_architecture: has no meaning here: tensors are matched by their names")
        path, lora = (self._path(read.get(key), f"{place}.{key}", needed=key == "model") for key in ("model", "lora"))
        return ModelRef(path[0], path[1], *(lora or (None, None))) if path else None

    def _path(self, value: object, place: str, needed: bool) -> tuple[str, str | None] | None:
        if isinstance(value, str) and value:
            path, _, revision = value.partition("@")
            return path, revision or None
        if isinstance(value, dict):
            read = self.mapping(value, place, {"path", "revision"})
            where, which = read.get("path"), read.get("revision")
            if isinstance(where, str) and where and isinstance(which, str | None):
                return where, which
        if needed or value is not None:
            self.problems.append(f"{at(place)}must be a path, or {{path: ..., revision: ...}} with text, not {_shown(value)}")
        return None

    def note(self, text: str) -> None:
        """Remember what the user should know."""
        self.notes[text] = None

    def _method(self, top: _Read) -> None:
        name = top.get("merge_method")
        if name is None:
            self.problems.append("merge_method is missing: name a method, such as merge_method: linear")
        elif not isinstance(name, str):
            self.problems.append(f"merge_method: must be the name of a method, not {_shown(name)}")
        else:
            try:
                found = find(name)
                if not found.companions:
                    self.method, self.known = found, recipe_parameters(found)
                else:
                    needs = ", ".join(found.companions)
                    self.problems.append(
                        f"merge_method: {name} needs models as parameters ({needs}), which recipes do not have; use "
                        "mergekit-cl merge"
                    )
            except MergeError as error:
                self.problems.append(f"merge_method: {error}")

    def _dtype(self, value: object, place: str) -> str | None:
        if value is None:
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else ""
        if name not in type_of:
            self.problems.append(f"{place}: must be one of {', '.join(type_of)}, not {_shown(value)}")
        elif place == "dtype" and name != "float32":
            self.note(f"dtype: {name}: results have this dtype; they are computed in float32 or better, and rounded once")
        return name

    def _tokenizer(self, top: _Read, modules: Sequence[Module]) -> ModelRef | None:
        place, source = "tokenizer_source", top.get("tokenizer_source")
        if "tokenizer" in top:
            if source is not None:
                self.problems.append("tokenizer and tokenizer_source are both given; keep one of them")
            place = "tokenizer.source"
            read = self.mapping(top["tokenizer"], "tokenizer", {"source", "tokens", "pad_to_multiple_of"})
            for key in ("tokens", "pad_to_multiple_of"):
                if read.get(key):
                    self.problems.append(
                        f"tokenizer.{key}: is not supported, because it changes the rows of embeddings; make the vocabularies "
                        "equal first, or leave it out"
                    )
            source = read.get("source", "union")
        if source == "union":
            self.problems.append(
                f"{place}: union is not supported, because it reorders and adds rows of embeddings; use base, or the name of a "
                "model (all models must have the same vocabulary then)"
            )
            return None
        if source == "base":
            inputs = [source.model for module in modules for piece in module.slices for source in piece.inputs]
            return self.base or next(iter(inputs), None)
        return None if source is None else self.model(source, place)

    def _template(self, value: object) -> str | None:
        if value is None or value == "":
            return None
        if isinstance(value, str) and ("{" in value or value == "auto" or value in TEMPLATES):
            return value
        known = ["auto", *TEMPLATES]
        name = value if isinstance(value, str) and len(value) < 40 else _shown(value)
        self.problems.append(f"chat_template: {unknown('template', name, known)} (Jinja text is recognised by its braces)")
        return None

    def _options(self, value: object) -> Options:
        if value is None:
            return Options()
        read = self.mapping(value, "mergekit_cl", {"seed", "only", "exclude"})
        seed = read.pop("seed", 0)
        if type(seed) is not int:
            self.problems.append(f"mergekit_cl.seed: must be a whole number, not {_shown(seed)}")
        globs = {key: [item] if isinstance(item, str) else item for key, item in read.items()}
        for key, item in globs.items():
            if not isinstance(item, list) or not all(isinstance(glob, str) and glob for glob in item):
                self.problems.append(f"mergekit_cl.{key}: must be a glob on names of tensors, or a list, not {_shown(item)}")
                return Options()
        return Options(seed, *(tuple(globs.get(key, ())) for key in ("only", "exclude")))

    # What is merged

    def _modules(self, top: _Read) -> list[Module]:
        kinds = [key for key in ("models", "slices", "modules") if top.get(key)]
        if len(kinds) != 1:
            found = f"found {' and '.join(kinds)}" if kinds else "found none of them"
            self.problems.append(f"exactly one of models, slices and modules must be given; {found}")
            return []
        if kinds != ["modules"]:
            return [self._module("", top, "", {})]
        if not isinstance(top["modules"], dict):
            self.problems.append(f"modules: must be a mapping from names of modules, not {_shown(top['modules'])}")
            return []
        modules = []
        for name, value in top["modules"].items():
            place = f"modules.{name}"
            read = self.mapping(value, place, {"models", "slices", "parameters"})
            if ("models" in read) == ("slices" in read):
                self.problems.append(f"{place}: must have either models or slices")
                continue
            settings = self.settings(read.get("parameters"), f"{place}.parameters", shared=True)
            modules.append(self._module(str(name), read, f"{place}.", settings))
        return modules

    def _module(self, name: str, read: _Read, prefix: str, settings: Settings) -> Module:
        if read.get("models"):
            slices = [self._models(read["models"], f"{prefix}models")]
        else:
            slices = [
                self._slice(item, place)
                for place, item in self.items(read.get("slices"), f"{prefix}slices", "mappings with sources")
            ]
        for piece in slices:
            self._check_slice(piece, settings)
        return Module(name, tuple(slices), settings, prefix.rstrip("."))

    def _models(self, value: object, place: str) -> Slice:
        inputs = []
        for where, item in self.items(value, place, "mappings with a model"):
            read = self.mapping(item, where, {"model", "parameters"})
            settings = self.settings(read.get("parameters"), f"{where}.parameters", shared=False)
            model = self._needed_model(read, where, item)
            if model is not None:
                inputs.append(Input(model, None, settings))
        if self.base is not None and self.base not in [source.model for source in inputs]:
            if self.method is not None and self.method.base == "unused" and self.method.name not in THEIRS:
                self.problems.append(f"base_model: {self.method.name} has no use for one; list it under models, in its place")
            inputs.append(Input(self.base, None, {}))
        return Slice(tuple(inputs), self._base_of(self.base), {}, place)

    def _slice(self, value: object, place: str) -> Slice:
        read = self.mapping(value, place, {"sources", "base_model", "residual_weight", "parameters"})
        if "residual_weight" in read:
            self.note(f"{place}.residual_weight: has no meaning, as in mergekit")
        base = self.model(read["base_model"], f"{place}.base_model") if "base_model" in read else self.base
        inputs = []
        sources = self.items(read.get("sources"), f"{place}.sources", "mappings with model and layer_range") if read else []
        for where, item in sources:
            source = self.mapping(item, where, {"model", "layer_range", "parameters"})
            settings = self.settings(source.get("parameters"), f"{where}.parameters", shared=False)
            model = self._needed_model(source, where, item)
            layers = self._layer_range(source.get("layer_range"), f"{where}.layer_range") if source else None
            if model is not None and layers is not None:
                inputs.append(Input(model, layers, settings))
        lengths = {stop - start for start, stop in (source.layers or (0, 0) for source in inputs)}
        if len(lengths) > 1:
            self.problems.append(
                f"{place}.sources: have {' and '.join(map(str, sorted(lengths)))} layers; all sources of a slice must have as "
                "many (the end of a layer_range does not count: [0, 16] has 16)"
            )
        settings = self.settings(read.get("parameters"), f"{place}.parameters", shared=True)
        return Slice(tuple(inputs), self._base_of(base), settings, place)

    def _needed_model(self, read: _Read, place: str, item: object) -> ModelRef | None:
        if "model" in read:
            return self.model(read["model"], f"{place}.model")
        if isinstance(item, dict):
            self.problems.append(f"{place}: model is missing")
        return None

    def _layer_range(self, value: object, place: str) -> tuple[int, int] | None:
        whole = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
        if not whole or not 0 <= cast(list[int], value)[0] <= cast(list[int], value)[1]:
            wanted = "must be [first, end] with 0 <= first <= end, where end does not count"
            self.problems.append(f"{place}: {wanted}" + ("" if value is None else f", not {_shown(value)}"))
            return None
        first, end = cast(list[int], value)
        return first, end

    def _base_of(self, base: ModelRef | None) -> ModelRef | None:
        """Return the base where the method has a use for it; without one it is a model as any other."""
        return None if self.method is not None and self.method.base == "unused" else base

    def _check_slice(self, piece: Slice, module: Settings) -> None:
        """Check what a method needs: how many models, a base, parameters without a default."""
        method, place = self.method, piece.place
        if method is None or not piece.inputs:
            return
        times = Counter(source.model for source in piece.inputs)
        self.problems += [f"{place}: {model} is listed {n} times; list it once" for model, n in times.items() if n > 1]
        if method.base == "required" and piece.base is None:
            self.problems.append(f"base_model: is missing; {method.name} needs the model that the others were fine-tuned from")
            return
        has_base = piece.base is not None
        if has_base and piece.base not in times:
            self.problems.append(f"{place}: the base {piece.base} is not among the sources; list it too, with its layer_range")
            return
        least, most = (2 - has_base,) * 2 if method.name == "slerp" else (method.least, method.most)
        if not least <= piece.models <= (most or piece.models):
            wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            besides = f" besides the base {piece.base}" if has_base else ""
            extra = " (base_model counts as one of them)" if method.base == "unused" and self.base in times else ""
            self.problems.append(f"{place}: {method.name} merges {wanted} model{'s' * (wanted != '1')}{besides}, but "
                                 f"{piece.models} {'is' if piece.models == 1 else 'are'} listed{extra}")  # fmt: skip
        shared = [piece.parameters, module, self.top]
        for parameter in self.known.values():
            if parameter.default is not REQUIRED:
                continue
            if not parameter.per_model and not any(parameter.name in settings for settings in shared):
                self.problems.append(f"{place}: {method.name} needs {parameter.name}; give it under parameters:")
            for source in piece.inputs if parameter.per_model else ():
                listed = any(parameter.name in settings for settings in (source.parameters, *shared))
                if source.model != piece.base and not listed:
                    why = " (as base_model, it takes part like the other models)" if source.model == self.base else ""
                    self.problems.append(f"{place}: {method.name} needs {parameter.name} for {source.model}{why}; "
                                         "give it under its parameters:, or under those of the recipe")  # fmt: skip

    # Parameters

    def settings(self, value: object, place: str, shared: bool) -> Settings:
        """Read ``parameters:``; ``shared`` where they are not those of one model."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{place}: must be a mapping from names of parameters to values, not {_shown(value)}")
            return {}
        settings = {}
        for key, given in value.items():
            name, where = str(key).rstrip("_"), f"{place}.{key}"
            if self.method is None:
                continue
            if name not in self.everywhere:
                near = get_close_matches(name, sorted(self.known)) or get_close_matches(name, sorted(self.everywhere))
                self.problems.append(f"{place}: {unknown('parameter', str(key), near or self.known)}")
                continue
            parameter = self.known.get(name)
            if parameter is None:
                self.note(f"{where}: {self.method.name} has no such parameter; it is ignored, as in mergekit")
                continue
            conditions = self._conditions(parameter, given, where)
            if parameter.ours is None and not (name == "normalize" and "combine" in self.known):
                if name == "int8_mask" or self.method.name == "task_arithmetic":  # mergekit's takes density and rescale
                    self.note(f"{where}: changes no result, as in mergekit")
                else:
                    self.problems.append(f"{where}: mergekit's {name} is not there for {self.method.name}; leave it out")
            elif not shared and not parameter.per_model:
                self.note(f"{where}: is ignored, as in mergekit: models have no {name} of their own; give it one level up")
            elif name == "scope" and (place != "parameters" or not isinstance(given, str)):
                self.problems.append(f"{where}: scope is one for the whole recipe; give it under the recipe's own parameters")
            elif conditions:
                settings[name] = conditions
        return settings

    def _conditions(self, parameter: RecipeParameter, given: object, place: str) -> tuple[Condition, ...]:
        if isinstance(given, dict):
            given = [given]
        elif not isinstance(given, list) or not any(isinstance(item, dict) for item in given):
            return (Condition(None, self._values(parameter, given, place)),)
        conditions = []
        for where, item in self.items(given, place, "conditions"):
            read = self.mapping(item, where, {"filter", "value"}, "a condition")
            pattern = read.get("filter")
            if pattern is not None and not isinstance(pattern, str):
                self.problems.append(f"{where}.filter: must be a part of the names of tensors, not {_shown(pattern)}")
            elif isinstance(item, dict):
                conditions.append(Condition(pattern, self._values(parameter, item.get("value"), f"{where}.value")))
        return tuple(conditions)

    def _values(self, parameter: RecipeParameter, given: object, place: str) -> tuple[Scalar, ...]:
        items = self.items(given, place, "numbers") if isinstance(given, list) else [(place, given)]
        values: list[Scalar] = []
        for where, item in items:
            try:
                value = parameter.convert(item)
                ours = parameter.ours
                clipped = parameter.name in ("density", "select_topk")
                if clipped and isinstance(value, float) and not 0 <= value <= 1 and isfinite(value):
                    self.note(f"{where}: a {parameter.name} of {value:g} is taken as {float(value > 1):g}")
                    value = float(value > 1)
                if ours is not None and (not ours.choices or isinstance(value, str)) and ours.type in (int, float, str):
                    value = ours.check(value, f"{where}:")
                values.append(value)
            except MergeError as error:
                self.problems.append(str(error))
            except ValueError as error:
                self.problems.append(f"{where}: {error}, not {_shown(item)}")
        return tuple(values)


def at(place: str) -> str:
    """Begin a message with a place in a recipe, if there is one."""
    return f"{place}: " if place else ""


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
