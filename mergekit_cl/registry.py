"""The table of merge methods: ``@method`` reads a function's signature and docstring, and that is all a method needs.

A method is a function of a `Scope` and keyword-only parameters. It touches no data: it returns a step, or yields surveys
and then returns a step (see `mergekit_cl.steps`). Or it is a formula: a function of arrays, (base, models) or (models), that
computes the entries of the result (see `Elementwise`). Parameters are annotated ``float``, ``int``, ``bool`` or
``Literal[...]``, with their range in ``Annotated`` (``Annotated[float, Between(0, 1)]``, short `Fraction`), and as
``PerModel[...]`` where each model has its own value.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Container, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from mergekit_cl.errors import Faults, MergeError, unknown
from mergekit_cl.steps import Apply, Elementwise, Scope, Sum

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Between:
    """The closed range of a number, as written in ``Annotated[float, Between(0, 1)]``."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        low, high = (
            f"{'[' if math.isfinite(self.low) else '('}{self.low:g}",
            f"{self.high:g}{']' if math.isfinite(self.high) else ')'}",
        )
        return f"{low}, {high}"


class _PerModel:
    """Marks a parameter that has one value for each model."""


PerModel: TypeAlias = Annotated[tuple[T, ...], _PerModel()]
"""A parameter with one value per model. A caller gives a number for all models, or a list in the order of the models."""

Values: TypeAlias = Any
"""Entries of a model in a formula: an array in the compute type, or a symbol that stands for one (see `Elementwise`)."""


class _OfModels:
    """Marks a parameter that is a list of models."""


Models: TypeAlias = Annotated[list[Any], _OfModels()]
"""A parameter that is a model for each model, with the same tensors: a formula is given a list of `Values` for it.

A function of a scope is given ``None``, and the formula that it returns the list.
"""

Fraction: TypeAlias = Annotated[float, Between(0, 1)]
"""A number in [0, 1]."""


class _Each(tuple[T, ...]):
    """A default that holds for each model, however many there are."""


def each(value: T) -> tuple[T, ...]:
    """Make a default for a ``PerModel`` parameter: the same value for every model."""
    return _Each((value,))


