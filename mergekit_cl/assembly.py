"""Recipes bound to models: which tensors of which models become which tensor of the result, with which parameters.

Nothing is known about architectures but names: what is numbered (``model.layers.7.``) is a layer, the rest comes before the
layers, or after.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from mergekit_cl.chat_templates import TEMPLATES
from mergekit_cl.checkpoint.reference import ModelRef
from mergekit_cl.checkpoint.stored import Source
from mergekit_cl.dtypes import EXACT
from mergekit_cl.errors import MergeError, MismatchError, listing
from mergekit_cl.globs import matches
from mergekit_cl.recipe import Module, Recipe, Settings, Slice, at
from mergekit_cl.recipe_parameters import OURS, REQUIRED, RecipeParameter, our_parameters, recipe_parameters
from mergekit_cl.registry import find


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=_Shaped)


class Opened(Protocol):
    """An opened model, such as a `mergekit_cl.checkpoint.reference.Opened`."""

    @property
    def label(self) -> str:
        """What to call it in messages."""

    @property
    def tensors(self) -> Mapping[str, Source]:
        """Its tensors by name."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """Its config.json."""

    @property
    def checkpoint(self) -> "_Files":
        """What knows its other files; the tokenizer's are looked at."""


class _Files(Protocol):
    def companions(self) -> Mapping[str, Path]: ...


@dataclass(frozen=True, eq=False)
class Part:
    """Tensors that are merged from the same models with the same parameters.

    ``labels`` name the models, and then the base if there is one; ``tensors`` has by the name of the result a source of each,
    in their order. ``parameters`` are those of our method, as `Method.resolve` takes them, with a list for each model's own.
    """

    labels: tuple[str, ...]
    models: int
    parameters: Mapping[str, Any]
    tensors: Mapping[str, tuple[Source, ...]]


@dataclass(frozen=True, eq=False)
class Assembly:
    """A recipe bound to models: all that there is to merge, and what else becomes of the result.

    ``copied`` are the tensors of the result that are not merged; ``order`` has the names of all tensors. ``donor`` is the model
    whose config and other files the result gets, and ``config_changes`` what changes in that config, by dotted path.
    ``tokenizer`` is the model whose tokenizer files replace the donor's, ``chat_template`` Jinja text. ``scope`` is that of
    `mergekit_cl.merge`.
    """

    method: str
    parts: tuple[Part, ...]
    copied: Mapping[str, Source]
    order: tuple[str, ...]
    out_dtype: str | None
    donor: ModelRef
    config_changes: Mapping[str, Any]
    tokenizer: ModelRef | None
    chat_template: str | None
    scope: str
    notes: tuple[str, ...]


def assemble(recipe: Recipe, opened: Mapping[ModelRef, Opened], names: Callable[[str], bool] | None = None) -> Assembly:
    """Bind a recipe to its models.

    Args:
        recipe: The recipe.
        opened: All of `Recipe.models`, opened.
        names: Tells by the name of a tensor of the result whether it is merged; others are copied from the base, or the first
            model of their slice. By default all are merged.

    Raises:
        MismatchError: Tensors are missing or do not fit together; one message lists all problems.
        MergeError: A layer, module or parameter is not there.

    """
    return _Assembler(recipe, opened, names or (lambda _: True)).assembly()


def tokenizer_problems(source: Opened, models: Iterable[Opened]) -> list[str]:
    """List the models whose vocabulary is not that of the model that the tokenizer comes from.

    Their embeddings would have to be reordered. A model without a vocabulary file that we can read is not listed.
    """
    problems: list[str] = []
    wanted = _vocabulary(source, problems)
    for model in models:
        found = wanted if model is source else _vocabulary(model, problems)
        if wanted is not None and found is not None and found != wanted:
            problems.append(
                f"tokenizer: the vocabulary of {model.label} ({len(found)} tokens) is not that of {source.label} "
                f"({len(wanted)}); reordering embeddings is not supported: merge models of one vocabulary, or leave "
                "tokenizer_source out to merge the rows as they are"
            )
    return problems


