"""SFA, L2 and EWC in JAX training loops: what they compute, where they can stand, how they resume, what they refuse."""

import doctest
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import mergekit_cl.adapters.flax as adapter
from mergekit_cl import MergeError, MismatchError, NonFiniteError, merge
from mergekit_cl.adapters.flax import EWCState, L2State, SFAState, ewc, fisher, l2, new_task, sfa, sfa_merge
from mergekit_cl.continual.schedule import MergeSchedule

jax.config.update("jax_num_cpu_devices", 8)  # has to be said before the first array is made

Tree = dict[str, Any]
DTYPES = ["float32", "bfloat16", "float16"]


def numbers(seed: int, dtype: str = "float32") -> Tree:
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(shape), dtype) for name, shape in (("a", (33, 7)), ("b", (50,)))}


def same(one: Any, other: Any) -> bool:
    """Whether two pytrees have the same structure, dtypes and bits."""
    leaves = [jax.tree.leaves(tree) for tree in (one, other)]
    bits = [[(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in tree] for tree in leaves]
    return jax.tree.structure(one) == jax.tree.structure(other) and bits[0] == bits[1]


def trained(tx: Any, params: Any, gradients: list[Any], state: Any = None) -> tuple[Any, Any]:
    """Take steps without jit, so that every operation is rounded."""
    state = tx.init(params) if state is None else state
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def jitted(tx: Any) -> Any:
    """Compile a step that takes over the memory of its parameters and its state, as training loops do."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_docstring_examples() -> None:
    assert doctest.testmod(adapter).failed == 0


@jax.jit
def _steps_since_merge(state: SFAState) -> jax.Array:
    """Count up from an anchor of zero with beta=1: each merge brings the count back to zero."""
    tx = sfa(1.0, every=1)

    def step(carry: tuple[jax.Array, SFAState], _: None) -> tuple[tuple[jax.Array, SFAState], jax.Array]:
        count, state = carry
        update, state = tx.update(jnp.float32(1), state, count)
        return (count + update, state), count + update

    return jax.lax.scan(step, (jnp.float32(0), state), length=12)[1]


@given(every=st.integers(1, 14), total_steps=st.none() | st.integers(1, 14))
def test_merges_when_the_schedule_says(every: int, total_steps: int | None) -> None:
    counts = _steps_since_merge(sfa(1.0, every, total_steps).init(jnp.float32(0))).tolist()
    schedule = MergeSchedule(every, total_steps)
    assert [count == 0 for count in counts] == [schedule.due(step) for step in range(1, 13)]
    assert _steps_since_merge._cache_size() == 1


def test_numbers_by_hand() -> None:
    tx = optax.chain(optax.sgd(1.0), sfa(beta=0.25, every=2, total_steps=3))
    params, state, seen = jnp.float32(8), None, []
    for _ in range(5):
        params, state = trained(tx, params, [jnp.float32(4)], state)
        seen.append(float(params))
    assert seen == [4, 2, -2 * 0.75 + 2, -3.5, -7.5]  # 0.25 * 8 + 0.75 * (4 - 4); then at the end; nothing after it
    state = new_task(state, params)
    assert float(trained(tx, params, [jnp.float32(4)] * 2, state)[0]) == -7.5 * 0.25 + -15.5 * 0.75


def test_p_and_its_default() -> None:
    assert [int(sfa(0.5, p=p, total_steps=10).init(jnp.ones(1)).every) for p in (0.25, 0.4, 1.0)] == [2, 4, 10]
    assert int(sfa(total_steps=40).init(jnp.ones(1)).every) == 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_functional_merge(beta: float, dtype: str) -> None:
    params, anchor = numbers(0, dtype), numbers(1, dtype)
    params["a"] = params["a"].at[0].set(anchor["a"][0]).at[1].set(-0.0).at[2].set(0.0)
    anchor["a"] = anchor["a"].at[1].set(0.0).at[2].set(-0.0)
    eager = sfa_merge(params, anchor, beta)
    assert same(eager, merge([jax.tree.map(np.asarray, anchor), jax.tree.map(np.asarray, params)], "sfa", beta=beta))

    def expression(params: Tree, anchor: Tree) -> Any:
        def one(x: jax.Array, a: jax.Array) -> jax.Array:
            x32, a32 = x.astype(jnp.float32), a.astype(jnp.float32)
            if beta in (0, 1):
                return a if beta else x
            ref, other, weight = (a32, x32, 1 - beta) if beta >= 0.5 else (x32, a32, beta)
            return jnp.where(ref == other, ref, ref - weight * (ref - other)).astype(x.dtype)

        return jax.tree.map(one, params, anchor)

    assert same(jax.jit(partial(sfa_merge, beta=beta))(params, anchor), jax.jit(expression)(params, anchor))
    assert same(jax.tree.map(lambda x: np.asarray(x), expression(params, anchor)), eager)


def test_functional_merge_in_the_dtype_of_the_parameters() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16), "norm": jnp.ones(2), "step": jnp.arange(2), "key": jax.random.key(7)}
    anchor = {
        "w": jnp.full(3, 2, jnp.float32),
        "norm": jnp.zeros(2, jnp.bfloat16),
        "step": jnp.zeros(2, int),
        "key": jax.random.key(0),
    }
    for function in (sfa_merge, jax.jit(sfa_merge, static_argnames="beta")):
        merged = function(params, anchor, beta=0.25)
        assert merged["w"].tolist() == [1.25] * 3
        assert merged["norm"].tolist() == [0.75] * 2
        assert {name: x.dtype for name, x in merged.items()} == {name: x.dtype for name, x in params.items()}
        assert merged["step"].tolist() == [0, 1]
        assert merged["key"] == params["key"]


def test_under_jit_models_that_agree_stay_as_they_are() -> None:
    agreed = jnp.float32([jnp.inf, -jnp.inf, 0.0, -0.0, 1 / 3])
    assert same(jax.jit(sfa_merge)(agreed, agreed), agreed)
    tx = sfa(beta=0.3, every=1)
    update, _ = jax.jit(tx.update)(jnp.zeros(3), tx.init(agreed[2:]), agreed[2:])
    assert update.tolist() == [0, 0, 0]


def test_functional_merge_in_float64() -> None:
    with jax.enable_x64(True):
        params, anchor = jnp.float64([1 / 3, 2]), jnp.float64([1, 1e-12])
        expected = merge([np.asarray(anchor), np.asarray(params)], "sfa", beta=0.5)
        assert same(sfa_merge(params, anchor, 0.5), expected)
        assert same(jax.jit(sfa_merge, static_argnames="beta")(params, anchor, beta=0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_lead_to_the_merge_and_else_pass_unchanged(dtype: str) -> None:
    anchor, gradients = numbers(0, dtype), [numbers(seed, dtype) for seed in range(1, 5)]
    tx, plain = optax.chain(optax.sgd(0.5), sfa(beta=0.3, every=2)), optax.sgd(0.5)
    params, state = anchor, tx.init(anchor)
    for number, gradient in enumerate(gradients, start=1):
        before = params
        params, state = trained(tx, before, [gradient], state)
        expected, _ = trained(plain, before, [gradient])
        if number % 2 == 0:
            expected = sfa_merge(expected, anchor, beta=0.3)
        if number % 2 == 0 and dtype == "float32":
            for new, exact, old in zip(*map(jax.tree.leaves, (params, expected, before)), strict=True):
                bound = np.spacing(np.abs(exact - old)) / 2 + np.spacing(np.abs(new)) / 2
                assert (np.abs(np.float64(new) - np.float64(exact)) <= bound).all()
                assert not np.array_equal(exact, old)
        else:
            assert same(params, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jitted_steps_keep_within_the_rounding(dtype: str) -> None:
    anchor, gradients = numbers(0, dtype), [numbers(seed, dtype) for seed in range(1, 9)]
    tx = sfa(beta=0.3, every=2, total_steps=7)
    expected, _ = trained(tx, anchor, gradients)
    step, params, state = jitted(tx), jax.tree.map(jnp.copy, anchor), jax.jit(tx.init)(anchor)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    for new, exact in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        # XLA contracts to FMA in float32: a few roundings of numbers below 16; the narrow dtypes are exact
        assert np.abs(np.float64(new) - np.float64(exact)).max() <= (8 * 2.0**-20 if dtype == "float32" else 0)
    assert same(state.anchor, anchor)


def test_an_anchor_of_another_dtype() -> None:
    params = {"w": jnp.full(2, 1 + 2**-10), "step": jnp.arange(2)}
    tx = sfa(0.5, every=1, anchor_dtype=jnp.bfloat16)
    state = tx.init(params)
    assert {name: str(x.dtype) for name, x in state.anchor.items()} == {"w": "bfloat16", "step": "int32"}
    updates, state = tx.update({"w": jnp.ones(2), "step": jnp.zeros(2, int)}, state, params)
    assert optax.apply_updates(params, updates)["w"].tolist() == [1.5 + 2**-11] * 2
    assert str(new_task(state, params).anchor["w"].dtype) == "bfloat16"


def inside(name: str) -> Any:
    chain = optax.chain(optax.sgd(1.0), sfa(beta=0.5, every=2))
    return {
        "MultiSteps": optax.MultiSteps(chain, 2).gradient_transformation(),
        "masked": optax.masked(chain, {"train": True, "frozen": False}),
        "multi_transform": optax.multi_transform({"on": chain, "off": optax.set_to_zero()}, {"train": "on", "frozen": "off"}),
        "apply_if_finite": optax.apply_if_finite(chain, 5),
        "inject_hyperparams": optax.inject_hyperparams(lambda rate: optax.chain(optax.sgd(rate), sfa(0.5, every=2)))(rate=1.0),
    }[name]


def states(tree: Any, kind: type = SFAState) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


@pytest.mark.parametrize(
    ("name", "gradients", "expected", "count"),
    [
        ("MultiSteps", [1, 3, 2, 2], 6.0, 2),  # 8 - 2 - 2 = 4, half-way back to 8: two real steps
        ("masked", [2, 2], 6.0, 2),
        ("multi_transform", [2, 2], 6.0, 2),
        ("apply_if_finite", [2, math.nan, 2], 6.0, 2),  # the step that was skipped does not count
        ("inject_hyperparams", [2, 2], 6.0, 2),
    ],
)
def test_inside_other_transformations(name: str, gradients: list[float], expected: float, count: int) -> None:
    tx = inside(name)
    params = {"train": jnp.float32([8, 8]), "frozen": jnp.ones(3)}
    state, step = tx.init(params), jitted(tx)
    for gradient in gradients:
        params, state = step(params, state, {"train": jnp.float32([gradient] * 2), "frozen": jnp.zeros(3)})
    assert params["train"].tolist() == [expected] * 2
    (found,) = states(state)
    assert int(found.count) == count
    assert len(jax.tree.leaves(found.anchor)) == (1 if name in ("masked", "multi_transform") else 2)

    state = new_task(state, params)
    (found,) = states(state)
    assert int(found.count) == 0
    assert found.anchor["train"].tolist() == [expected] * 2
    params, state = step(params, state, {"train": jnp.ones(2), "frozen": jnp.zeros(3)})
    assert step._cache_size() == 1
    assert params["frozen"].tolist() == [1] * 3


def test_a_new_task_of_another_length_compiles_nothing() -> None:
    tx = optax.chain(optax.sgd(1.0), sfa(beta=1.0, p=0.5, total_steps=10))
    params, step = jnp.zeros(2), jitted(tx)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, jnp.ones(2))
    state = new_task(state, params, total_steps=4)
    assert [int(number) for number in (state[1].count, state[1].every, state[1].total_steps)] == [0, 2, 4]
    seen = []
    for _ in range(5):
        params, state = step(params, state, jnp.ones(2))
        seen.append(params.tolist()[0])
    assert seen == [-4, -3, -4, -3, -4]  # back to the anchor, -3, after steps 2 and 4
    assert step._cache_size() == 1
    assert int(new_task(state, params)[1].every) == 2


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    return jnp.square(jnp.tanh(x @ params["kernel"] + params["bias"])).mean()


def test_linen_train_state_and_remat_and_scan(tmp_path: Path) -> None:
    model, x = linen.Dense(2), jnp.arange(12.0).reshape(4, 3) / 10
    tx = optax.chain(optax.adam(0.1), sfa(beta=0.5, every=3, total_steps=7))
    start = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=tx)

    def step(state: TrainState, x: jax.Array) -> tuple[TrainState, None]:
        return state.apply_gradients(grads=jax.grad(jax.checkpoint(loss_of))(state.params, x)), None

    one = start
    for _ in range(7):
        one, _ = jax.jit(step)(one, x)
    scanned, _ = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, x), state, length=7))(start)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", one)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, one))
    assert same(restored, one)
    begun = new_task(restored, restored.params, total_steps=5)
    assert isinstance(begun, TrainState)
    assert same(begun.opt_state[1].anchor, one.params)
    assert same(begun.opt_state[0], one.opt_state[0])
    assert int(begun.opt_state[1].total_steps) == 5


def test_nnx_optimizer() -> None:
    model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.arange(12.0).reshape(4, 3) / 10
    plain, start = nnx.clone(model), nnx.state(nnx.clone(model), nnx.Param)
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.1), sfa(beta=0.25, every=2)), wrt=nnx.Param)
    alone = nnx.Optimizer(plain, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.square(model(x)).mean())(model))

    for number in range(1, 5):
        step(model, optimizer)
        step(plain, alone)
        if number % 2 == 0:
            nnx.update(plain, sfa_merge(nnx.state(plain, nnx.Param), start, beta=0.25))
    np.testing.assert_allclose(model.kernel[...], plain.kernel[...], rtol=1e-5)
    assert not np.array_equal(model.kernel[...], start["kernel"][...])

    assert new_task(optimizer, model) is optimizer
    state = nnx.as_pure(optimizer.opt_state)[1]
    assert int(state.count) == 0
    assert same(dict(state.anchor), dict(nnx.as_pure(nnx.state(model, nnx.Param))))
    step(model, optimizer)
    assert int(nnx.as_pure(optimizer.opt_state)[1].count) == 1


@pytest.mark.parametrize("merging", [partial(sfa_merge, beta=0.25), jax.jit(partial(sfa_merge, beta=0.25))], ids=["", "jit"])
def test_nnx_variables_of_any_kind(merging: Any) -> None:
    model, tx = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.chain(ewc(1.0), sfa(every=2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, nnx.Param)))
    params, anchor = nnx.state(model, nnx.Param), optimizer.opt_state[1].anchor
    pure, merged = nnx.as_pure(params), merging(params, anchor)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert same(nnx.as_pure(merged), merging(pure, nnx.as_pure(anchor)))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(x @ params["kernel"][...] + params["bias"][...]).mean()

    importance = fisher(loss, params, [jnp.ones((2, 3))])
    begun = new_task(tx.init(pure), params, fisher=importance)
    assert same(begun, new_task(tx.init(pure), pure, fisher=nnx.as_pure(importance)))
    new_task(optimizer, model, fisher=importance)
    assert same(nnx.as_pure(optimizer.opt_state)[1].anchor, pure)
    with pytest.raises(MergeError, match=r"pass the nnx\.Optimizer and its model, or nnx\.as_pure\(state\)"):
        new_task(optimizer.opt_state, params, fisher=importance)
    with pytest.raises(MismatchError, match="params has another structure"):
        new_task(begun, model, fisher=importance)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture
def spread() -> Callable[[Tree], Any]:
    """Shard matrices and vectors over a mesh of 4 by 2 devices; numbers are on all of them."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(tree: Tree) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*("x", "y")[: x.ndim]))), tree)

    return run


def sharded_numbers(seed: int, dtype: str = "float32") -> Tree:
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(shape), dtype) for name, shape in (("a", (16, 6)), ("b", (8,)))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_over_a_mesh(dtype: str, spread: Callable[[Tree], Any]) -> None:
    start, gradients = sharded_numbers(0, dtype), [sharded_numbers(seed, dtype) for seed in range(1, 6)]
    tx = sfa(beta=0.3, every=2)
    whole, shards, step = jax.tree.map(jnp.copy, start), spread(start), jitted(tx)
    of_whole, of_shards = tx.init(whole), tx.init(shards)
    for number, gradient in enumerate(gradients):
        if number == 3:
            of_whole, of_shards = new_task(of_whole, whole), new_task(of_shards, shards)
        whole, of_whole = step(whole, of_whole, gradient)
        shards, of_shards = step(shards, of_shards, spread(gradient))
        assert same(whole, shards)
    assert same(of_whole.anchor, of_shards.anchor)
    assert not same(of_whole.anchor, start)
    assert not same(of_whole.anchor, whole)
    sharding = {name: x.sharding for name, x in spread(start).items()}
    assert all({name: x.sharding for name, x in tree.items()} == sharding for tree in (shards, of_shards.anchor))

    merge_them = jax.jit(partial(sfa_merge, beta=0.3))
    assert not any(name in merge_them.lower(shards, of_shards.anchor).compile().as_text() for name in COLLECTIVES)
    assert same(merge_them(shards, of_shards.anchor), merge_them(whole, of_whole.anchor))
    eager = sfa_merge(shards, spread(start), beta=0.3)
    assert same(eager, sfa_merge(whole, start, beta=0.3))
    assert {name: x.sharding for name, x in eager.items()} == sharding


