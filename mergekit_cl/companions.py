"""What lies beside the weights of a merged checkpoint: config, tokenizer, model card, and the recipe that makes it again."""

import copy
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mergekit_cl.assembly import Assembly, dtype_keys
from mergekit_cl.checkpoint.reference import ModelRef, Opened
from mergekit_cl.errors import CheckpointError, MergeError
from mergekit_cl.globs import Globs, globs_of, matches_any
from mergekit_cl.plan import Plan
from mergekit_cl.recipe import read_recipe, recipe_text
from mergekit_cl.registry import Method, find


def companions_of(
    donor: Opened | None,
    dtype: str | None,
    changes: Mapping[str, Any],
    recipe: str | None,
    models: Sequence[str],
    method: str,
) -> dict[str, Path | bytes]:
    """Collect the files of the donor, its config with changes, the recipe, and a model card.

    ``dtype`` is what all floating tensors of the result have, ``changes`` are of the config: a dot in a key goes into a part.
    """
    found: dict[str, Path | bytes] = {}
    if donor is not None:
        found |= donor.checkpoint.companions()
        if donor.config is not None and (changed := _changed(donor.config, dtype, changes)) != donor.config:
            found["config.json"] = as_json(changed)
    if recipe is not None:
        found["recipe.yml"] = recipe.encode(errors="surrogateescape")
        found["README.md"] = _card(recipe, models, method).encode(errors="surrogateescape")
    return found


def _changed(config: Mapping[str, Any], dtype: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    dtypes = dict.fromkeys(dtype_keys(config), dtype) if dtype else {}
    for key, value in {**changes, **dtypes}.items():
        *parts, last = key.split(".")
        inner = changed
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return changed


def _card(recipe: str, models: Sequence[str], method: str) -> str:
    """Write the model card: what was merged and how, with the recipe that does it again."""
    names = list(dict.fromkeys(models))
    front = yaml.safe_dump(
        {"base_model": names, "library_name": "transformers", "tags": ["merge", "mergekit_cl"]},
        sort_keys=False,
        allow_unicode=True,
    )
    paper = find(method).paper
    listed = "\n".join(f"- {name}" for name in names)
    return (
        f"---\n{front}---\n\n# A merge of {len(names)} model{'s' * (len(names) != 1)}\n\n"
        f"Made with mergekit_cl {version('mergekit-cl')} by the method "
        f"[{method}]({paper}) from\n\n{listed}\n\nThis recipe makes it again (`mergekit-cl run recipe.yml OUT`):\n\n"
        f"```yaml\n{recipe.rstrip()}\n```\n"
    )


_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "spiece*",
    "*.tiktoken",
    "chat_template*",
    "*.spm",
)


def choose_tokenizer(
    companions: dict[str, Path | bytes], assembly: Assembly, opened: Mapping[ModelRef, Opened], copy_tokenizer: bool
) -> None:
    """Take the tokenizer that the recipe asks for, and its chat template."""

    def is_tokenizer(name: str) -> bool:
        return any(fnmatchcase(name.lower(), glob) for glob in _TOKENIZER)

    if assembly.tokenizer is not None or not copy_tokenizer:
        for name in [name for name in companions if is_tokenizer(name)]:
            del companions[name]
    if assembly.tokenizer is not None and copy_tokenizer:
        source = opened[assembly.tokenizer].checkpoint
        companions |= {name: path for name, path in source.companions().items() if is_tokenizer(name)}
    if assembly.chat_template is not None:
        companions["chat_template.jinja"] = assembly.chat_template.encode()
        beside = companions.get("tokenizer_config.json")
        if beside is not None:
            try:
                config = json.loads(content(beside))
            except ValueError as error:
                advice = "repair it, or leave chat_template away"
                raise CheckpointError(f"tokenizer_config.json: is not JSON: {error}; {advice}") from None
            if isinstance(config, dict) and config.pop("chat_template", None) is not None:
                companions["tokenizer_config.json"] = as_json(config)


def recipe_of(
    method: Method,
    names: Sequence[str],
    planned: Plan,
    scope: Mapping[str, Any],
    out_dtype: str | None,
    seed: int,
    only: Globs,
    exclude: Globs,
) -> str | None:
    """Write the recipe that does the same as the arguments, if there is one."""
    if planned.companions:  # parameters that are models have no place in a recipe
        return None
    models = names[: planned.models]
    shared: dict[str, Any] = dict(scope)
    own: list[dict[str, Any]] = [{} for _ in models]
    distinct = {id(chosen): chosen for chosen in (planned.parameters_of(scope) for scope, _ in planned.scopes)}
    given = next(iter(distinct.values())) if len(distinct) == 1 else planned.parameters.given
    for name, value in given.items():
        if method.parameters[name].per_model:
            for place, each in zip(own, value, strict=True):
                place[name.rstrip("_")] = _for_all(each) if planned.exact else each
        else:
            shared[name.rstrip("_")] = _for_all(value) if planned.exact else value
    recipe: dict[str, Any] = {"merge_method": method.name}
    if planned.has_base:
        recipe["base_model"] = names[-1]
    recipe["models"] = [
        {"model": model, **({"parameters": parameters} if parameters else {})}
        for model, parameters in zip(models, own, strict=True)
    ]
    if shared:
        recipe["parameters"] = shared
    if out_dtype:
        recipe["out_dtype"] = out_dtype
    more = {"seed": seed or None, "only": globs_of("only", only), "exclude": globs_of("exclude", exclude)}
    if any(more.values()):
        recipe["mergekit_cl"] = {name: value for name, value in more.items() if value}
    try:
        return recipe_text(read_recipe(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)))
    except MergeError:  # a recipe cannot say everything: not the same model twice
        return None


def _for_all(value: Any) -> Any:
    """Let entries with filters end with one for all tensors: a recipe needs a value for integers too, which are copied."""
    if not isinstance(value, list) or any(matches_any(entry["filter"]) for entry in value):
        return value
    return [*value, {**value[-1], "filter": "*"}]


def content(what: Path | bytes) -> bytes:
    """Read a file that is to lie beside the weights, or return what is to be written."""
    if isinstance(what, bytes):
        return what
    try:
        return what.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read: {error.strerror}") from error


def as_json(config: object) -> bytes:
    """Write JSON as transformers does."""
    return (json.dumps(config, indent=2) + "\n").encode()
