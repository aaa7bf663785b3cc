"""JAX arrays and pytrees as models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from mergekit_cl import MergeError, merge


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


def test_reading_makes_no_copy() -> None:
    from mergekit_cl.models.jax import span

    array = jnp.arange(1000.0)
    assert span(array).ctypes.data == array.unsafe_buffer_pointer()
    half = array.astype(jnp.bfloat16)
    assert span(half).ctypes.data == half.unsafe_buffer_pointer()


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