def test_no_step_communicates(spread: Callable[[Tree], Any]) -> None:
    start = sharded_numbers(0)
    tx, importance = optax.chain(l2(0.1), ewc(0.1), optax.sgd(0.1), sfa(beta=0.3, every=1)), jax.tree.map(jnp.square, start)
    params = spread(start)
    state = new_task(tx.init(params), params, fisher=spread(importance))
    compiled = jitted(tx).lower(params, state, params).compile()
    assert not any(name in compiled.as_text() for name in COLLECTIVES)
    sharding = {name: x.sharding for name, x in params.items()}
    params, state = compiled(params, state, spread(sharded_numbers(1)))
    for tree in (params, state[0].anchor, state[1].anchor, state[1].fisher, state[3].anchor):
        assert {name: x.sharding for name, x in tree.items()} == sharding
    expected, _ = trained(tx, start, [sharded_numbers(1)], new_task(tx.init(start), start, fisher=importance))
    for name in start:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_collectives_would_be_found(spread: Callable[[Tree], Any]) -> None:
    text = jax.jit(lambda tree: tree["a"].sum()).lower(spread(sharded_numbers(0))).compile().as_text()
    assert "all-reduce" in text


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_resumed_at_every_step_with_orbax(sharded: bool, tmp_path: Path, spread: Callable[[Tree], Any]) -> None:
    place = spread if sharded else lambda tree: jax.tree.map(jnp.copy, tree)
    tx = optax.chain(ewc(0.1), optax.adam(0.1), sfa(beta=0.3, p=0.4, total_steps=5))
    gradients = [place(sharded_numbers(seed)) for seed in range(1, 6)]
    params = place(sharded_numbers(0))
    state = new_task(place(tx.init(params)), params, fisher=place(jax.tree.map(jnp.square, sharded_numbers(9))))
    step = jitted(tx)
    seen = [(params, state)]
    for gradient in gradients:
        seen.append(step(*jax.tree.map(jnp.copy, seen[-1]), gradient))
    with ocp.StandardCheckpointer() as checkpointer:
        for done, there in enumerate(seen):
            checkpointer.save(tmp_path / str(done), there)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / str(done), jax.tree.map(ocp.utils.to_shape_dtype_struct, there))
            assert same(restored, there)
            assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(there)]
            params, state = restored
            for gradient in gradients[done:]:
                params, state = step(params, state, gradient)
            assert same((params, state), seen[-1])


