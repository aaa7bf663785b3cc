"""Learn to read digits the right way up, then turned by 90 degrees, without forgetting the first: SFA with Flax and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mergekit_cl.adapters.flax import sfa
from mergekit_cl.demo import rotated_digits

STEPS = 150


@nnx.jit
def learn(model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, digits: jax.Array) -> None:
    """Take a step of the optimizer; on some steps it leads to the average with the weights from before the task."""

    def loss(model: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), digits).mean()

    optimizer.update(model, nnx.grad(loss)(model))


fields = ("train_images", "train_digits", "test_images", "test_digits")
tasks = [[jnp.asarray(getattr(task, field).numpy()) for field in fields] for task in rotated_digits(seed=0)[:2]]
rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(784, 256, rngs=rngs), nnx.relu, nnx.Linear(256, 10, rngs=rngs))
random = np.random.default_rng(0)

for number, (images, digits, _, _) in enumerate(tasks):
    tx = optax.adam(1e-3)
    if number:  # there is something to forget from the second task on
        tx = optax.chain(tx, sfa(beta=0.5, p=0.25, total_steps=STEPS))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(STEPS):
        batch = random.integers(len(images), size=64)
        learn(model, optimizer, images[batch], digits[batch])
    scores = [(model(test).argmax(axis=1) == truth).mean() for _, _, test, truth in tasks]
    print(f"after task {number + 1}:", *(f"task {i + 1} {accuracy:.3f}" for i, accuracy in enumerate(scores)))
