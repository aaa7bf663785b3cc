"""Low-rank adapters (PEFT LoRA): put onto a model while it is read, or merged into one adapter.

An adapter holds, for each module that it changes, two small matrices: the module's weight becomes
``W + scale * (B @ A)``, where A is (rank, in), B is (out, rank), and scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with
rank-stabilised LoRA. Names, patterns and shapes are those that PEFT 0.21 writes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod, sqrt
from typing import Any, Literal, TypeAlias

import numpy as np

from mergekit_cl.checkpoint.folder import Checkpoint
from mergekit_cl.checkpoint.header import parse_object, quoted
from mergekit_cl.checkpoint.stored import DataFile, Source, numpy_dtype
from mergekit_cl.dtypes import compute_dtype, output_dtype, type_of
from mergekit_cl.errors import CheckpointError, NonFiniteError, listing
from mergekit_cl.kernels import Array

Factors: TypeAlias = tuple[Array, Array]

_PREFIX = "base_model.model."
_TILE_ROWS = 16
_TILE_PRODUCTS = 2**18  # OpenBLAS computes a matrix product of up to so many multiplications in one thread
_WIDE_ROW = 2**18  # elements; of wider rows, two are computed at a time
_TENSORS_KEPT = 8  # factors of so many tensors stay in memory, for each adapter
_PIECE = 2**18  # elements that are converted at a time
_LARGEST_NUMBER = 1e30  # of an alpha or a weight; also keeps out Inf and NaN

_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(\.[^.]+)?")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")

_ON_AN_UNCHANGED_BASE = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")
_REFUSED = {
    "use_dora": "DoRA rescales each weight by its norm, so its change is not a product of two small matrices",
    "lora_bias": "it has a bias beside B, for which the base may have no tensor",
    "layer_replication": "it repeats layers of its base, so it fits no model of the base's shape",
    "megatron_config": "Megatron's parallel layers are cut in ways that the file does not tell",
    "trainable_token_indices": "it holds single rows of the embeddings, which are not read",
    "target_parameters": "it changes parameters of experts, whose layout the file does not tell",
    "alora_invocation_tokens": "activated LoRA is only in force after certain tokens, so it is no change of the weights",
    "use_qalora": "QALoRA pools the inputs of quantised layers",
    "use_bdlora": "block-diagonal LoRA is not read",
    "arrow_config": "Arrow chooses among adapters for each token, so it is no change of the weights",
    "kasa_config": "KaSA changes its base's weights and has a diagonal between A and B",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA is not read",
}


@dataclass(frozen=True, eq=False)
class Patched:
    """A tensor of a model with the change of an adapter added as it is read; a `Source`.

    The product is computed in float32 (float64 for a float64 tensor) and the sum rounded once to the tensor's dtype. It is
    computed in tiles that depend on the shape and the rank alone, each by one thread, so that the bits do not depend on which
    window is read. Reading takes the memory of a few megabytes beside ``out``; the factors are read when first needed.

    ``base`` is the tensor W, where a convolution's kernel counts as the row of its output channel. ``a`` (rank, in, ...) and
    ``b`` (out, rank, ...) are the factors as the adapter stores them. ``transposed`` says whether W is (in, out), as for an
    embedding, or with fan_in_fan_out. ``factors`` reads the factors, and may keep them.
    """

    base: Source
    a: Source
    b: Source
    scale: float
    transposed: bool
    factors: "Callable[[Patched], Factors]" = field(default_factory=lambda: read_factors, repr=False)

    @property
    def name(self) -> str:
        """What the tensor is called in its model."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """The dtype of the tensor, which the result is rounded to."""
        return self.base.dtype

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files of the tensor and of the adapter."""
        return tuple(dict.fromkeys((*self.base.files, *self.a.files, *self.b.files)))

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the pieces in which the product is computed."""
        rows = _TILE_ROWS if prod(self.shape[1:]) <= _WIDE_ROW else 2
        return rows, max(_TILE_ROWS, _TILE_PRODUCTS // (rows * self.a.shape[0]))

    def read(self, start: int, stop: int, out: Array) -> None:
        """See `Source.read`."""
        self.base.read(start, stop, out)
        if start == stop:
            return
        values = out.view(numpy_dtype(self.dtype))
        left, right = self.factors(self)
        rows, width = self.tile
        columns = prod(self.shape[1:])
        block = rows * columns
        product = np.empty((rows, right.shape[1]), right.dtype)
        with np.errstate(all="ignore"):  # what is not finite is reported by whoever reads it
            for index in range(start // block, -(-stop // block)):
                for column in range(0, right.shape[1], width):
                    tile = slice(column, column + width)
                    np.matmul(left[index * rows : (index + 1) * rows], right[:, tile], out=product[:, tile])
                change = product[:, :columns].ravel()
                change *= self.scale
                first, last = max(start, index * block), min(stop, (index + 1) * block)
                part = values[first - start : last - start]
                part[...] = part.astype(change.dtype) + change[first - index * block : last - index * block]


def read_factors(patch: Patched) -> Factors:
    """Read the two matrices whose product is the change of a tensor's rows, padded with zeros to whole tiles."""
    dtype = compute_dtype([patch.dtype])
    a, b = (_matrix(_read_all(source, dtype)) for source in (patch.a, patch.b))
    left, right = (a.T, b.T) if patch.transposed else (b, a)
    rows, width = patch.tile
    return (
        np.pad(left, ((0, -len(left) % rows), (0, 0))),
        np.pad(right, ((0, 0), (0, -right.shape[1] % width))),
    )