def test_penalties_have_the_gradients_of_autograd() -> None:
    with jax.enable_x64(True):
        params, one, two, update = [jnp.float64(numbers(seed)["a"]) for seed in range(4)]
        importance = [jnp.square(jnp.float64(numbers(seed)["a"])) for seed in range(4, 6)]

        def penalty(params: jax.Array) -> Any:
            return 3.0 / 2 * sum((f * (params - a) ** 2).sum() for f, a in zip(importance, (one, two), strict=True))

        def distance(params: jax.Array) -> jax.Array:
            return 3.0 / 2 * ((params - one) ** 2).sum()

        tx = ewc(3.0)
        state = tx.init(params)
        assert same(tx.update(update, state, params)[0], update)  # nothing is known of any task yet
        for anchor, f in zip((one, two), importance, strict=True):
            state = new_task(state, anchor, fisher=f)
        got, _ = jax.jit(tx.update)(update, state, params)
        np.testing.assert_allclose(got, update + jax.grad(penalty)(params), rtol=1e-12, atol=1e-12)
        got, _ = jax.jit(l2(3.0).update)(update, l2(3.0).init(one), params)
        np.testing.assert_allclose(got, update + jax.grad(distance)(params), rtol=1e-14, atol=1e-14)


def test_penalties_by_hand_and_by_position() -> None:
    params, anchor = jnp.float32([3.0]), jnp.float32([1.0])
    first = optax.chain(l2(0.5), optax.sgd(0.1))  # 3 - 0.1 * (2 + 0.5 * 2)
    np.testing.assert_allclose(trained(first, params, [jnp.float32([2])], first.init(anchor))[0], [2.7], rtol=1e-6)
    decoupled = optax.chain(optax.scale_by_sign(), l2(0.5), optax.scale_by_learning_rate(0.1))  # 3 - 0.1 * (1 + 1)
    np.testing.assert_allclose(trained(decoupled, params, [jnp.float32([2])], decoupled.init(anchor))[0], [2.8], rtol=1e-6)
    narrow = l2(1.0).update(jnp.ones(1, jnp.bfloat16), l2(1.0).init(jnp.ones(1)), jnp.full(1, 1 + 2**-10))[0]
    assert (narrow.dtype, narrow.tolist()) == (jnp.bfloat16, [1.0])  # 1 + 2**-10, rounded once


