"""The pages of methods: what is read from docstrings and signatures, and what a watched merge costs."""

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import Between, Fraction, Gram, MergeError, PerModel, Scope, Steps, Sum, each, method, methods, pages
from mergekit_cl.api import prepare
from mergekit_cl.registry import find
from mergekit_cl.steps import KthMagnitude


def cost_of(name: str, **options: Any) -> tuple[str, int]:
    """Return the reads for K models, and for three (or as many as the method takes)."""
    spent = pages.cost(methods()[name], **options)
    return spent.formula, spent.reads(3)


@pytest.mark.parametrize(
    ("name", "options", "formula", "reads"),
    [
        ("linear", {}, "K", 3),
        ("sfa", {}, "K", 3),
        ("task_arithmetic", {}, "K + 1", 4),
        ("wise_ft", {}, "K + 1", 2),
        ("passthrough", {}, "K", 1),
        ("karcher", {}, "2K", 6),
        ("model_stock", {}, "2(K + 1)", 8),
        ("multislerp", {"base": False}, "2K", 6),
        ("multislerp", {"base": True}, "2(K + 1)", 8),
        ("slerp", {"base": False}, "2K", 4),
        ("slerp", {"base": True}, "2(K + 1)", 4),
        ("nuslerp", {"base": True}, "2(K + 1)", 6),
        ("dare_ties", {}, "K + 1", 4),
        ("dare_ties", {"rescale": "l1"}, "2(K + 1)", 8),
        ("ties", {}, "3(K + 1)", 12),  # two sweeps to find the cuts, one to merge
        ("ties", {"rescale": "l1"}, "4(K + 1)", 16),
        ("breadcrumbs", {"rescale": "inverse_density"}, "3(K + 1)", 12),
    ],
)
def test_costs(name: str, options: dict[str, Any], formula: str, reads: int) -> None:
    assert cost_of(name, **options) == (formula, reads)


def test_the_passes_of_a_merge() -> None:
    assert pages.cost(methods()["ties"]).passes == (
        pages.Pass("KthMagnitude", 2, 12, True),
        pages.Pass("Consensus", 1, 12, True),
    )


def test_cuts_are_found_in_as_many_sweeps_as_their_class_says() -> None:
    """Besides, a small sample is looked at."""
    rng, elements = np.random.default_rng(0), 400_000
    base, *models = ({"w": rng.standard_normal(elements).astype(np.float32)} for _ in range(3))
    executor, _ = prepare(find("ties"), models, base, None, backend="numpy", threads=1, parameters={"density": 0.2})
    counting = Counting(executor.backend)
    executor.backend = counting
    executor.run()
    assert KthMagnitude.sweeps == 2
    assert KthMagnitude.sweeps <= counting.elements / elements < KthMagnitude.sweeps + 0.2