@dataclass(frozen=True, eq=False)
class Replaced:
    """A tensor that an adapter brings whole (``modules_to_save``, biases), with the base's name and dtype; a `Source`."""

    name: str
    dtype: str
    stored: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The adapter's file."""
        return self.stored.files

    def read(self, start: int, stop: int, out: Array) -> None:
        """See `Source.read`."""
        if self.stored.dtype == self.dtype:
            self.stored.read(start, stop, out)
            return
        values = out.view(numpy_dtype(self.dtype))
        piece = np.empty(min(_PIECE, stop - start), numpy_dtype(self.stored.dtype))
        with np.errstate(all="ignore"):
            for first in range(start, stop, _PIECE):
                last = min(first + _PIECE, stop)
                self.stored.read(first, last, piece[: last - first])
                values[first - start : last - start] = piece[: last - first]


@dataclass(frozen=True)
class _Update:
    """The two factors of a module, and the factor of their product."""

    a: Source
    b: Source
    embedding: bool
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class _Parsed:
    """An adapter by the names of its base: modules that it changes, and tensors that it replaces."""

    label: str
    config: dict[str, Any]
    updates: dict[str, _Update]
    replaced: dict[str, Source]


def apply_adapter(model: Mapping[str, Source], adapter: Checkpoint) -> dict[str, Source]:
    """Put a LoRA adapter onto its base: the tensors that it changes are computed as they are read.

    Args:
        model: The tensors of the base by name; nothing is read from it here, nor is it changed.
        adapter: A folder with adapter_config.json and adapter_model.safetensors. Its names may lack the base's first component
            ("model.", "transformer."), or have it where the base's files do not.

    Returns:
        The tensors of ``model`` in their order, where `Patched` and `Replaced` stand for those that the adapter changes. Shapes
        and dtypes are those of the base.

    Raises:
        CheckpointError: A kind of adapter that is not read, or one that does not fit the model; all problems at once.

    """
    parsed = _parse(adapter)
    result = dict(model)
    tops = {name.partition(".")[0] for name in model}
    problems = []
    for name, stored in parsed.replaced.items():
        found = _find(name, model, tops)
        if found is None:
            problems.append(_unmatched(parsed, stored.name, name))
        elif stored.shape != model[found].shape:
            problems.append(
                f"{parsed.label}: {stored.name} has shape {stored.shape}, but {found} of the model {model[found].shape}; "
                "if the vocabulary was enlarged, enlarge that of the model first"
            )
        elif (stored.dtype in type_of) != (model[found].dtype in type_of):
            problems.append(f"{parsed.label}: {stored.name} is {stored.dtype}, but {found} of the model {model[found].dtype}")
        else:
            result[found] = Replaced(found, model[found].dtype, stored)
    factors = lru_cache(_TENSORS_KEPT)(read_factors)
    for module, update in parsed.updates.items():
        found = _find(f"{module}.weight", model, tops)
        if found is None:
            problems.append(_unmatched(parsed, update.a.name, f"{module}.weight"))
            continue
        weight = result[found]
        transposed = _transposed(update, weight, model, bool(parsed.config.get("fan_in_fan_out")))
        if transposed is None:
            problems.append(
                f"{parsed.label}: {module}: its factors have shapes {update.b.shape} and {update.a.shape}, which do not fit "
                f"the model's {found} of shape {weight.shape}; was the adapter trained on another base?"
            )
        elif weight.dtype not in type_of:
            problems.append(f"{parsed.label}: {found} of the model is {weight.dtype}; dequantise the model first")
        else:
            result[found] = Patched(weight, update.a, update.b, update.scale, transposed, factors)
    if problems:
        raise CheckpointError(listing(problems))
    return result