_LAYER = re.compile(r"(?:^|\.)(0|[1-9]\d{0,5})\.")
_FIRST = re.compile(
    r"(?<!un)embed(?!_out)|(^|\.)(wte|wpe|shared|emb|ln_pre|layernorm_pre|pre_layrnorm|pre_layernorm|conv\d?|patch_conv"
    r"|rotary_emb|rotary_pos_emb|relative_pe)(\.|$)"
)
"""Names of tensors before the first layer. All others without a number come after the last: norms, heads, poolers."""
_HEAD = re.compile(
    r"(^|\.)(lm_head|lm_head\.decoder|predictions\.decoder|embed_out|output_layer|output|vocab_projector)\.weight$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|embeddings|embedding)\.weight$"
)
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|position_ids|\.masked_bias|h\.\d+\.attn\.bias)$")
"""Constants that some versions of transformers saved and others do not."""
_MAIN_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_COUNTS = (*_MAIN_COUNTS, "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth")
_VISION = ("vision_tower.", "vision_model.", "visual.")
_PROJECTOR = ("multi_modal_projector.", "visual.merger.", "visual.deepstack_merger_list.")
_MODULES = {
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "multi_modal_projector": _PROJECTOR,
    "shared": ("shared.", "lm_head."),
}
"""The modules of mergekit whose name is not that of their tensors. Those of text_decoder and default are all the others."""

_Output: TypeAlias = tuple[tuple[ModelRef, ...], int, dict[str, Any], dict[str, tuple[Source, ...]]]