def test_ewc_keeps_the_mean_of_the_tasks() -> None:
    state = ewc(1.0).init(jnp.zeros(3, jnp.bfloat16))
    assert (state.anchor.dtype, state.fisher.dtype) == (jnp.float32, jnp.float32)
    state = new_task(state, jnp.bfloat16([1, 1, 1]), fisher=jnp.float32([3, 0, 2]))
    state = new_task(state, jnp.bfloat16([5, 7, 1]), fisher=jnp.float32([1, 0, 0]))
    assert state.fisher.tolist() == [4, 0, 2]
    assert state.anchor.tolist() == [2, 7, 1]  # (3 * 1 + 1 * 5) / 4; nothing counts; only the first counts


def test_fisher_by_hand() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        assert batch["x"].ndim == 1  # a sample alone is a batch too
        return (params["w"] * batch["x"]).mean()

    batches = [{"x": jnp.float32([1, 3])}, {"x": jnp.float32([2, 4])}, {"x": jnp.float32([5])}]
    assert fisher(loss, {"w": jnp.ones(())}, batches)["w"] == (1 + 9 + 4 + 16 + 25) / 5
    assert fisher(loss, {"w": jnp.ones(())}, batches, per_sample=False)["w"] == np.float32((4 + 9 + 25) / 3)
    assert fisher(loss, {"w": jnp.ones((), jnp.bfloat16)}, batches)["w"].dtype == jnp.float32
    for empty in ([], [{"x": jnp.ones(0)}]):
        with pytest.raises(MergeError, match="there are no batches"):
            fisher(loss, {"w": jnp.ones(())}, empty)
    for shapes in ([(), (3,)], [(3,), (2,)]):
        with pytest.raises(MergeError) as caught:
            fisher(loss, {"w": jnp.ones(())}, [[jnp.ones(shape) for shape in shapes]])
        assert f"the arrays of a batch have the shapes {shapes[0]}, {shapes[1]}; each needs the samples" in str(caught.value)
    with pytest.raises(MergeError, match='"n" is int32; pass floating parameters alone'):
        fisher(loss, {"w": jnp.ones(()), "n": jnp.arange(2)}, batches)