class Counting:
    """A backend that counts the elements that histograms are made of."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.elements = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def magnitude_histogram(self, *arguments: Any) -> Any:
        pieces: npt.NDArray[np.int64] = arguments[-1]
        self.elements += int((pieces[:, 2] - pieces[:, 1]).sum())
        return self.backend.magnitude_histogram(*arguments)


def test_modes_that_change_the_cost_are_on_the_page() -> None:
    page = pages.page(methods()["dare_linear"])
    assert "Per element, for K models: K + 1 reads, and 1 write. That is 10 bytes for 3 models and a base in bfloat16." in page
    assert '- With `rescale="l1"` it is 2(K + 1) reads, for `KeptMagnitude`.' in page
    assert page.count("- With ") == 1  # the other modes cost the same
    page = pages.page(methods()["slerp"])
    assert "Per element: 4 reads, and 1 write. That is 10 bytes for 1 model and a base in bfloat16." in page
    page = pages.page(methods()["multislerp"])
    assert "Per element, for K models: 2(K + 1) reads with a base, 2K reads without, and 1 write." in page
    assert "Per element: 1 read, and 1 write. That is 4 bytes for 1 model in bfloat16." in pages.page(methods()["passthrough"])


def test_a_method_that_reads_some_models_only() -> None:
    @method(paper="")
    def newest_two(scope: Scope, *, share: float) -> Sum:
        """Average two of the models."""
        return Sum([0.0] * (scope.models - 2) + [1 - share, share])

    page = pages.page(find("newest_two"))
    assert "Per element of 12 models with `share=0.5`: 2 reads, and 1 write." in page
    assert "- `Sum` reads 2 of 12 models once, and writes the result." in page


def test_a_page_of_a_method_with_a_summary_line_alone() -> None:
    @method(paper="")
    def plain_sum(scope: Scope) -> Sum:
        """Add up."""
        return Sum([1.0] * scope.models)

    assert pages.page(find("plain_sum")).splitlines() == [
        "# plain_sum",
        "",
        "Add up.",
        "",
        "- Base: not used",
        "- Models: 1 or more",
        "",
        "## Cost",
        "",
        "Per element, for K models: K reads, and 1 write. That is 8 bytes for 3 models in bfloat16.",
        "",
        "- `Sum` reads every model once, and writes the result.",
    ]
    assert "plain_sum" not in pages.packaged()
    assert "plain_sum" not in pages.index()


def test_a_method_that_does_not_run_with_made_up_values_has_no_cost() -> None:
    @method(paper="")
    def choosy(scope: Scope, *, t: float) -> Sum:
        """Refuse what is not 7."""
        if t != 7:
            raise MergeError("t must be 7")
        return Sum([t] * scope.models)

    assert "Cost" not in pages.page(find("choosy"))
    assert pages.cost(find("choosy"), t=7).formula == "K"
    with pytest.raises(MergeError, match="must be 7"):
        pages.cost(find("choosy"))


def test_every_section_of_a_docstring() -> None:
    @method(paper="https://doi.org/10.1/2", base="required", models=(1, 3))
    def complete(
        scope: Scope,
        *,
        weight: PerModel[Annotated[float, Between(0)]] = each(2.0),
        mode: Literal["a", "b", None] = "a",
        limit: Annotated[float, Between(high=4)],
        most: Annotated[int, Between(1, 9)] = 2,
        flag: bool = False,
        share: Fraction = 0.25,
    ) -> Steps:
        """Do ``a * b`` as `ties` does, and `complete` too.

        Formula:
            out = a
                  + b

            out = c

        A paragraph, of which
        a line starts with ``code``; and a list:

        - one
        - two ::

            literal

        When to use:
            Never.
            Use `slerp`.

        Args:
            weight: The first
                line goes on.
            mode: A list:

                - "a" is this
                - "b" is that
            limit: Less.

        Raises:
            MergeError: Always.
            ValueError: Never.

        >>> x = np.arange(
        ...     3
        ... )
        >>> x
        array([0, 1, 2])

        >>> for each in x: print(each)
        0
        1
        2
        """
        yield Gram()
        return Sum(weight)

    page = pages.page(find("complete"))
    head, cost = page.split("## Cost")
    assert (
        head
        == """\
# complete

Do `a * b` as [`ties`](ties.md) does, and `complete` too.

- Base: required
- Models: 1 to 3
- Paper: [doi.org/10.1/2](https://doi.org/10.1/2)

```text
out = a
      + b

out = c
```

A paragraph, of which
a line starts with `code`; and a list:

- one
- two:

    literal

## When to use

Never.
Use [`slerp`](slerp.md).

## Parameters

- `weight` (a number of at least 0, one for each model; default `2.0`): The first line goes on.
- `mode` (`"a"`, `"b"` or `None`; default `"a"`): A list:

  - "a" is this
  - "b" is that
- `limit` (a number of at most 4; required): Less.
- `most` (an integer in [1, 9]; default `2`)
- `flag` (`True` or `False`; default `False`)
- `share` (a number in [0, 1]; default `0.25`)
- `scope` (`"tensor"` or `"model"`; default `"tensor"`): Whether each tensor is surveyed on its own, or the whole model as one.

"""
    )
    assert (
        cost.partition("## Errors")[2]
        == """

- `MergeError`: Always.
- `ValueError`: Never.

## Example

```python
import numpy as np

x = np.arange(
    3
)
x
# array([0, 1, 2])
for each in x: print(each)
# 0
# 1
# 2
```
"""
    )
    without = pages.page(find("complete"), links=False)
    assert "](" not in without
    assert "as `ties` does" in without
    assert "- Paper: https://doi.org/10.1/2\n" in without


def test_what_looks_like_a_doctest_and_is_none_is_left_out() -> None:
    @method(paper="")
    def odd(scope: Scope) -> Sum:
        """Do it.

        >>>no blank
        """
        return Sum([1.0] * scope.models)

    assert "Example" not in pages.page(find("odd"))


def test_bars_in_a_cell_of_a_table_are_escaped() -> None:
    assert pages.in_cell("``|x|`` and `y`") == "`\\|x\\|` and `y`"


def test_the_index_and_the_readme_list_every_method_of_the_package() -> None:
    for name in pages.packaged():
        assert f"\n| [`{name}`]({name}.md) | " in pages.index()
        assert f"\n| [`{name}`](docs/methods/{name}.md) | " in pages.table("docs/methods")
    assert "| required | 1 or more | 3(K + 1) |\n" in pages.index()