class _Assembler:
    """Binds a recipe to models and collects what is wrong."""

    def __init__(self, recipe: Recipe, opened: Mapping[ModelRef, Opened], names: Callable[[str], bool]) -> None:
        lacking = [str(model) for model in recipe.models if model not in opened]
        if lacking:
            raise MergeError(f"these models of the recipe were not opened: {', '.join(lacking)}")
        self.recipe, self.opened, self.names = recipe, opened, names
        self.method = find(recipe.method)
        self.known = recipe_parameters(self.method)
        every = [recipe.parameters, *(module.parameters for module in recipe.modules)]
        for piece in (piece for module in recipe.modules for piece in module.slices):
            every += [piece.parameters, *(source.parameters for source in piece.inputs)]
        conditions = [condition for settings in every for rules in settings.values() for condition in rules]
        self.filters = sorted({condition.filter for condition in conditions if condition.filter is not None})
        self.gradients = any(len(condition.values) > 1 for condition in conditions)
        self.resolved: dict[object, dict[str, Any] | None] = {}
        self.problems: dict[str, None] = {}
        self.notes = dict.fromkeys(recipe.notes)
        self.parts: dict[object, _Output] = {}
        self.copied: dict[str, Source] = {}
        self.order: dict[str, None] = {}
        self.dropped: dict[str, None] = {}
        self.changes: dict[str, Any] = {}
        self.donor = opened[recipe.donor]
        self.tied = said_tied(self.donor.config)
        if self.tied is None:
            self.tied = not any(map(is_head, self.donor.tensors))

    def assembly(self) -> Assembly:
        recipe = self.recipe
        owner = _owner([module.name for module in recipe.modules])
        for module in recipe.modules:
            models = dict.fromkeys(source.model for piece in module.slices for source in piece.inputs)
            owned = {
                model: {name: tensor for name, tensor in self.opened[model].tensors.items() if owner(name) == module.name}
                for model in models
            }
            empty = [model for model, tensors in owned.items() if not tensors]
            for model in empty:
                of = f" of a module {module.name}; its names begin with {self._beginnings(model)}" if module.name else ""
                self.problem(f"{at(module.place)}{self.label(model)} has no tensors{of}")
            if not empty:
                (self._slices if module.sliced else self._whole)(module, owned)
        outside = [name for name in self.donor.tensors if owner(name) is None]
        self.copied |= {name: self.donor.tensors[name] for name in outside}
        if outside:
            self.note(f"{len(outside)} tensors are in none of the modules and are copied from {self.donor.label}")
        if self.dropped:
            self.note(f"buffers that not all models have are left out: {listing(list(self.dropped))}".replace("\n", ", "))
        tokenizer = self._tokenizer()
        if recipe.scope == "model" and len(self.parts) > 1:
            self.problem("parameters.scope: model needs the same models and parameters for all tensors: leave out filters, "
                         "gradients and slices")  # fmt: skip
        if self.problems:
            raise MismatchError(listing(list(self.problems)))
        self._dtypes()
        parts = tuple(
            Part(tuple(map(self.label, models)), count, parameters, tensors)
            for models, count, parameters, tensors in self.parts.values()
        )
        order = tuple(dict.fromkeys([*self.order, *outside]))
        return Assembly(
            self.method.name, parts, self.copied, order, recipe.out_dtype or recipe.dtype, recipe.donor, self.changes,
            tokenizer, self._chat_template(), recipe.scope, tuple(self.notes),
        )  # fmt: skip

    def label(self, model: ModelRef) -> str:
        return self.opened[model].label

    def problem(self, text: str) -> None:
        self.problems[text] = None

    def note(self, text: str) -> None:
        self.notes[text] = None

    def _beginnings(self, model: ModelRef) -> str:
        found = dict.fromkeys(_LAYER.split(name)[0] if _LAYER.search(name) else name for name in self.opened[model].tensors)
        return ", ".join(list(found)[:8])

    # Which tensors become which

    def _whole(self, module: Module, owned: Mapping[ModelRef, Mapping[str, Source]]) -> None:
        """Merge models tensor by tensor, each with the tensors of its name."""
        (piece,) = module.slices
        names = dict.fromkeys(name for source in piece.inputs for name in owned[source.model])
        model = piece.inputs[0].model
        lists = _layer_lists(names, self.opened[model].config) if self.gradients else {}
        for name in names:
            found = _LAYER.search(name)
            count = lists.get(name[: found.start(1)], 0) if found else 0
            t = _position(int(found[1]), count) if found and count else 0.0
            self._output(module, piece, name, [name] * len(piece.inputs), t, owned)

    def _slices(self, module: Module, owned: Mapping[ModelRef, Mapping[str, Source]]) -> None:
        """Merge ranges of layers, numbered anew, and what comes before and after them."""
        lists = {model: self._layer_list(module, model, tensors) for model, tensors in owned.items()}
        chosen = dict.fromkeys(prefix for prefix, _ in filter(None, lists.values()))
        if None in lists.values():
            return
        if len(chosen) > 1:
            self.problem(f"{module.place or 'slices'}: the layers of the models have different names: {', '.join(chosen)}")
            return
        (prefix,) = chosen
        names = {model: _by_layer(tensors, prefix) for model, tensors in owned.items()}
        if not self._check_ranges(module, {model: cast(tuple[str, int], found)[1] for model, found in lists.items()}):
            return
        self._loose(module, module.slices[0], names, owned, first=True)
        origins: list[tuple[ModelRef, int]] = []
        for piece in module.slices:
            start, stop = cast(tuple[int, int], piece.inputs[0].layers)
            for step in range(stop - start):
                layers = [cast(tuple[int, int], source.layers)[0] + step for source in piece.order]
                inside = [names[source.model].get(layer, {}) for source, layer in zip(piece.order, layers, strict=True)]
                for suffix in dict.fromkeys(suffix for found in inside for suffix in found):
                    result = f"{prefix}{len(origins)}.{suffix}"
                    inputs = [f"{prefix}{layer}.{suffix}" for layer in layers]
                    self._output(module, piece, result, inputs, _position(step, stop - start), owned)
                donor = -1 if piece.base is not None else 0
                origins.append((piece.order[donor].model, layers[donor]))
        self._loose(module, module.slices[-1], names, owned, first=False)
        self._count_layers(module, prefix, origins)

    def _layer_list(self, module: Module, model: ModelRef, tensors: Mapping[str, Source]) -> tuple[str, int] | None:
        """Find what the layers of a module are called in a model, and how many there are."""
        config = self.opened[model].config
        lists = _layer_lists(tensors, config)
        main = {
            n for path, n in _counts(config).items() if path in _MAIN_COUNTS or path.startswith(("text_config.", "llm_config."))
        }
        likely = {prefix: n for prefix, n in lists.items() if len(lists) == 1 or n in main}
        if len(likely) == 1:
            return next(iter(likely.items()))
        place = module.place or "slices"
        if not lists:
            self.problem(f"{place}: no tensor of {self.label(model)} has the number of a layer in its name")
        else:
            found = ", ".join(f"{prefix}0 to {prefix}{n - 1}" for prefix, n in lists.items())
            self.problem(
                f"{place}: {self.label(model)} has several lists of layers ({found}); say which is meant with modules:"
            )
        return None

    def _check_ranges(self, module: Module, counts: Mapping[ModelRef, int]) -> bool:
        before = len(self.problems)
        for piece in module.slices:
            for source in piece.inputs:
                start, stop = cast(tuple[int, int], source.layers)
                if stop > counts[source.model]:
                    self.problem(f"{piece.place}: layer_range [{start}, {stop}] of {self.label(source.model)}: it has "
                                 f"{counts[source.model]} layers, so the end is at most {counts[source.model]}")  # fmt: skip
        if not any(stop - start for start, stop in (cast(tuple[int, int], piece.inputs[0].layers) for piece in module.slices)):
            self.problem(f"{module.place or 'slices'}: there is no layer in any slice")
        return len(self.problems) == before

    def _loose(
        self,
        module: Module,
        piece: Slice,
        layers: Mapping[ModelRef, Mapping[int, Mapping[str, str]]],
        owned: Mapping[ModelRef, Mapping[str, Source]],
        first: bool,
    ) -> None:
        """Merge the tensors before the first layer, or those after the last one, with the models of a slice."""
        inside = {
            source.model: {name for layer in layers[source.model].values() for name in layer.values()}
            for source in piece.inputs
        }
        names = dict.fromkeys(
            name for source in piece.inputs for name in owned[source.model] if name not in inside[source.model]
        )
        for name in names:
            if bool(_FIRST.search(name)) == first:
                self._output(module, piece, name, [name] * len(piece.inputs), 0.0, owned)

    def _output(
        self,
        module: Module,
        piece: Slice,
        result: str,
        inputs: Sequence[str],
        t: float,
        owned: Mapping[ModelRef, Mapping[str, Source]],
    ) -> None:
        """Add a tensor of the result, merged from tensors of the models of a slice, the base last."""
        models = [source.model for source in piece.order]
        if self.tied and is_head(result):
            self.note(f'"{result}" is left out: by its config, {self.donor.label} has its input embedding for it')
            return
        found = [owned[model].get(name) for model, name in zip(models, inputs, strict=True)]
        if None in found:
            if _BUFFER.search(result):
                self.dropped[result] = None
                return
            found = self._stand_ins(result, models, found)
        has = next(index for index, tensor in enumerate(found) if tensor is not None)
        for model, name, tensor in zip(models, inputs, found, strict=True):
            if tensor is None:
                self.problem(f'{self.label(model)} lacks "{name}", for "{inputs[has]}" of {self.label(models[has])}')
            elif fault := _difference(tensor, cast(Source, found[has])):
                self.problem(f'{self.label(model)}, "{name}": {fault.format(other=self.label(models[has]))}')
        self.order[result] = None
        if not self.names(result):
            self.copied[result] = cast(Source, found[-1 if piece.base is not None else 0])
            return
        parameters = self._parameters(module, piece, result, inputs, t)
        if parameters is not None:
            key = (
                tuple(models),
                piece.base is None,
                tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in parameters.items()),
            )
            part = self.parts.setdefault(key, (tuple(models), piece.models, parameters, {}))
            part[3][result] = tuple(cast(list[Source], found))

    def _stand_ins(self, name: str, models: Sequence[ModelRef], found: Sequence[Source | None]) -> list[Source | None]:
        """Take the input embedding of a model for its missing head, unless its config says that they are not tied."""
        shape = next(tensor.shape for tensor in found if tensor is not None)
        result = list(found)
        for index, model in enumerate(models):
            if result[index] is None and is_head(name) and said_tied(self.opened[model].config) is not False:
                result[index] = input_embedding(self.opened[model].tensors, shape)
                if result[index] is not None:
                    self.note(f'{self.label(model)}: its input embedding stands in for "{name}", which is tied to it')
        return result

    # With which parameters

    def _parameters(self, module: Module, piece: Slice, result: str, inputs: Sequence[str], t: float) -> dict[str, Any] | None:
        """Resolve the parameters of a tensor; ``None`` if there is a problem."""
        t = t if self.gradients else 0.0
        names = tuple(dict.fromkeys([result, *inputs]))
        key = (
            piece.place,
            t,
            *(
                tuple(matches(pattern, name) for pattern in self.filters)
                for name in (names if len(names) == 1 else [result, *inputs])
            ),
        )
        if key not in self.resolved:
            try:
                self.resolved[key] = self._resolve(module, piece, result, inputs, t)
            except MergeError as error:
                self.problem(str(error))
                self.resolved[key] = None
        return self.resolved[key]

    def _resolve(self, module: Module, piece: Slice, result: str, inputs: Sequence[str], t: float) -> dict[str, Any]:
        shared = (piece.parameters, module.parameters, self.recipe.parameters)
        models = piece.order[: piece.models]
        values: dict[str, Any] = {}
        for parameter in self.known.values():
            if parameter.name == "scope":
                continue
            if parameter.per_model:
                own = [
                    _first(parameter, (source.parameters, *shared), name, t)
                    for source, name in zip(models, inputs, strict=False)
                ]
                if any(value is not OURS for value in own):
                    default = parameter.ours.default if parameter.ours else None
                    default = default[0] if isinstance(default, tuple) else default
                    values[parameter.name] = [default if value is OURS else value for value in own]
                lacking = [source.model for source, value in zip(models, own, strict=True) if value is REQUIRED]
            else:
                value = _first(parameter, shared, result, t)
                if value is not OURS:
                    values[parameter.name] = value
                lacking = [models[0].model] if value is REQUIRED else []
            if lacking:
                of = f" of {', '.join(map(self.label, lacking))}" if parameter.per_model else ""
                raise MergeError(f'{piece.place}: {self.method.name} needs {parameter.name}{of} for "{result}", but no filter '
                                 "fits its name; add a value without a filter as the last one")  # fmt: skip
        ours = our_parameters(self.method, values)
        try:
            self.method.resolve(ours, piece.models)
        except MergeError as error:
            raise MergeError(f'{piece.place}, "{result}": {error}') from None
        return ours

    # What becomes of the files beside the weights

    def _count_layers(self, module: Module, prefix: str, origins: Sequence[tuple[ModelRef, int]]) -> None:
        """Adjust the config to the layers that there are now: their number, and lists with an item for each layer."""
        config = self.donor.config
        found = _layer_lists([name for name in self.donor.tensors if name.startswith(prefix)], None).get(prefix)
        if config is None:
            return
        paths = [path for path, count in _counts(config).items() if count == found]
        words = set(re.split(r"[._]", f"{module.name}.{prefix}")) - {"", "model", "layer", "layers", "blocks", "block"}
        near = [path for path in paths if words & set(re.split(r"[._]", path))]
        main = [path for path in paths if path.split(".")[-1] in _MAIN_COUNTS and "vision" not in path and "audio" not in path]
        paths = near or main or paths
        if not paths:
            self.note(f"the config of {self.donor.label} has no number of layers that could be set to {len(origins)}")
        for path in paths:
            if found != len(origins):
                self.changes[path] = len(origins)
            parent, _, _ = path.rpartition(".")
            for key, items in _section(config, parent).items():
                if not isinstance(items, list) or len(items) != found or not _is_per_layer(items):
                    continue
                listed = []
                for model, layer in origins:
                    own = _section(self.opened[model].config or {}, parent).get(key)
                    pick = own if isinstance(own, list) and layer < len(own) else items
                    listed.append(pick[layer] if layer < len(pick) else pick[-1])
                if listed != items:
                    self.changes[f"{parent}.{key}".lstrip(".")] = listed

    def _dtypes(self) -> None:
        """Adjust the dtype that the config names, wherever it does."""
        dtype, config = self.recipe.out_dtype or self.recipe.dtype, self.donor.config
        if dtype is None or config is None:
            return
        self.changes |= dict.fromkeys(dtype_keys(config), dtype)

    def _tokenizer(self) -> ModelRef | None:
        wanted = self.recipe.tokenizer
        if wanted is None:
            return None
        merged = {source.model for module in self.recipe.modules for piece in module.slices for source in piece.inputs}
        models = [self.opened[model] for model in self.recipe.models if model in merged]
        for problem in tokenizer_problems(self.opened[wanted], models):
            self.problem(problem)
        return None if wanted == self.recipe.donor else wanted

    def _chat_template(self) -> str | None:
        wanted = self.recipe.chat_template
        if wanted != "auto":
            return TEMPLATES.get(wanted, wanted) if wanted else None
        templates = Counter(filter(None, (_template_of(self.opened[model]) for model in self.recipe.models)))
        if not templates:
            self.note("chat_template: none of the models has one")
            return None
        return templates.most_common(1)[0][0]


