"""A training step in JAX with SFA, L2 and EWC as optax transformations, against one without; and a merge on its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mergekit_cl.adapters.flax import ewc, l2, new_task, sfa, sfa_merge

LAYERS, WIDTH = 4, 1024


def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.square(x).mean()


def penalised(params: list[jax.Array], x: jax.Array, anchor: list[jax.Array]) -> Any:
    distance = sum(jnp.square(one - other).sum() for one, other in zip(params, anchor, strict=True))
    return loss(params, x) + 0.5e-3 * distance


@pytest.mark.parametrize("batch", [64, 512])
def test_step(batch: int, scaled: Callable[[int], int], race: Callable[..., None]) -> None:
    width = int(scaled(WIDTH**2) ** 0.5)
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    start = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[1:]]
    x = jax.random.normal(keys[0], (batch, width))

    def contender(tx: Any, in_loss: bool = False) -> Callable[[], list[jax.Array]]:
        """Make a function that takes a step, with memory of its own that it takes over each time."""
        objective = partial(penalised, anchor=start) if in_loss else loss

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = tx.update(jax.grad(objective)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        now = [jax.tree.map(jnp.copy, start), tx.init(start)]
        if any(hasattr(state, "fisher") for state in now[1]):
            now[1] = new_task(now[1], start, fisher=[jnp.ones_like(weight) for weight in start])

        def run() -> list[jax.Array]:
            now[:] = step(*now)
            return list(jax.block_until_ready(now[0]))

        return run

    adam = optax.adam(1e-3)
    contenders = {
        "SFA": contender(optax.chain(adam, sfa(0.5, every=1))),
        "plain training": contender(adam),
        "l2": contender(optax.chain(l2(1e-3), adam)),
        "L2 in the loss": contender(adam, in_loss=True),
        "ewc": contender(optax.chain(ewc(1e-3), adam)),
    }
    merged, trained, pulled, penalty, _ = (jax.tree.map(jnp.copy, run()) for run in contenders.values())
    for got, expected in ((merged, sfa_merge(trained, start, 0.5)), (pulled, penalty)):
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)

    merge_them = jax.jit(partial(sfa_merge, beta=0.5))
    contenders["sfa_merge under jit"] = lambda: jax.block_until_ready(merge_them(trained, start))
    contenders["sfa_merge"] = lambda: sfa_merge(trained, start, 0.5)
    race(contenders, rounds=40, table="flax", case={"batch": batch, "elements": LAYERS * width**2})
