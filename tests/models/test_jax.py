"""JAX arrays and pytrees as models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

from mergekit_cl import MergeError, merge
from mergekit_cl.models.jax import build, empty, span

jax.config.update("jax_num_cpu_devices", 8)  # has to be said before the first array is made


def test_arrays_and_nested_parameters() -> None:
    merged = merge([jnp.zeros((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)])
    assert isinstance(merged, jax.Array)
    assert merged.dtype == jnp.bfloat16
    assert merged.tolist() == [[0.5] * 3] * 2
    tree = {"params": {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}}
    assert jax.tree.map(lambda x: x.tolist(), merge([tree, tree])) == jax.tree.map(lambda x: x.tolist(), tree)


def test_any_pytree_keeps_its_structure() -> None:
    trees: list[Any] = [({"a": [jnp.full(2, value)]}, jnp.arange(3)) for value in (1.0, 3.0)]
    merged = merge(trees)
    assert jax.tree.structure(merged) == jax.tree.structure(trees[0])
    assert merged[0]["a"][0].tolist() == [2, 2]
    with pytest.raises(MergeError, match=r'model 1, tensor "0.a.0": shape'):
        merge([trees[0], ({"a": [jnp.ones(3)]}, jnp.arange(3))])


def test_flax_linen_and_nnx() -> None:
    dense = linen.Dense(2)
    params = [dense.init(jax.random.key(seed), jnp.ones((1, 3))) for seed in (0, 1)]
    merged = merge(params, "linear")
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *params)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-7), merged, expected))
    dense.apply(merged, jnp.ones((1, 3)))

    graph, one = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    _, two = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    state = merge([one, two])
    assert type(state) is type(one)
    model = nnx.merge(graph, state)
    np.testing.assert_allclose(model.kernel[...], (one.kernel[...] + two.kernel[...]) / 2, atol=1e-7)


def test_random_keys_are_copied() -> None:
    tree = {"w": jnp.zeros(2), "key": jax.random.key(3)}
    merged = merge([tree, {"w": jnp.ones(2), "key": jax.random.key(3)}])
    assert jax.random.key_data(merged["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    assert merged["key"].dtype == tree["key"].dtype
    with pytest.raises(MergeError, match="values differ"):
        merge([tree, {"w": jnp.ones(2), "key": jax.random.key(4)}])


def test_the_same_array_twice_stays_one() -> None:
    def tree(value: float) -> dict[str, jax.Array]:
        shared = jnp.full(2, value)
        return {"embed": shared, "head": shared}

    merged = merge([tree(1.0), tree(3.0)])
    assert merged["embed"] is merged["head"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_copied(dtype: str) -> None:
    array = jnp.arange(1000).astype(dtype).reshape(10, 100)
    assert span(array).ctypes.data == array.unsafe_buffer_pointer()
    memory = empty(array, dtype)
    memory[:] = 3
    result = build(memory, array)
    assert result.unsafe_buffer_pointer() == memory.ctypes.data
    assert result.tolist() == [[3] * 100] * 10
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)(result)  # XLA may write there, or not, but no number changes
    assert donated.tolist() == [[4] * 100] * 10


def test_results_are_where_the_first_model_is() -> None:
    here, there = jnp.ones(3), jax.device_put(jnp.ones(3), jax.devices()[5])
    assert merge([there, there]).devices() == {jax.devices()[5]}
    assert merge([there, there]).committed
    assert not merge([here, here]).committed  # it goes along with arrays on any device, as the model does


@pytest.mark.parametrize("spec", [("x", "y"), ("y",), (None, "x"), (), (("x", "y"),)], ids=str)
@pytest.mark.parametrize(("method", "parameters"), [("sfa", {"beta": 0.3}), ("slerp", {"t": 0.3})])
def test_sharded_over_devices(spec: tuple[Any, ...], method: str, parameters: dict[str, float]) -> None:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((16, 8)).astype(np.float32) for _ in range(2)]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = [jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec))) for array in arrays]
    merged = merge(sharded, method, **parameters)
    assert np.asarray(merged).tobytes() == merge(arrays, method, **parameters).tobytes()
    assert merged.sharding == sharded[0].sharding
    assert not np.array_equal(merged, arrays[0])


def test_no_copy_of_a_sharded_array_is_kept() -> None:
    """JAX would keep what `numpy.asarray` gathered beside the shards, for as long as the array lives."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.device_put(jnp.arange(64.0), NamedSharding(mesh, PartitionSpec("x")))
    assert span(array).tolist() == list(range(64))
    assert array._npy_value is None


def test_spread_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    array = jnp.arange(4.0)
    monkeypatch.setattr(type(array), "is_fully_addressable", False)
    assert merge([array, array]).tolist() == [0, 1, 2, 3]  # each process has all of it
    monkeypatch.setattr(type(array), "is_fully_replicated", False)
    with pytest.raises(MergeError, match="this process holds only a part of the array; gather it first"):
        merge([array, array])


def test_float64_needs_to_be_enabled() -> None:
    with pytest.raises(MergeError, match="jax_enable_x64"):
        merge([jnp.ones(2), jnp.ones(2)], out_dtype="float64")


def test_refused() -> None:
    array = jnp.ones(2)
    with pytest.raises(MergeError, match="JAX arrays cannot be written in place"):
        merge([array, array], out=array)
    with pytest.raises(MergeError, match=r"outside jax\.jit"):
        jax.jit(lambda x: merge([x, x]))(array)
    deleted = jnp.zeros(2)
    deleted.delete()
    with pytest.raises(MergeError, match="deleted or donated"):
        merge([array, deleted])


def test_bits_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(1000).astype(np.float32) for _ in range(2)]
    assert np.asarray(merge([jnp.asarray(a) for a in arrays], beta=0.3)).tobytes() == merge(arrays, beta=0.3).tobytes()