def test_new_task_reaches_all_states() -> None:
    tx = optax.chain(l2(1.0), ewc(1.0), optax.adam(0.1), sfa(total_steps=8))
    state = new_task(tx.init(jnp.zeros(2)), params := jnp.ones(2), fisher=jnp.ones(2), total_steps=16)
    for kind in (L2State, EWCState, SFAState):
        assert states(state, kind)[0].anchor.tolist() == [1, 1]
    assert states(state)[0].anchor is not params
    assert int(states(state)[0].every) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.25}, "p=0.25 is a part of the task, so its length is needed"),
        ({}, "p=0.25 is a part of the task"),
        ({"p": 0.25, "every": 3, "total_steps": 4}, "both p and every"),
        ({"p": 1.5, "total_steps": 4}, r"p=1\.5: must be a fraction"),
        ({"every": 0}, "every=0: must be a whole number"),
        ({"every": 2.0}, r"every=2\.0: must be a whole number"),
        ({"every": 2, "total_steps": 0}, "total_steps=0"),
        ({"beta": 1.5, "every": 2}, r"beta=1\.5: must be a number in \[0, 1\]"),
        ({"beta": math.nan, "every": 2}, "beta=nan"),
        ({"beta": True, "every": 2}, "beta=True"),
        ({"beta": jnp.float32(0.5), "every": 2}, "beta=Array"),
        ({"every": 2, "anchor_dtype": "int8"}, 'unknown anchor_dtype "int8"'),
        ({"every": 2**31}, r"every=2147483648: steps are counted in int32"),
        ({"every": 2, "total_steps": 2**31 - 1}, "total_steps=2147483647: steps are counted in int32"),
    ],
)
def test_refused_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        sfa(**options)