@dataclass(frozen=True)
class Advice:
    """What errors about a parameter add, as in ``Annotated[float, Advice("the paper uses 0.2")]``.

    They are those of a value that is missing or wrong, and of an unknown parameter that the text mentions as ``name=``.
    """

    text: str


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, as read from its signature."""

    name: str
    type: type
    per_model: bool = False
    range: Between | None = None
    choices: tuple[Any, ...] = ()
    default: Any = inspect.Parameter.empty
    advice: str = ""
    of_models: bool = False

    @property
    def required(self) -> bool:
        """Whether the parameter has no default."""
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        """Show the parameter as documentation does: ``beta=0.5 in [0, 1]``."""
        if self.of_models:
            return f"{self.name} (a model for each model)"
        default = self.default[0] if isinstance(self.default, _Each) else self.default
        text = self.name if self.required else f"{self.name}={default!r}"
        if self.choices:
            text += f" of {', '.join(map(repr, self.choices))}"
        elif self.range is not None:
            text += f" in {self.range}"
        return f"{text} (per model)" if self.per_model else text

    def check(self, value: object, where: str) -> Any:
        """Return one value in the parameter's type; an error where it is of another type, or out of range."""
        if self.choices:
            if value not in self.choices or isinstance(value, bool):
                advice = f" ({self.advice})" if self.advice else ""
                raise MergeError(f"{where} {self.name}={value!r}: must be one of {', '.join(map(repr, self.choices))}{advice}")
            return value
        if self.type is bool:
            if not isinstance(value, bool):
                raise MergeError(f"{where} {self.name}={value!r}: must be True or False")
            return value
        expected = numbers.Integral if self.type is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, expected):
            raise MergeError(f"{where} {self.name}={value!r}: must be {'an integer' if self.type is int else 'a number'}")
        try:
            number = self.type(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or (self.range is not None and number not in self.range):
            limits = f"in {self.range}" if self.range is not None else "finite"
            raise MergeError(f"{where} {self.name}={value!r}: must be {limits}")
        return number

    def resolve(self, value: object, models: int, where: str) -> Any:
        """Return the value that the method is called with: checked, and for a per-model parameter a tuple."""
        if hasattr(value, "tolist"):  # an array of numbers, or a number of NumPy or PyTorch
            value = value.tolist()
        if not self.per_model:
            return self.check(value, where)
        if isinstance(value, _Each):
            value = value[0]
        if not isinstance(value, list | tuple):
            return (self.check(value, where),) * models
        if len(value) != models:
            raise MergeError(
                f"{where} {self.name}={value!r}: {len(value)} values for {models} models; give one number for all of them, "
                "or a list with one for each, in their order"
            )
        return tuple(self.check(item, f"{where} model {index}:") for index, item in enumerate(value))


SCOPE = Parameter("scope", str, choices=("tensor", "model"), default="tensor")
"""What every method that surveys can be given: whether to survey each tensor, or the whole model."""


@dataclass(frozen=True)
class Method:
    """A registered merge method. Calling it calls the function."""

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    base: Literal["required", "optional", "unused"]
    least: int
    most: int | None
    paper: str
    surveys: bool
    orderless: bool = False
    """Whether each entry of the result depends on nothing but the same entry of the inputs, whatever its index."""
    whole_model: bool = True
    """Whether a method that surveys can look at the whole model."""
    companions: dict[str, Parameter] = field(default_factory=dict)
    """The parameters that are models, one for each model."""
    returns: Any = None
    """The type of what it returns, or yields surveys and returns, as annotated."""
    is_formula: bool = False
    """Whether the function is a formula over arrays, and not one of a scope."""

    @property
    def shown(self) -> dict[str, Parameter]:
        """The parameters that a user can give: those of the function, and the scope of a method that surveys."""
        return {**self.companions, **self.parameters, **({"scope": SCOPE} if self.surveys and self.whole_model else {})}

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.documentation.splitlines()[0]

    @property
    def documentation(self) -> str:
        """The whole docstring."""
        return inspect.cleandoc(self.function.__doc__ or "")

    def ends_in(self, step: type) -> bool:
        """Whether the function is annotated to return such a step: as ``step``, or as a union or a generator of it."""
        returns = get_args(self.returns)[2] if get_origin(self.returns) is Generator else self.returns
        return returns is not Apply and step in (returns, *get_args(returns))

    def __call__(self, scope: Scope, **parameters: Any) -> Any:
        """Run the method's function."""
        if self.is_formula:
            return Elementwise(partial(self.function, **parameters))
        return self.function(scope, **parameters, **dict.fromkeys(self.companions))

    def resolve(self, given: Mapping[str, object], models: int, without: Container[str] = ()) -> dict[str, Any]:
        """Check the parameters of a call, fill in the defaults, and return what the function is called with.

        A name that is a Python keyword may be given with or without its trailing underscore (``lambda_``, ``lambda``).
        ``without`` are parameters that are given, but left out here: their values differ from tensor to tensor.
        """
        names = {name.rstrip("_"): name for name in self.parameters}
        faults = Faults()
        for name in given:
            if name.rstrip("_") not in names:
                advice = next((f"{p.name}: {p.advice}" for p in self.parameters.values() if f" {name}=" in p.advice), "")
                with faults:
                    raise unknown(f"parameter of {self.name}", name, self.shown, advice)
        values = {names[name.rstrip("_")]: value for name, value in given.items() if name.rstrip("_") in names}
        missing = [name for name, parameter in self.parameters.items() if parameter.required and name not in values]
        if missing:
            advice = self.parameters[missing[0]].advice
            with faults:
                raise MergeError(
                    f"{self.name} needs {', '.join(missing)}: pass {missing[0]}=...{f' ({advice})' if advice else ''}"
                )
        resolved = {}
        for name, parameter in self.parameters.items():
            if name not in missing and name not in without:
                with faults:
                    resolved[name] = parameter.resolve(values.get(name, parameter.default), models, f"{self.name}:")
        faults.report()
        return resolved


_methods: dict[str, Method] = {}


def method(
    *,
    paper: str,
    base: Literal["required", "optional", "unused"] = "unused",
    models: tuple[int, int | None] = (1, None),
    whole_model: bool = True,
) -> Callable[[F], F]:
    """Register a function as the merge method of its name, and return the function itself.

    The function takes a `Scope` and returns a step, or it is a formula: it takes arrays, (models) or (base, models), and
    returns an array. Its own parameters follow after ``*``.

    Args:
        paper: Where the method comes from, a URL.
        base: Whether the method needs a base model, can use one, or has no use for one.
        models: The least and the greatest number of models, without the base; ``None`` for no limit.
        whole_model: Whether a method that surveys is offered with ``scope="model"``.

    Raises:
        TypeError: The function has no docstring, a parameter is not keyword-only, not annotated or of a type that parameters
            cannot have, the arrays of a formula do not fit ``base``, or the name is taken by a method of another module.

    """

    def register(function: F) -> F:
        name, where = function.__name__, f"merge method {function.__module__}.{function.__qualname__}"
        if not (function.__doc__ or "").strip():
            raise TypeError(f"{where}: needs a docstring; its first line is the method's row in every list")
        taken = _methods.get(name)
        if taken is not None and taken.function.__module__ != function.__module__:
            raise TypeError(f"{where}: the name is taken by {taken.function.__module__}; choose another")
        hints = get_type_hints(function, include_extras=True)
        declared = list(inspect.signature(function).parameters.values())
        leading = [p.name for p in declared if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        is_formula = bool(leading) and leading[0] in ("base", "models") and hints.get(leading[0]) is not Scope
        if is_formula and leading != (["base", "models"] if base == "required" else ["models"]):
            raise TypeError(f'{where}: a formula takes (models, *, ...), or with base="required" (base, models, *, ...)')
        if is_formula and base == "optional":
            raise TypeError(f'{where}: the base of a formula is "required" or "unused"')
        least, most = models
        if base not in ("required", "optional", "unused") or least < 1 or (most is not None and most < least):
            raise TypeError(f'{where}: base={base!r}, models={models}: base is "required", "optional" or "unused", and models '
                            "the least and the greatest number")  # fmt: skip
        if not leading or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in declared):
            raise TypeError(f"{where}: its first parameter must be the scope, before the *; those of a formula base and models")
        parameters = {p.name: _read_parameter(p, hints, where) for p in declared[len(leading) if is_formula else 1 :]}
        surveys = inspect.isgeneratorfunction(function)
        orderless = is_formula or (not surveys and hints.get("return") is Sum)
        companions = {p.name: p for p in parameters.values() if p.of_models}
        if companions and surveys:
            raise TypeError(f"{where}: parameters that are models, {', '.join(companions)}, are for formulas, without surveys")
        others = {name: parameter for name, parameter in parameters.items() if name not in companions}
        _methods[name] = Method(
            name,
            function,
            others,
            base,
            *models,
            paper,
            surveys,
            orderless,
            whole_model,
            companions,
            hints.get("return"),
            is_formula,
        )
        return function

    return register


def _read_parameter(parameter: inspect.Parameter, hints: Mapping[str, Any], where: str) -> Parameter:
    where = f"{where}: parameter {parameter.name}"
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        raise TypeError(f"{where} must be keyword-only (write it after *)")
    if parameter.name not in hints:
        raise TypeError(f"{where} needs an annotation, such as float or Annotated[float, Between(0, 1)]")
    if parameter.name in _RESERVED:
        raise TypeError(f"{where}: the name belongs to merge() itself; choose another")
    hint, marks = _unwrap(hints[parameter.name])
    if any(isinstance(mark, _OfModels) for mark in marks):
        return Parameter(parameter.name, list, per_model=True, of_models=True)
    per_model = any(isinstance(mark, _PerModel) for mark in marks)
    if per_model:
        hint, inner = _unwrap(get_args(hint)[0])
        marks += inner
    limits = next((mark for mark in marks if isinstance(mark, Between)), None)
    advice = next((mark.text for mark in marks if isinstance(mark, Advice)), "")
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else hint
    if not choices and kind not in (float, int, bool):
        raise TypeError(f"{where}: {hint} is not a type of parameter; use float, int, bool, Literal[...] or PerModel[...]")
    return Parameter(parameter.name, kind, per_model, limits, choices, parameter.default, advice)


def _unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split ``Annotated[X, marks]`` into X and its marks."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


_RESERVED = frozenset(
    {
        "models",
        "method",
        "base",
        "out",
        "backend",
        "out_dtype",
        "nonfinite",
        "seed",
        "threads",
        "progress",
        "scope",
        "only",
        "exclude",
        "memory",
        "shard_size",
        "overwrite",
        "verify",
    }
)


def find(name: str) -> Method:
    """Look a method up by name; the error for an unknown one has the nearest name."""
    if not isinstance(name, str):
        raise MergeError(f'method={name!r}: must be the name of a method, such as "sfa"')
    if name not in _methods:
        raise unknown("method", name, _methods)
    return _methods[name]


def methods() -> dict[str, Method]:
    """List the registered methods by name, with their parameters, ranges and papers, in alphabetical order.

    >>> print(methods()["sfa"].parameters["beta"])
    beta=0.5 in [0, 1]
    """
    return dict(sorted(_methods.items()))


__all__ = [
    "Advice",
    "Between",
    "Fraction",
    "Method",
    "Models",
    "Parameter",
    "PerModel",
    "Values",
    "each",
    "find",
    "method",
    "methods",
]
