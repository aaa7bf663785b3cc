"""SFA, L2 and EWC in a JAX training loop: optax transformations for Flax (nnx, linen), and functions for loops of one's own.

All of these are pure functions over pytrees, for use under ``jax.jit``, ``nnx.jit``, ``jax.lax.scan``, and with parameters that
are sharded over a mesh: anchors are sharded as the parameters are, and no step needs communication. The state lies in the
optimizer's, where checkpoints take it along.
"""

from collections.abc import Callable, Iterable
from math import inf
from numbers import Real
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from mergekit_cl.api import prepare
from mergekit_cl.continual.schedule import MergeSchedule
from mergekit_cl.dtypes import check_mergeable, dtype_name, type_of
from mergekit_cl.errors import MergeError, MismatchError, NonFiniteError, listing, unknown
from mergekit_cl.merge_methods.sfa import sequential_weights
from mergekit_cl.registry import find
from mergekit_cl.steps import Sum

Tree = TypeVar("Tree")

_NEVER = np.iinfo(np.int32).max  # the length of a task that is not known


class SFAState(struct.PyTreeNode):
    """The state of `sfa`: int32 scalars, and the anchor, a pytree like the parameters.

    ``count`` is the number of steps of the task so far, ``every`` and ``total_steps`` are the schedule's (2**31 - 1 where the
    length is not known), so that a task of another length needs no compilation. ``p`` is what `new_task` computes ``every``
    from; it is no leaf of the pytree.
    """

    count: jax.Array
    every: jax.Array
    total_steps: jax.Array
    anchor: Any
    p: float | None = struct.field(pytree_node=False)


class L2State(struct.PyTreeNode):
    """The state of `l2`: the anchor, a pytree like the parameters."""

    anchor: Any


class EWCState(struct.PyTreeNode):
    """The state of `ewc`: pytrees like the parameters, float32 (float64 for float64).

    ``fisher`` is the sum of the tasks' Fisher information, and ``anchor`` the mean of the tasks' weights by it.
    """

    fisher: Any
    anchor: Any