@pytest.mark.parametrize("strength", [-1, math.inf, math.nan, None])
def test_refused_strengths(strength: Any) -> None:
    for penalty in (l2, ewc):
        with pytest.raises(MergeError, match=r"strength=.*: must be a finite number, at least 0"):
            penalty(strength)


@pytest.mark.parametrize("tx", [sfa(every=2), l2(1.0), ewc(1.0)], ids=["sfa", "l2", "ewc"])
def test_refused_while_tracing(tx: Any) -> None:
    params = numbers(0)
    state = tx.init(params)
    with pytest.raises(MergeError, match="needs the parameters"):
        tx.update(params, state)
    other = {"a": params["a"][:2], "c": params["b"]}
    with pytest.raises(MismatchError) as caught:
        jax.jit(tx.update)(other, state, other)
    assert 'the anchor has the shape (33, 7) for "a", but (2, 7) is needed' in str(caught.value)
    assert 'the anchor has no "c"' in str(caught.value)
    assert 'the anchor has "b", which the parameters have not' in str(caught.value)


@pytest.mark.parametrize("tx", [sfa(every=2), l2(1.0), ewc(1.0)], ids=["sfa", "l2", "ewc"])
def test_an_anchor_that_is_not_finite_is_refused_at_the_start(tx: Any) -> None:
    params = {**numbers(0), "b": jnp.float32([1, jnp.nan])}
    with pytest.raises(NonFiniteError, match='params, "b": holds NaN or Inf'):
        tx.init(params)
    assert jnp.isnan(jax.jit(tx.init)(params).anchor["b"]).tolist() == [False, True]
    assert jax.eval_shape(tx.init, params).anchor["b"].shape == (2,)


