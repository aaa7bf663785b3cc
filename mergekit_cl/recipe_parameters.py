"""The parameters of mergekit's methods, as recipes give them, and how they become those of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from mergekit_cl.registry import Method, Parameter

Scalar: TypeAlias = bool | int | float | str | None

REQUIRED: Final = object()
OURS: Final = object()


@dataclass(frozen=True)
class RecipeParameter:
    """A parameter as recipes have it. ``default`` is mergekit's; ``OURS`` leaves the parameter to our method."""

    name: str
    kind: type
    per_model: bool = False
    default: Any = REQUIRED
    ours: Parameter | None = None

    def convert(self, value: object) -> Scalar:
        """Take a value of YAML for one of the parameter's type, as pydantic does; a ValueError says what it must be."""
        choices = self.ours.choices if self.ours else ()
        if (value is None or isinstance(value, str)) and value in choices:
            return value
        if self.kind is bool:
            return _boolean(value, f"true or false{', or one of ' + ', '.join(map(str, choices)) if choices else ''}")
        if self.kind is str:
            raise ValueError(f"must be one of {', '.join(map(str, choices))}")
        wanted = "a whole number" if self.kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"must be {wanted}")
        try:
            number = float(value)
            if self.kind is int and number != int(number):
                raise ValueError
        except (ValueError, OverflowError):
            raise ValueError(f"must be {wanted}") from None
        return int(number) if self.kind is int else number


def _boolean(value: object, wanted: str) -> bool:
    text = str(value).lower()
    if isinstance(value, bool | int | float | str):
        if value == 1 or text in ("true", "t", "yes", "y", "on", "1"):
            return True
        if value == 0 or text in ("false", "f", "no", "n", "off", "0"):
            return False
    raise ValueError(f"must be {wanted}")


def _task_vectors(normalize: bool, rescale: bool, *more: RecipeParameter) -> list[RecipeParameter]:
    return [
        RecipeParameter("weight", float, per_model=True),
        RecipeParameter("density", float, per_model=True, default=1.0),
        RecipeParameter("normalize", bool, default=normalize),
        RecipeParameter("rescale", bool, default=rescale),
        RecipeParameter("lambda", float, default=1.0),
        RecipeParameter("int8_mask", bool, default=False),
        *more,
    ]


_GAMMA = RecipeParameter("gamma", float, per_model=True, default=0.01)
_EPSILON = RecipeParameter("epsilon", float, per_model=True, default=0.15)
_WEIGHT = RecipeParameter("weight", float, per_model=True)

THEIRS: dict[str, list[RecipeParameter]] = {
    "linear": [_WEIGHT, RecipeParameter("normalize", bool, default=True)],
    "slerp": [RecipeParameter("t", float)],
    "nuslerp": [
        _WEIGHT,
        RecipeParameter("nuslerp_flatten", bool, default=True),
        RecipeParameter("nuslerp_row_wise", bool, default=False),
    ],
    "multislerp": [
        _WEIGHT,
        RecipeParameter("normalize_weights", bool, default=True),
        RecipeParameter("eps", float, default=1e-8),
    ],
    "karcher": [RecipeParameter("max_iter", int, default=10), RecipeParameter("tol", float, default=1e-5)],
    "passthrough": [RecipeParameter("scale", float, per_model=True, default=OURS)],
    "task_arithmetic": _task_vectors(False, False),
    "ties": _task_vectors(True, False),
    "dare_linear": _task_vectors(False, True),
    "dare_ties": _task_vectors(False, True),
    "breadcrumbs": _task_vectors(False, False, _GAMMA),
    "breadcrumbs_ties": _task_vectors(False, False, _GAMMA),
    "della": _task_vectors(True, True, _EPSILON),
    "della_linear": _task_vectors(False, True, _EPSILON),
    "model_stock": [RecipeParameter("filter_wise", bool, default=False)],
    "sce": [RecipeParameter("select_topk", float, default=1.0), RecipeParameter("int8_mask", bool, default=False)],
    "arcee_fusion": [],
    "nearswap": [RecipeParameter("t", float)],
    "ram": [RecipeParameter("epsilon", float, default=1e-5)],
    "ramplus_tl": [
        RecipeParameter("r", float, default=0.1),
        RecipeParameter("alpha", float, default=0.2),
        RecipeParameter("epsilon", float, default=1e-5),
    ],
}
"""The methods of mergekit 0.1.5 and their parameters. Those of one model have a value for each model but the base."""


def recipe_parameters(method: Method) -> dict[str, RecipeParameter]:
    """List what a recipe can say for a method: mergekit's parameters, and our own."""
    ours = {name.rstrip("_"): parameter for name, parameter in method.shown.items()}
    table = {
        name: RecipeParameter(
            name,
            bool if name == "rescale" else parameter.type,
            parameter.per_model,
            REQUIRED if parameter.required else OURS,
            parameter,
        )
        for name, parameter in ours.items()
    }
    for theirs in THEIRS.get(method.name, []):
        own = ours.get(theirs.name)
        table[theirs.name] = RecipeParameter(theirs.name, theirs.kind, theirs.per_model, theirs.default, own)
    return table


def our_parameters(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Name the parameters of a recipe as our method does."""
    ours = {name.rstrip("_"): parameter for name, parameter in method.parameters.items()}
    result: dict[str, Any] = {}
    for name, value in values.items():
        own = ours.get(name)
        if name == "rescale" and own is not None and own.choices:
            result[name] = {True: "l1", False: None}.get(value, value)
        elif name == "normalize" and own is None and "combine" in ours:
            result.setdefault("combine", "weight_mean" if value else "sum")
        elif name == "combine":
            result[name] = value
        elif own is not None:
            result[own.name] = value[0] if isinstance(value, list) and not own.per_model else value
    return result