def _first(parameter: RecipeParameter, levels: Iterable[Settings], name: str, t: float) -> Any:
    """Return the value at the first level that has one for a tensor, or the default."""
    for settings in levels:
        condition = next((rule for rule in settings.get(parameter.name, ()) if rule.holds(name)), None)
        if condition is None:
            continue
        value = condition.at(t)
        if parameter.kind is int and isinstance(value, float):
            if not value.is_integer():
                raise MergeError(f'{parameter.name}: the gradient gives "{name}" {value:g}, but it must be a whole number')
            value = int(value)
        return value
    return parameter.default


def _position(index: int, count: int) -> float:
    """Return where a layer is between the first (0) and the last (1); a layer alone is the last."""
    return index / (count - 1) if count > 1 else 1.0


def _layer_lists(names: Iterable[str], config: Mapping[str, Any] | None) -> dict[str, int]:
    """Find the lists of layers among tensors: by what comes before the number, how many layers there are.

    The first number in a name is that of its layer. Lists without gaps count before others, and those of a length that the
    config has as a number of layers before all others.

    >>> _layer_lists(["h.0.mlp.0.weight", "h.1.mlp.0.weight", "head.weight"], None)
    {'h.': 2}
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if found := _LAYER.search(name):
            numbers.setdefault(name[: found.start(1)], set()).add(int(found[1]))
    lists = {prefix: len(found) for prefix, found in numbers.items() if max(found) == len(found) - 1}
    lists = lists or {prefix: max(found) + 1 for prefix, found in numbers.items()}
    counts = set(_counts(config).values())
    return {prefix: count for prefix, count in lists.items() if count in counts} or lists


def _by_layer(tensors: Iterable[str], prefix: str) -> dict[int, dict[str, str]]:
    """Group the names of a list of layers: by number, the whole name by what comes after the number."""
    layers: dict[int, dict[str, str]] = {}
    for name in tensors:
        found = _LAYER.search(name)
        if found and name[: found.start(1)] == prefix:
            layers.setdefault(int(found[1]), {})[name[found.end() :]] = name
    return layers


def _counts(config: Mapping[str, Any] | None) -> dict[str, int]:
    """List the numbers of layers in a config, by dotted path; sections such as text_config are looked into."""
    config = config or {}
    sections = {f"{key}.": value for key, value in config.items() if isinstance(value, Mapping)}
    return {
        f"{section}{key}": values[key]
        for section, values in {"": config, **sections}.items()
        for key in _COUNTS
        if type(values.get(key)) is int
    }


def _section(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    section = config.get(path) if path else config
    return section if isinstance(section, Mapping) else {}


def _is_per_layer(items: Sequence[object]) -> bool:
    """Whether a list of a config can say something of each layer: words or flags; other numbers may be those of layers."""
    return all(isinstance(item, str) for item in items) or all(item in (0, 1) for item in items)


def _owner(modules: Sequence[str]) -> Callable[[str], str | None]:
    """Return what tells the module of a tensor by its name."""
    if list(modules) == [""]:
        return lambda _: ""
    prefixes: dict[str, str | None] = {}
    if "text_decoder" in modules:
        prefixes |= dict.fromkeys([*_VISION, *_PROJECTOR])
    rest = next((module for module in ("default", "text_decoder") if module in modules), None)
    for module in modules:
        if module != rest:
            prefixes |= dict.fromkeys(_MODULES.get(module, (f"{module.rstrip('.')}.",)), module)

    def owner(name: str) -> str | None:
        bare = name.removeprefix("model.")
        fitting = [prefix for prefix in prefixes if name.startswith(prefix) or bare.startswith(prefix)]
        return prefixes[max(fitting, key=len)] if fitting else rest

    return owner


def is_head(name: str) -> bool:
    """Whether a tensor turns the last layer's output into tokens, as far as its name can tell."""
    return bool(_HEAD.search(name)) and not _LAYER.search(name)