def test_refused_dtypes() -> None:
    for dtype in (jnp.float8_e4m3fn, jnp.complex64, jnp.int4):
        with pytest.raises(MergeError, match=r'"w": dtype .* cannot be merged'):
            sfa(every=2).init({"w": jnp.zeros(2, dtype)})
        with pytest.raises(MergeError, match="cannot be merged"):
            jax.jit(sfa_merge)({"w": jnp.zeros(2, dtype)}, {"w": jnp.zeros(2, dtype)})
        with pytest.raises(MergeError, match="cannot be merged"):
            sfa_merge({"w": jnp.zeros(2, dtype)}, {"w": jnp.zeros(2, dtype)})


def test_refused_merges() -> None:
    params = numbers(0)
    with pytest.raises(MismatchError, match='the anchor has no "b"'):
        sfa_merge(params, {"a": params["a"]})
    with pytest.raises(MismatchError, match="another structure"):
        sfa_merge([params["a"]], (params["a"],))
    with pytest.raises(MergeError, match='"x" is float; parameters are a pytree of arrays'):
        sfa_merge({"x": 1.0}, {"x": 1.0})
    with pytest.raises(NonFiniteError, match='params, tensor "b"'):
        sfa_merge({**params, "b": params["b"].at[3].set(jnp.nan)}, params)
    with pytest.raises(NonFiniteError, match='anchor, tensor "b"'):
        sfa_merge(params, {**params, "b": params["b"].at[3].set(jnp.inf)})
    with pytest.raises(MergeError, match="beta=2"):
        sfa_merge(params, params, 2)