@dataclass(frozen=True)
class Adapter:
    """An adapter to be written: ``tensors`` for adapter_model.safetensors, ``config`` for adapter_config.json.

    ``energy`` is the share of each module's squared Frobenius norm that its rank keeps: 1.0 where the result is exact.
    """

    tensors: dict[str, Array]
    config: dict[str, Any]
    energy: dict[str, float]


def merge_adapters(
    adapters: Sequence[Checkpoint],
    weights: Sequence[float],
    *,
    combination: Literal["cat", "svd"],
    rank: int | None = None,
    dtype: str | None = None,
) -> Adapter:
    """Merge LoRA adapters of one base into the adapter whose change of each weight is the weighted sum of theirs.

    With "cat", A keeps its bits (where the dtype is its own) and B is rounded by at most half a unit in the last place: not at
    all where ``weight * scale`` is a power of two, else by up to 2**-9 of an element in bfloat16; ask for ``dtype="float32"``
    where that matters. Tensors that adapters bring whole (``modules_to_save``, biases) become the weighted mean,
    ``sum(w * T) / sum(w)``.

    Args:
        adapters: Adapter folders. Ranks, alphas and the modules that they change may differ; an adapter that lacks a module
            contributes nothing to it.
        weights: One finite number per adapter; they need not add up to one, and may be negative.
        combination: ``"cat"`` stacks the factors, which is exact; the rank of a module is the sum of the ranks. ``"svd"`` gives
            the best approximation of that at a rank, computed from the factors alone, never the full matrices.
        rank: Of "svd": the largest rank that a module gets; by default the largest of the adapters' ranks.
        dtype: Of the result; by default that of the first adapter.

    Returns:
        An adapter whose scale is 1 (alpha is the rank of each module): weights and scales are folded into B, and shared by both
        factors in "svd". All is computed in float64 and rounded once, to ``dtype``.

    Raises:
        CheckpointError: Adapters of different bases or kinds, or of kinds that are not read; all problems at once.
        NonFiniteError: A tensor holds NaN or Inf, or the result would overflow its dtype.

    """
    problems = _check_request(adapters, weights, combination, rank)
    if problems:
        raise CheckpointError(listing(problems))
    parsed = [_parse(adapter) for adapter in adapters]
    modules = list(dict.fromkeys(module for adapter in parsed for module in adapter.updates))
    problems = [*_compare(parsed), *_compare_replaced(parsed, weights)]
    for module in modules:
        shapes = {(update.a.shape[1:], update.b.shape[:1], update.embedding) for update in _updates(parsed, module)}
        if len(shapes) > 1:
            found = ", ".join(f"{a.label} {a.updates[module].a.shape}" for a in parsed if module in a.updates)
            problems.append(f"{module}: the adapters' lora_A and lora_B do not fit one another: {found}")
    if problems:
        raise CheckpointError(listing(problems))
    limit = None if combination == "cat" else rank or max(u.rank for adapter in parsed for u in adapter.updates.values())
    first = next(iter(parsed[0].updates.values())).a.dtype
    stored_as = output_dtype(dtype) if dtype else first
    tensors: dict[str, Array] = {}
    energy = {}
    ranks = {}
    for module in modules:
        parts = [(w, a.updates[module]) for w, a in zip(weights, parsed, strict=True) if module in a.updates]
        a, b, energy[module] = _combine(parts, limit)
        ranks[module] = len(a)
        like = parts[0][1]
        a = a.reshape(len(a), *like.a.shape[1:])
        b = b.reshape(*b.shape, *like.b.shape[2:])
        for letter, factor in (("A", a), ("B", b)):
            name = f"{module}.lora_embedding_{letter}" if like.embedding else f"{module}.lora_{letter}.weight"
            tensors[_PREFIX + name] = _rounded(factor, stored_as, f"{module}: lora_{letter} of the result")
    for name in dict.fromkeys(name for adapter in parsed for name in adapter.replaced):
        module, _, leaf = name.rpartition(".")
        wrapped = f"{module}.base_layer.{leaf}" if module in ranks else name
        of_all = [adapter.replaced[name] for adapter in parsed if name in adapter.replaced]
        tensors[_PREFIX + wrapped] = (
            _read_all(of_all[0], numpy_dtype(of_all[0].dtype)) if _is_copy(of_all[0]) else _mean(of_all, weights, dtype)
        )
    return Adapter(tensors, _merged_config(parsed, ranks), energy)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds an adapter of PEFT, by its config or the names of its tensors."""
    if checkpoint.is_folder and (checkpoint.path / "adapter_config.json").exists():
        return True
    return any(".lora_A" in name or ".lora_embedding_A" in name for name in checkpoint.tensors)


def refuse_adapters(label: str) -> CheckpointError:
    """Build the error for adapters that are merged as if they were models."""
    return CheckpointError(
        f"{label}: LoRA adapters cannot be merged tensor by tensor: an adapter stands for B @ A, and mean(B) @ mean(A) is not "
        'mean(B @ A): it mixes each B with the A of the others. Merge them with the combination "cat" (exact) or "svd" (at a '
        'rank), or put each onto its base ("base+adapter") and merge those'
    )


def _parse(adapter: Checkpoint) -> _Parsed:
    """Sort the tensors of an adapter by what they change, and refuse what cannot be read exactly."""
    config = _read_config(adapter)
    label = adapter.label
    problems = [f"{label}: {problem}" for problem in _check_config(config)]
    if problems:
        raise CheckpointError(listing(problems))
    factors: dict[tuple[str, bool], dict[str, Source]] = {}
    replaced: dict[str, Source] = {}
    for key, source in adapter.tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if source.dtype not in type_of and (match or not _is_exact(source)):
            problems.append(f"{label}: {key} is {source.dtype}, which is not read; save the adapter in a floating dtype")
        elif match:
            pair = factors.setdefault((match["module"], match.re is _EMBEDDING), {})
            if match["factor"] in pair:
                problems.append(f"{label}: {key} and {pair[match['factor']].name} are one factor twice; save one adapter alone")
            pair[match["factor"]] = source
        elif re.search(r"\.(lora_|token_adapter\.)", name):
            problems.append(f"{label}: {key} is of a kind of adapter that is not read; only lora_A and lora_B are")
        elif ".original_module." not in name:
            plain = _WRAPPER.sub("", name)
            if plain == name or plain not in replaced:  # with bias="all", PEFT writes a saved module's bias under both names
                replaced[plain] = source
    updates: dict[str, _Update] = {}
    for (module, embedding), pair in factors.items():
        problem = _check_pair(pair, module, config) if module not in updates else "has two kinds of factors"
        if problem:
            problems.append(f"{label}: {module}: {problem}")
        else:
            updates[module] = _Update(pair["A"], pair["B"], embedding, _scale(config, module))
    if not updates and not problems:
        problems.append(f"{label}: holds no lora_A and lora_B")
    if problems:
        raise CheckpointError(listing(problems))
    return _Parsed(label, config, updates, replaced)


def _read_config(adapter: Checkpoint) -> dict[str, Any]:
    folder = adapter.path if adapter.is_folder else adapter.path.parent
    path = folder / "adapter_config.json"
    try:
        config, twice = parse_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; it says what the adapter's scale is") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if twice:
        raise CheckpointError(listing([f"{path}: gives {quoted(name)} twice" for name in twice]))
    return config


def _check_config(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"its peft_type is {kind!r}; only LORA is read: merge it into its base with PEFT's merge_and_unload"]
    merge = "merge it into its base with PEFT's merge_and_unload, if that can"
    problems = [f"{key} is set: {reason}; {merge}" for key, reason in _REFUSED.items() if config.get(key)]
    initial = config.get("init_lora_weights", True)
    if initial not in _ON_AN_UNCHANGED_BASE:
        problems.append(
            f'init_lora_weights is "{initial}", which changes the weights of the base when training begins, so the adapter '
            "belongs to a base that is not the one in the files; convert the adapter: PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    if not _is_rank(config.get("r")):
        problems.append(f"r is {config.get('r')!r}, which is no rank")
    if not _is_number(config.get("lora_alpha")):
        problems.append(f"lora_alpha is {config.get('lora_alpha')!r}, which is no number")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        problems.append(f"modules_to_save is {saved!r}; it has to be a list of names")
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(is_valid(value) for value in patterns.values()):
            problems.append(f"{key} is {patterns!r}; it has to give a number for each pattern")
            continue
        for pattern in patterns:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(f'{key}: "{pattern}" is no regular expression: {error}')
    return problems


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _is_exact(source: Source) -> bool:
    return source.dtype == "bool" or source.dtype.startswith(("int", "uint"))


def _of_module(config: Mapping[str, Any], patterns: str, module: str, default: str) -> Any:
    """Look up what a pattern says for a module, as PEFT does: the first that matches the last components of its name."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