def dtype_keys(config: Mapping[str, Any]) -> list[str]:
    """List where a config names the dtype, by dotted path, sections such as text_config included; or where it had better."""
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    inside = [
        f"{section}.{key}"
        for section, value in config.items()
        for key in ("dtype", "torch_dtype")
        if isinstance(value, Mapping) and value.get(key) is not None
    ]
    return [*named, *inside]


def input_embedding(tensors: Mapping[str, T], shape: tuple[int, ...]) -> T | None:
    """Find the tensor of this shape that turns tokens into vectors, by its name."""
    return next((tensor for name, tensor in tensors.items() if _EMBEDDING.search(name) and tensor.shape == shape), None)


def said_tied(config: Mapping[str, Any] | None) -> bool | None:
    """Tell whether a config says that the head is the input embedding; None if it says nothing."""
    sections = [config or {}, _section(config or {}, "text_config")]
    said = [bool(section["tie_word_embeddings"]) for section in sections if section.get("tie_word_embeddings") is not None]
    return said[0] if said else None


def _difference(tensor: Source, other: Source) -> str:
    if tensor.shape != other.shape:
        advice = "only models of the same architecture can be merged"
        if tensor.shape[1:] == other.shape[1:] and (_EMBEDDING.search(tensor.name) or is_head(tensor.name)):
            advice = "the vocabularies differ; resize the embeddings of one of them first"
        return f"shape {tensor.shape}, but {{other}} has {other.shape}; {advice}"
    if tensor.dtype != other.dtype and (tensor.dtype in EXACT or other.dtype in EXACT):
        return f"dtype {tensor.dtype}, but {{other}} has {other.dtype}; integers can only be copied where all models agree"
    return ""