def test_refused_tasks() -> None:
    params, good = numbers(0), jax.tree.map(jnp.square, numbers(1))
    both = optax.chain(ewc(1.0), sfa(every=2)).init(params)
    for state, options, message in (
        (optax.adam(0.1).init(params), {}, "none of sfa, l2 or ewc"),
        (l2(1.0).init(params), {"total_steps": 4}, "total_steps is for sfa"),
        (l2(1.0).init(params), {"fisher": good}, "fisher is for ewc"),
        (both, {}, "pass fisher="),
        (both, {"fisher": jax.tree.map(jnp.negative, good)}, "fisher is negative somewhere"),
        (both, {"fisher": {"a": good["a"]}}, 'fisher has no "b"'),
        (both, {"fisher": good, "total_steps": 0}, "total_steps=0"),
    ):
        with pytest.raises(MergeError, match=message):
            new_task(state, params, **options)
    with pytest.raises(MergeError, match="new_task: called under jit"):
        jax.jit(new_task)(both, params, fisher=good)
    with pytest.raises(MismatchError, match="params has another structure"):
        new_task(l2(1.0).init(params), {**params, "more": params["a"]})
    with pytest.raises(NonFiniteError, match='params, "a": holds NaN or Inf'):
        new_task(both, {**params, "a": params["a"].at[0].set(jnp.inf)}, fisher=good)
    with pytest.raises(NonFiniteError, match='fisher, "b": holds NaN or Inf'):
        new_task(both, params, fisher={**good, "b": good["b"].at[0].set(jnp.nan)})
    with pytest.raises(MismatchError, match=r'params has the shape \(2, 7\) for "a"'):
        new_task(both, {**params, "a": params["a"][:2]}, fisher=good)