def _scale(config: Mapping[str, Any], module: str) -> float:
    rank = _of_module(config, "rank_pattern", module, "r")
    alpha = _of_module(config, "alpha_pattern", module, "lora_alpha")
    return float(alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def _check_pair(pair: Mapping[str, Source], module: str, config: Mapping[str, Any]) -> str:
    """Say what is wrong with the factors of a module, if anything."""
    if len(pair) < 2:
        (present,) = pair
        return f"has lora_{present}, but not lora_{'B' if present == 'A' else 'A'}; the file is incomplete"
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or 0 in a or 0 in b or prod(b[2:]) != 1:
        return f"lora_A of shape {a} and lora_B of shape {b} do not fit one another; the file is incomplete"
    rank = _of_module(config, "rank_pattern", module, "r")
    return f"is of rank {a[0]}, but of rank {rank} by adapter_config.json, which the scale follows" if rank != a[0] else ""


def _find(name: str, model: Mapping[str, Source], tops: Iterable[str]) -> str | None:
    """Find a tensor by the name that an adapter gives it, which may have the model's first component, or lack it."""
    if name in model:
        return name
    shorter = name.partition(".")[2]
    if shorter in model:
        return shorter
    longer = [f"{top}.{name}" for top in tops if f"{top}.{name}" in model]
    return longer[0] if len(longer) == 1 else None


def _unmatched(parsed: _Parsed, key: str, name: str) -> str:
    return (
        f"{parsed.label}: {key} matches nothing in the model, which has no {name}; was the adapter trained on another base, "
        "or is this tensor tied to another one?"
    )


def _transposed(update: _Update, weight: Source, model: Mapping[str, Source], fan_in_fan_out: bool) -> bool | None:
    """Decide whether a weight is (in, out); `None` where the factors do not fit it at all.

    PEFT goes by the class of the module, and writes down what the last one was. So the shapes decide; for a square weight, a
    neighbour that has a bias does (its outputs are as many as the bias has); what was written down only where neither can.
    """
    (_, *inner), (outer, *_) = update.a.shape, update.b.shape
    straight, swapped = (outer, *inner) == weight.shape, (*inner, outer) == weight.shape
    if update.embedding:
        return True if swapped else None
    if straight and swapped:
        return _neighbours_transposed(weight.name, model, fan_in_fan_out)
    return False if straight else True if swapped and len(weight.shape) == 2 else None


def _neighbours_transposed(name: str, model: Mapping[str, Source], otherwise: bool) -> bool:
    parent = name.rpartition(".")[0].rpartition(".")[0] + "."
    for other, source in model.items():
        if other.startswith(parent) and other.endswith(".weight") and len(source.shape) == 2:
            bias = model.get(f"{other.removesuffix('weight')}bias")
            if bias is not None and source.shape[0] != source.shape[1] and bias.shape in (source.shape[:1], source.shape[1:]):
                return bias.shape == source.shape[1:]
    return otherwise


def _check_request(adapters: Sequence[Checkpoint], weights: Sequence[float], combination: str, rank: int | None) -> list[str]:
    problems = []
    if not adapters:
        problems.append("no adapters to merge")
    if len(weights) != len(adapters):
        problems.append(f"{len(adapters)} adapters, but {len(weights)} weights; give one for each")
    if not all(_is_number(weight) for weight in weights):
        problems.append(f"the weights {list(weights)} have to be finite numbers")
    if combination not in ("cat", "svd"):
        problems.append(f'combination is "{combination}"; choose "cat" (exact) or "svd" (at a rank)')
    if rank is not None and combination == "cat":
        problems.append('a rank has no meaning with "cat", whose rank is the sum of the ranks; choose "svd"')
    if rank is not None and not _is_rank(rank):
        problems.append(f"rank is {rank!r}; it has to be a whole number above zero")
    return problems


def _compare(parsed: Sequence[_Parsed]) -> list[str]:
    """Say in what the adapters are not of one kind and one base."""
    problems = []
    for key, advice in (
        (
            "base_model_name_or_path",
            "their changes add up on one base only; if it is the same, write the same name",
        ),
        ("revision", "their changes add up on one base only; if it is the same, write the same revision"),
        ("task_type", "merge adapters of one task type"),
    ):
        values = [adapter.config.get(key) or ("main" if key == "revision" else None) for adapter in parsed]
        if any(value != values[0] for value in values):
            found = ", ".join(f"{adapter.label}: {value!r}" for adapter, value in zip(parsed, values, strict=True))
            problems.append(f"{key} in adapter_config.json differs ({found}); {advice}")
    problems += [
        f"{adapter.label}: ensure_weight_tying is set: its factors are those of another module, transposed, which a sum is not"
        for adapter in parsed
        if adapter.config.get("ensure_weight_tying")
    ]
    return problems


def _compare_replaced(parsed: Sequence[_Parsed], weights: Sequence[float]) -> list[str]:
    """Say which tensors that adapters bring whole have no mean."""
    problems = []
    for name in dict.fromkeys(name for adapter in parsed for name in adapter.replaced):
        found = [adapter.replaced.get(name) for adapter in parsed]
        copies = [source for source in found if source and _is_copy(source)]
        if len(copies) == len(found) - found.count(None):
            if not all(_same(copies[0], copy) for copy in copies[1:]):
                problems.append(
                    f"{name}: the adapters bring copies of this tensor of their base, which differ; so do their bases"
                )
            continue
        lacking = [adapter.label for adapter, source in zip(parsed, found, strict=True) if source is None]
        if lacking:
            problems.append(
                f"{name}: some adapters bring this tensor whole, but not {', '.join(lacking)}; it has no mean without the "
                'base: put each adapter onto its base ("base+adapter") and merge those'
            )
        elif len({(source.shape, _is_exact(source)) for source in found if source}) > 1:
            problems.append(f"{name}: the adapters bring it in shapes {', '.join(str(s.shape) for s in found if s)}")
        elif sum(weights) == 0:
            problems.append(f"{name}: the weights add up to zero, so what the adapters bring whole has no mean")
    return problems


def _updates(parsed: Iterable[_Parsed], module: str) -> list[_Update]:
    return [adapter.updates[module] for adapter in parsed if module in adapter.updates]


def _combine(parts: Sequence[tuple[float, _Update]], limit: int | None) -> tuple[Array, Array, float]:
    """Stack the factors of a module; at a rank, replace them by the largest singular vectors of their product."""
    a = np.concatenate([_finite(update.a) for _, update in parts])
    b = np.concatenate([weight * update.scale * _finite(update.b) for weight, update in parts], axis=1)
    if limit is None:
        return a, b, 1.0
    outer, b_core = np.linalg.qr(b)
    inner, a_core = np.linalg.qr(a.T)
    u, singular, v = np.linalg.svd(b_core @ a_core.T, full_matrices=False)
    rank = min(limit, len(singular))
    root = np.sqrt(singular[:rank])
    total = float(np.sum(singular**2))
    energy = float(np.sum(singular[:rank] ** 2)) / total if total else 1.0
    return root[:, None] * (v[:rank] @ inner.T), (outer @ u[:, :rank]) * root, energy


def _is_copy(source: Source) -> bool:
    """Whether this is the weight of the base itself, which PEFT copies into adapters that change the embeddings."""
    return source.name.endswith(".base_layer.weight")


def _same(one: Source, other: Source) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    size = prod(one.shape)
    pieces = [np.empty(min(_PIECE, size), numpy_dtype(one.dtype)) for _ in range(2)]
    for first in range(0, size, _PIECE):
        length = min(_PIECE, size - first)
        for source, piece in zip((one, other), pieces, strict=True):
            source.read(first, first + length, piece[:length])
        if pieces[0][:length].tobytes() != pieces[1][:length].tobytes():
            return False
    return True


def _mean(sources: Sequence[Source], weights: Sequence[float], dtype: str | None) -> Array:
    first = sources[0]
    if _is_exact(first):
        arrays = [_read_all(source, numpy_dtype(source.dtype)) for source in sources]
        if any(not np.array_equal(array, arrays[0]) for array in arrays):
            raise CheckpointError(f"{first.name}: is {first.dtype} and differs between the adapters; it has no mean")
        return arrays[0]
    total = np.zeros(first.shape)
    for weight, source in zip(weights, sources, strict=True):
        total += weight / sum(weights) * _finite(source, flat=False)
    return _rounded(total, dtype or first.dtype, first.name)


def _merged_config(parsed: Sequence[_Parsed], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write down what the modules of the merged adapter are, and their ranks; everything else is as in the first adapter."""
    counts = list(ranks.values())
    usual = max(sorted(set(counts)), key=counts.count)
    pattern = _rank_pattern(ranks, usual)
    saved = {name for adapter in parsed for name in adapter.config.get("modules_to_save") or []}
    biases = [bias for adapter in parsed if (bias := adapter.config.get("bias") or "none") != "none"]
    return {
        **parsed[0].config,
        **_targets([adapter.config for adapter in parsed], ranks),
        "alpha_pattern": pattern,
        "bias": biases[0] if biases else "none",
        "corda_config": None,
        "eva_config": None,
        "fan_in_fan_out": any(adapter.config.get("fan_in_fan_out") for adapter in parsed),
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": usual,
        "lora_ga_config": None,
        "modules_to_save": sorted(saved) or None,
        "r": usual,
        "rank_pattern": dict(pattern),
        "use_rslora": False,
    }


def _targets(configs: Sequence[Mapping[str, Any]], modules: Iterable[str]) -> dict[str, Any]:
    """Say which modules the merged adapter changes: in the adapters' own words where these are enough, or name by name."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    asked = [{key: config.get(key) for key in keys} for config in configs]
    for one in asked:
        if isinstance(one["target_modules"], list):
            one["target_modules"] = sorted(map(str, one["target_modules"]))
    if all(one == asked[0] for one in asked) and asked[0]["target_modules"]:
        return asked[0]
    names = [one["target_modules"] or "" for one in asked]
    if all(isinstance(of_one, list) for of_one in names) and not any(one[key] for one in asked for key in keys[1:]):
        return {**dict.fromkeys(keys), "target_modules": sorted({name for of_one in names for name in of_one})}
    return {**dict.fromkeys(keys), "target_modules": sorted(modules)}


def _rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """List the modules whose rank is not the usual one, by the last component of their names where that is enough."""
    by_leaf: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(rank)
    pattern = {}
    for module, rank in ranks.items():
        leaf = module.rpartition(".")[2]
        if len(by_leaf[leaf]) > 1:
            pattern[f"^{re.escape(module)}"] = rank
        elif rank != usual:
            pattern[re.escape(leaf)] = rank
    return {key: rank for key, rank in pattern.items() if rank != usual}


def _read_all(source: Source, dtype: np.dtype[Any]) -> Array:
    """Read a tensor as an array of this dtype."""
    out = np.empty(prod(source.shape), numpy_dtype(source.dtype))
    source.read(0, out.size, out)
    return out.astype(dtype, copy=False).reshape(source.shape)


def _matrix(array: Array) -> Array:
    return array.reshape(len(array), -1)


def _finite(source: Source, *, flat: bool = True) -> Array:
    """Read a tensor in float64, as a matrix unless not ``flat``, and refuse NaN and Inf."""
    array = _read_all(source, np.dtype(np.float64))
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{source.files[0].path}: {source.name} holds NaN or Inf; leave this adapter out")
    return _matrix(array) if flat else array


def _rounded(array: Array, dtype: str, where: str) -> Array:
    with np.errstate(all="ignore"):
        result = np.ascontiguousarray(array.astype(type_of[dtype]))
    if not np.isfinite(result).all():
        raise NonFiniteError(f'{where}: overflows {dtype}; ask for dtype "float32"')
    return result