def _json(path: Path, problems: list[str] | None = None) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if problems is not None:
            problems.append(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
        return None


def _vocabulary(model: Opened, problems: list[str]) -> dict[str, int] | None:
    """Read the tokens of a model and their numbers; of a SentencePiece model alone, the digest of its file."""
    files = model.checkpoint.companions()
    if "tokenizer.json" in files:
        read = _json(files["tokenizer.json"], problems)
        with suppress(TypeError, KeyError, IndexError, AttributeError):
            vocabulary = read["model"]["vocab"]
            if isinstance(vocabulary, list):
                vocabulary = {item[0]: index for index, item in enumerate(vocabulary)}
            return {**vocabulary, **{token["content"]: token["id"] for token in read.get("added_tokens") or ()}}
        return None
    if "vocab.json" in files:
        read = _json(files["vocab.json"], problems)
        added = _json(files["added_tokens.json"], problems) if "added_tokens.json" in files else {}
        return {**read, **added} if isinstance(read, dict) and isinstance(added, dict) else None
    for name in ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if name in files:
            try:
                content = files[name].read_bytes()
            except OSError as error:
                problems.append(f"{files[name]}: cannot be read: {error.strerror}")
                return None
            return {line.decode("latin-1"): index for index, line in enumerate(content.splitlines())}
    return None


def _template_of(model: Opened) -> str | None:
    """Find the chat template of a model where transformers does: in a file of its own, or in the tokenizer's config."""
    files = model.checkpoint.companions()
    template: Any = None
    if "chat_template.jinja" in files:
        with suppress(OSError, UnicodeError):
            template = files["chat_template.jinja"].read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template is None and name in files:
            read = _json(files[name])
            template = read.get("chat_template") if isinstance(read, dict) else None
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template.strip() or None if isinstance(template, str) else None