def sfa(
    beta: float = 0.5,
    every: int | None = None,
    total_steps: int | None = None,
    *,
    p: float | None = None,
    anchor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Sequential Fine-tuning with Averaging (Kleiman et al., https://arxiv.org/abs/2501.05559, Algorithm 1).

    While a model is trained on a task of T steps, every k = max(1, round(p * T)) steps and after step T its weights are
    averaged with the *anchor*: the weights that it had before the task, ``theta_o``::

        theta <- beta * theta_o + (1 - beta) * theta

    It must be the last transformation of a chain: it turns the update of such a step into the one that leads to the average.
    All other updates pass unchanged, and after step T nothing is merged until `new_task`. The anchor is taken by ``tx.init`` (a
    copy: parameters may be donated) and by `new_task`. A task that ends early is brought to its end by
    ``sfa_merge(params, anchor, beta)`` with the state's anchor.

    Steps are calls of ``update``: inside ``optax.MultiSteps`` the real ones. Inside ``optax.apply_if_finite`` a skipped update
    is no step; ``optax.chain(optax.apply_if_finite(...), sfa(...))`` counts it. Leaves that ``optax.masked`` or
    ``optax.multi_transform`` keep out have no anchor.

    Optimizers add ``merged - theta`` to theta, so that in float32 and float64 the result is that of `sfa_merge` but for the
    rounding of this difference and of the sum. For bfloat16 and float16 the updates are float32, and the result is exact unless
    it is smaller than theta by orders of magnitude. (``optax.apply_if_finite`` around a chain wants updates of the gradients'
    dtype: with such parameters put it inside.) Under jit XLA contracts and widens as it does in any step.

    Each step reads the anchor once. A loop of one's own that calls `sfa_merge` after the steps for which
    ``MergeSchedule.due(step)`` is true (`mergekit_cl.continual.schedule`) has exact results and pays for the merges alone.

    Under jit no error can be raised for numbers that are not finite: they are merged as they are. `sfa_merge` outside of jit
    refuses them. For methods other than SFA there is `mergekit_cl.merge`, outside of jit.

    Args:
        beta: The weight of the anchor, in [0, 1].
        every: The number k of steps between two merges, in place of p.
        total_steps: The number T of steps of the task. Without it (only with ``every``) there is no merge at the end.
        p: The part of the task between two merges, in (0, 1]; needs ``total_steps``. 0.25 where ``every`` is not given.
        anchor_dtype: A floating dtype for the anchor; that of each parameter by default.

    Returns:
        A transformation with the state `SFAState`. Its ``update`` needs the parameters.

    Raises:
        MergeError: p without ``total_steps``, both p and every, or a value out of range (steps are int32). While tracing: no
            parameters given, or one of a dtype that cannot be merged.
        MismatchError: While tracing: the anchor is of another model.
        NonFiniteError: ``tx.init`` outside of jit: a parameter holds NaN or Inf.

    >>> tx = optax.chain(optax.sgd(0.5), sfa(beta=0.5, every=2))
    >>> params = jnp.ones(1)
    >>> state = tx.init(params)
    >>> for step in range(4):
    ...     updates, state = tx.update(jnp.ones(1), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params)  # 1 - 2 * 0.5 = 0, and half-way back to the anchor
    [0.5]
    [0.5]
    [0.]
    [0.25]

    """
    _check_beta(beta)
    if p is not None and every is not None:
        raise MergeError("sfa: both p and every are given; pass one of them")
    p = 0.25 if every is None and p is None else p
    schedule = _schedule(p, every, total_steps)
    kept_as = _dtype(anchor_dtype)

    def init(params: Any) -> SFAState:
        _check_dtypes(params)
        _check_start("sfa", params)
        return SFAState(*map(jnp.int32, _numbers(schedule)), _copy(params, kept_as), p)

    def update(updates: Any, state: SFAState, params: Any = None, **_: Any) -> tuple[Any, SFAState]:
        _check_params("sfa", state.anchor, params)
        count = state.count + 1
        last = count == state.total_steps
        due = last | ((count < state.total_steps) & (count % state.every == 0))

        # Chosen entry by entry: a branch would read the anchor in steps that merge only, but XLA fuses nothing across it, and
        # would write all updates and read them back.
        def chosen(u: jax.Array, x: jax.Array, a: jax.Array) -> jax.Array:
            return jnp.where(due, _lead_to_average(u, x, a, beta), u) if _is_floating(x) else u

        updates = jax.tree.map(chosen, updates, params, state.anchor)
        return updates, state.replace(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


def sfa_merge(params: Tree, anchor: Any, beta: float = 0.5) -> Tree:
    """Average parameters with an anchor: ``beta * anchor + (1 - beta) * params``, computed in float32 or float64, rounded once.

    Outside of jit this is ``mergekit_cl.merge([anchor, params], "sfa", beta=beta)`` with results of the parameters' dtypes: the
    kernels, without a copy of the inputs, the bits of every other backend. Parameters that are sharded over several devices
    are gathered for it, and the result is sharded again; call it under jit to stay on the devices.

    Under jit (or vmap, scan, ...) it is the same formula as an expression of ``jax.numpy``, about the heavier of the two:
    ``x - w * (x - y)``, where entries that are equal keep their bits. XLA may fuse its multiplication and subtraction into one
    operation with one rounding: float32 results are then within an ulp of the difference of the others.

    Args:
        params: A pytree of arrays, ``nnx.State`` included. Leaves that are not floating (integers, keys) are handed back.
        anchor: A pytree of the same structure and shapes; its floating dtypes may be others. It does not matter in which
            nnx variables the arrays are: ``optimizer.opt_state[-1].anchor`` goes with ``nnx.state(model, nnx.Param)``.
        beta: The weight of the anchor, in [0, 1]: a number, not an array.

    Returns:
        A pytree like ``params``: its dtypes, its sharding. The arguments are left alone.

    Raises:
        MismatchError: The anchor has another structure, or a leaf of another shape.
        NonFiniteError: Outside of jit: one of the floating leaves holds NaN or Inf.
        MergeError: beta is out of range, or a floating leaf of a dtype that cannot be merged.

    >>> sfa_merge({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, beta=0.25)
    {'w': Array([0.75, 0.75], dtype=float32)}

    """
    _check_beta(beta)
    structure, params, anchor = jax.tree.structure(params), nnx.as_pure(params), nnx.as_pure(anchor)
    _check_like("sfa_merge", "the anchor", anchor, params)
    _check_dtypes({"params": params, "anchor": anchor})
    leaves, kept = jax.tree.leaves(params), jax.tree.leaves(anchor)
    if _is_traced((params, anchor)):
        merged = [_average(a, x, beta).astype(x.dtype) if _is_floating(x) else x for a, x in zip(kept, leaves, strict=True)]
    else:
        merged = _merge_eagerly(dict(zip(_named(params), zip(kept, leaves, strict=True), strict=True)), beta)
    return structure.unflatten(merged)  # type: ignore[no-any-return]


def l2(strength: float, *, anchor_dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """Pull parameters towards an anchor: adds ``strength * (theta - theta_o)`` to the updates.

    First in a chain this is the gradient of the penalty ``strength / 2 * ||theta - theta_o||^2``, without a second graph. After
    the scaling of an adaptive method, and before the learning rate's, as ``optax.add_decayed_weights`` in AdamW, it is the
    decoupled pull: ``chain(scale_by_adam(), l2(s), scale_by_learning_rate(r))``. The two are not the same but in plain SGD.
    The anchor is taken by ``tx.init`` and by `new_task`. It is L2-SP (Li et al. 2018, https://arxiv.org/abs/1802.01483) for the
    layers that are fine-tuned.

    Args:
        strength: The factor of the pull, at least 0.
        anchor_dtype: A floating dtype for the anchor; that of each parameter by default.

    Returns:
        A transformation with the state `L2State`. Its ``update`` needs the parameters, and keeps the dtype of the updates; the
        term is computed in float32 (float64 for float64).

    Raises:
        MergeError: The strength is out of range. While tracing: no parameters given.
        MismatchError: While tracing: the anchor is of another model.
        NonFiniteError: ``tx.init`` outside of jit: a parameter holds NaN or Inf.

    >>> tx = l2(0.5)
    >>> state = tx.init(jnp.ones(1))
    >>> tx.update(jnp.zeros(1), state, jnp.full(1, 3.0))[0]  # 0.5 * (3 - 1)
    Array([1.], dtype=float32)

    """
    _check_strength("l2", strength)
    kept_as = _dtype(anchor_dtype)

    def init(params: Any) -> L2State:
        _check_start("l2", params)
        return L2State(_copy(params, kept_as))

    def update(updates: Any, state: L2State, params: Any = None, **_: Any) -> tuple[Any, L2State]:
        _check_params("l2", state.anchor, params)
        return jax.tree.map(lambda u, x, a: _pulled(u, strength, x, a), updates, params, state.anchor), state

    return optax.GradientTransformationExtraArgs(init, update)


def ewc(strength: float) -> optax.GradientTransformationExtraArgs:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, equation 3).

    Adds to the updates the gradient of the penalty ``strength / 2 * sum_t F_t * (theta - theta_t)^2``: over the tasks t so far,
    with the weights ``theta_t`` after each and its diagonal Fisher information ``F_t`` (see `fisher`). Put it first in a chain;
    after the scaling of an adaptive method it is a decoupled pull, as for `l2`. There is no pull before `new_task` has brought
    the first ``F_t``. All tasks together cost two copies of the parameters: the sum of quadratic terms is one about the mean of
    the ``theta_t`` by their ``F_t``, but for a constant.

    Args:
        strength: lambda of the paper, at least 0.

    Returns:
        A transformation with the state `EWCState`. Its ``update`` needs the parameters, and keeps the dtype of the updates; the
        term is computed in float32 (float64 for float64).

    Raises:
        MergeError: The strength is out of range. While tracing: no parameters given.
        MismatchError: While tracing: the anchor is of another model.
        NonFiniteError: ``tx.init`` outside of jit: a parameter holds NaN or Inf.

    >>> tx = ewc(0.5)
    >>> state = new_task(tx.init(jnp.zeros(1)), jnp.ones(1), fisher=jnp.full(1, 4.0))
    >>> tx.update(jnp.zeros(1), state, jnp.full(1, 3.0))[0]  # 0.5 * 4 * (3 - 1)
    Array([4.], dtype=float32)

    """
    _check_strength("ewc", strength)

    def init(params: Any) -> EWCState:
        _check_start("ewc", params)
        anchor = jax.tree.map(lambda x: jnp.array(x, _compute_dtype(x), copy=True) if _is_floating(x) else x, params)
        return EWCState(jax.tree.map(jnp.zeros_like, anchor), anchor)

    def update(updates: Any, state: EWCState, params: Any = None, **_: Any) -> tuple[Any, EWCState]:
        _check_params("ewc", state.anchor, params)
        terms = jax.tree.map(lambda u, f, x, a: _pulled(u, strength * f, x, a), updates, state.fisher, params, state.anchor)
        return terms, state

    return optax.GradientTransformationExtraArgs(init, update)


def fisher(loss_fn: Callable[[Any, Any], jax.Array], params: Tree, batches: Iterable[Any], *, per_sample: bool = True) -> Tree:
    """Compute the diagonal Fisher information of a model: the mean square of the gradients of its loss.

    Args:
        loss_fn: Called with the parameters and a batch, returns the mean negative log-likelihood of the batch. With labels from
            the data this is the empirical Fisher information; sample labels from the model for the true one.
        params: A pytree of floating arrays. Of an nnx model: ``graph, params, rest = nnx.split(model, nnx.Param, ...)``, and
            ``nnx.merge(graph, params, rest)`` in ``loss_fn``.
        batches: Pytrees of arrays with a leading dimension for the samples. Batches of one shape are compiled once.
        per_sample: Whether the gradient of each sample is squared, as the Fisher information is defined: by ``jax.vmap``, which
            may take the memory of the parameters once for each sample of a batch. Else that of each batch is: less work, and a
            number that shrinks as batches grow.

    Returns:
        A pytree like ``params``, float32 (float64 for float64): the mean over all samples, or over all batches.

    Raises:
        MergeError: There are no batches; arrays of a batch without samples, or with different numbers of them, for
            ``per_sample``; a parameter that is not floating.

    >>> fisher(lambda w, x: jnp.mean(w * x), jnp.ones(()), [jnp.array([1.0, 3.0])])  # (1 + 9) / 2
    Array(5., dtype=float32)

    """
    for name, leaf in _named(nnx.as_pure(params)).items():
        if not _is_floating(leaf):
            raise MergeError(f'fisher: "{name}" is {leaf.dtype}; pass floating parameters alone, and the rest in loss_fn')

    def squares(params: Any, batch: Any) -> Any:
        gradients = jax.grad(loss_fn)(params, batch)
        return jax.tree.map(lambda g: jnp.square(g.astype(_compute_dtype(g))), gradients)

    @jax.jit
    def add(total: Any, params: Any, batch: Any) -> Any:
        if not per_sample:
            return jax.tree.map(jnp.add, total, squares(params, batch))
        alone = jax.tree.map(lambda x: x[:, None], batch)  # each sample is a batch of its own
        each = jax.vmap(squares, in_axes=(None, 0))(params, alone)
        return jax.tree.map(lambda t, s: t + s.sum(axis=0), total, each)

    total = jax.tree.map(lambda x: jnp.zeros_like(x, _compute_dtype(x)), params)
    count = 0
    for batch in batches:
        count += _count_samples(batch) if per_sample else 1
        total = add(total, params, batch)
    if not count:
        raise MergeError("fisher: there are no batches, or only empty ones; pass some of the task's data")
    return jax.tree.map(lambda t: t / count, total)  # type: ignore[no-any-return]


def new_task(state: Tree, params: Any, *, total_steps: int | None = None, fisher: Any = None) -> Tree:
    """Begin a task: the present parameters become the anchor of `sfa` and `l2`, and a further one of `ewc`.

    The states are found wherever they are: in chains, in ``MultiSteps``, ``masked``, ``multi_transform``,
    ``inject_hyperparams``. Steps of `sfa` are counted from 0 again. The rest of the optimizer's state is kept; to begin with a
    new one, pass ``tx.init(params)`` (without `ewc`, whose past tasks would be lost). The new state has the old one's shapes
    and dtypes: nothing is compiled anew. Call it outside of jit.

    Args:
        state: The state of an optimizer; a pytree that holds it, such as linen's ``TrainState``; or an ``nnx.Optimizer``, which
            is changed in place.
        params: The parameters, as ``tx.init`` had them, in nnx variables or not; for an ``nnx.Optimizer`` its model. They are
            copied.
        total_steps: The number T of steps of the new task; by default as many as of the task before.
        fisher: The Fisher information of the task that is over, a pytree like the parameters; for `ewc`, which needs it.

    Returns:
        The new state, of the same kind; or the ``nnx.Optimizer``.

    Raises:
        MergeError: There is no such state, or it lies in nnx variables without their ``nnx.Optimizer``; ``total_steps`` without
            `sfa`, ``fisher`` without `ewc` or the reverse; a Fisher information that is negative somewhere; under jit.
        MismatchError: The parameters, or the Fisher information, are of another model.
        NonFiniteError: They hold NaN or Inf.

    >>> tx = optax.chain(optax.adam(1e-3), sfa(beta=0.5, p=0.25, total_steps=100))
    >>> state = new_task(tx.init(jnp.ones(1)), jnp.zeros(1), total_steps=200)
    >>> state[1].anchor, state[1].every
    (Array([0.], dtype=float32), Array(50, dtype=int32))

    """
    if isinstance(state, nnx.Optimizer):
        begun = new_task(
            nnx.as_pure(state.opt_state), nnx.as_pure(nnx.state(params, state.wrt)), total_steps=total_steps, fisher=fisher
        )
        nnx.update(state.opt_state, nnx.state(begun))
        return state
    if any(map(_is_variable, jax.tree.leaves(state, is_leaf=_is_variable))):
        raise MergeError("new_task: the state is in nnx variables; pass the nnx.Optimizer and its model, or nnx.as_pure(state)")
    params, fisher = nnx.as_pure(params), nnx.as_pure(fisher)
    if _is_traced((state, params, fisher)):
        raise MergeError("new_task: called under jit (or vmap, scan, ...); call it outside, between two steps")
    kinds = (SFAState, L2State, EWCState)
    nodes, structure = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, kinds))
    found = [node for node in nodes if isinstance(node, kinds)]
    _check_task(found, total_steps, fisher)
    for node in found:
        _check_like("new_task", "params", params, node.anchor, partly=True)
        if isinstance(node, EWCState):
            _check_like("new_task", "fisher", fisher, node.fisher, partly=True)
    _check_finite("new_task: params", params)
    if fisher is not None:
        _check_finite("new_task: fisher", fisher)
        if not all(bool((f >= 0).all()) for f in jax.tree.leaves(fisher) if _is_floating(f)):
            raise MergeError("new_task: fisher is negative somewhere; pass squares of gradients, as fisher() returns them")
    return structure.unflatten(  # type: ignore[no-any-return]
        [_begun(node, params, total_steps, fisher) if isinstance(node, kinds) else node for node in nodes]
    )


def _count_samples(batch: Any) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise MergeError(
            f"fisher: the arrays of a batch have the shapes {', '.join(map(str, shapes))}; each needs the samples as its first "
            "dimension: pass what they share in loss_fn, or per_sample=False"
        )
    return int(shapes[0][0])


def _begun(state: SFAState | L2State | EWCState, params: Any, total_steps: int | None, fisher: Any) -> Any:
    """Return a state with the parameters as its anchor."""
    if isinstance(state, EWCState):
        total = _masked_map(lambda f, new: f + new.astype(f.dtype) if _is_floating(f) else f, state.fisher, fisher)
        anchor = _masked_map(_centre, state.anchor, total, fisher, params)
        return EWCState(total, anchor)
    anchor = _masked_map(lambda a, x: jnp.array(x, a.dtype, copy=True), state.anchor, params)
    if isinstance(state, L2State):
        return L2State(anchor)
    if total_steps is None:
        return state.replace(count=jnp.zeros_like(state.count), anchor=anchor)
    schedule = _schedule(state.p, int(state.every), total_steps)
    old = (state.count, state.every, state.total_steps)
    return SFAState(*map(jnp.full_like, old, _numbers(schedule)), anchor, state.p)


def _centre(anchor: jax.Array, total: jax.Array, fisher: jax.Array, params: jax.Array) -> jax.Array:
    """Move the mean of the tasks' weights towards those of a new task; where nothing counts yet, all the way."""
    if not _is_floating(params):
        return anchor
    part = jnp.where(total > 0, fisher.astype(total.dtype) / jnp.where(total > 0, total, 1), 1)
    return anchor + part * (params.astype(anchor.dtype) - anchor)


def _masked_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Map over pytrees; what is masked in the first is left as it is, whatever the others have there."""
    return jax.tree.map(lambda x, *ys: x if _is_masked(x) else function(x, *ys), tree, *others, is_leaf=_is_masked)


def _lead_to_average(update: jax.Array, params: jax.Array, anchor: jax.Array, beta: float) -> jax.Array:
    """Return the update that leads from the parameters to the average of the anchor with what the given update leads to."""
    wide = _sum_dtype(update, params)
    trained = (params.astype(wide) + update.astype(wide)).astype(params.dtype)
    merged = _average(anchor, trained, beta).astype(params.dtype)
    return merged.astype(wide) - params.astype(wide)


def _average(anchor: jax.Array, params: jax.Array, beta: float) -> jax.Array:
    """Compute what the kernels do, in the dtype that they do it in."""
    compute = jnp.promote_types(_compute_dtype(anchor), _compute_dtype(params))
    terms = Sum(sequential_weights(beta, 2)).terms(np.dtype(compute))
    models = anchor.astype(compute), params.astype(compute)
    if terms.reference is None:  # beta is 0 or 1
        return models[terms.sources[0]]
    x, y = models[terms.reference], models[terms.sources[0]]
    return jnp.where(x == y, x, x - terms.weights[0] * (x - y))


def _pulled(update: jax.Array, factor: Any, params: jax.Array, anchor: jax.Array) -> jax.Array:
    """Add the gradient of ``factor / 2 * (params - anchor)**2``."""
    if not _is_floating(params):
        return update
    compute = jnp.promote_types(_sum_dtype(update, params), anchor.dtype)
    difference = params.astype(compute) - anchor.astype(compute)
    return (update.astype(compute) + factor * difference).astype(update.dtype)


def _merge_eagerly(pairs: dict[str, tuple[Any, Any]], beta: float) -> list[Any]:
    """Merge pairs of anchor and parameter through the kernels, those of one dtype at a time."""
    merged = {name: x for name, (_, x) in pairs.items() if not _is_floating(x)}
    for dtype in dict.fromkeys(x.dtype for name, (_, x) in pairs.items() if name not in merged):
        names = [name for name, (_, x) in pairs.items() if x.dtype == dtype]
        executor, _ = prepare(
            find("sfa"), [{name: pairs[name][number] for name in names} for number in (0, 1)], None, None,
            out_dtype=dtype, parameters={"beta": beta}, labels=["anchor", "params"],
        )  # fmt: skip
        merged |= executor.run()
    return [merged[name] for name in pairs]


def _copy(params: Any, dtype: Any) -> Any:
    """Copy parameters, the floating ones as another dtype: what is donated to a step must not be the anchor's memory too."""
    return jax.tree.map(lambda x: jnp.array(x, dtype if _is_floating(x) else None, copy=True), params)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _compute_dtype(leaf: Any) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _sum_dtype(update: Any, params: Any) -> Any:
    return jnp.promote_types(_compute_dtype(update), params.dtype)


def _dtype(anchor_dtype: Any) -> Any:
    name = None if anchor_dtype is None else dtype_name(anchor_dtype)
    if name is not None and name not in type_of:
        raise unknown("anchor_dtype", name, type_of)
    return name


def _schedule(p: float | None, every: int | None, total_steps: int | None) -> MergeSchedule:
    if p is None:
        assert every is not None
        schedule = MergeSchedule(every, total_steps)
    elif total_steps is None:
        raise MergeError(f"sfa: p={p} is a part of the task, so its length is needed: pass total_steps, or every in place of p")
    else:
        schedule = MergeSchedule.from_fraction(p, total_steps)
    for name, steps in (("every", schedule.every), ("total_steps", schedule.total_steps)):
        if steps is not None and steps >= _NEVER:
            raise MergeError(f"sfa: {name}={steps}: steps are counted in int32; it must be below {_NEVER}")
    return schedule


def _numbers(schedule: MergeSchedule) -> tuple[int, int, int]:
    """Return ``count``, ``every`` and ``total_steps`` of a task that begins."""
    return 0, schedule.every, _NEVER if schedule.total_steps is None else schedule.total_steps


def _named(tree: Any) -> dict[str, Any]:
    """List the leaves of a pytree by name."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    strange = [
        f'"{name}" is {type(leaf).__name__}' for name, leaf in named.items() if not isinstance(leaf, jax.Array | np.ndarray)
    ]
    if len(named) < len(paths):
        strange.append("two leaves have the same name")
    if strange:
        raise MergeError(f"{strange[0]}; parameters are a pytree of arrays")
    return named


def _check_beta(beta: Any) -> None:
    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= float(beta) <= 1:
        raise MergeError(f"beta={beta!r}: must be a number in [0, 1]")


def _check_strength(where: str, strength: Any) -> None:
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= float(strength) < inf:
        raise MergeError(f"{where}: strength={strength!r}: must be a finite number, at least 0")


def _check_dtypes(params: Any) -> None:
    for name, leaf in _named(params).items():
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # a key, say
            check_mergeable(dtype_name(leaf.dtype), f'"{name}"')


def _check_params(where: str, anchor: Any, params: Any) -> None:
    """Check, while tracing, the parameters that an optimizer passes."""
    if params is None:
        raise MergeError(f"{where}: needs the parameters: call tx.update(grads, state, params)")
    _check_like(where, "the anchor", anchor, params)


def _check_like(where: str, what: str, tree: Any, like: Any, partly: bool = False) -> None:
    """Refuse a pytree that lacks leaves of another, or has them in other shapes; or has more of them, unless ``partly``."""
    have, want = _named(tree), _named(like)
    problems = [
        f'{where}: {what} has no "{name}"' if name not in have
        else f'{where}: {what} has the shape {have[name].shape} for "{name}", but {leaf.shape} is needed'
        for name, leaf in want.items() if name not in have or have[name].shape != leaf.shape
    ]  # fmt: skip
    if not partly:
        problems += [f'{where}: {what} has "{name}", which the parameters have not' for name in have if name not in want]
    if not problems and not (_is_laid_out_as(tree, like) if partly else jax.tree.structure(tree) == jax.tree.structure(like)):
        problems.append(f"{where}: {what} has another structure, {jax.tree.structure(tree)}, than {jax.tree.structure(like)}")
    if problems:
        raise MismatchError(listing([*problems, "pass what belongs to this model"]))


def _is_laid_out_as(tree: Any, like: Any) -> bool:
    """Whether a pytree has the structure of another, but for what is masked there."""
    try:
        jax.tree.structure(like, is_leaf=_is_masked).flatten_up_to(tree)
    except ValueError:
        return False
    return True


def _check_task(found: list[Any], total_steps: int | None, fisher: Any) -> None:
    kinds = {type(state) for state in found}
    if not found:
        raise MergeError(
            "new_task: the state holds none of sfa, l2 or ewc; pass the state of an optimizer that has one of them"
        )
    if total_steps is not None and SFAState not in kinds:
        raise MergeError("new_task: total_steps is for sfa, which is not in the state; leave it away")
    if fisher is None and EWCState in kinds:
        raise MergeError("new_task: ewc needs the Fisher information of the task that is over; pass fisher=")
    if fisher is not None and EWCState not in kinds:
        raise MergeError("new_task: fisher is for ewc, which is not in the state; leave it away")


def _check_start(where: str, params: Any) -> None:
    """Refuse an anchor that is not finite, where that can be known."""
    if not _is_traced(params):
        _check_finite(f"{where}: params", params)


def _check_finite(where: str, tree: Any) -> None:
    finite = {name: jnp.isfinite(leaf).all() for name, leaf in _named(tree).items() if _is_floating(leaf)}
    wrong = [f'{where}, "{name}": holds NaN or Inf; nothing was changed' for name, good in finite.items() if not good]
    if wrong:
        raise NonFiniteError(listing(wrong))
