"""`weighted_sum` for large tables: a loop written for the very columns at hand, that moves data at the speed of a copy.

`mergekit_cl.kernels.numba.compiled` serves every combination of dtypes with one function. Here the source of a loop is
generated for each combination that occurs, which costs a second of compiling once per machine and pays for itself on large
models. Four things make it fast (two cores of a Sapphire Rapids machine, of the speed of a two-thread copy, float32 and
bfloat16, 2 inputs; without them 0.66 and 0.86):

- a block of 512 bytes of every input at a time, with a constant trip count: 0.84 and 0.87 with the next,
- the result is collected in the first-level cache (so that LLVM knows that the output overlaps no input, also in place) and
  written in bursts of non-temporal stores, which do not read the memory that they overwrite (in place it has been read),
- every input is prefetched 2,048 bytes ahead: 0.90 and 1.03,
- vectors are as wide as the processor has them: 0.91 and 1.30. What is left is the speed at which a core reads memory.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mergekit_cl.kernels import Array, Table
from mergekit_cl.kernels.numba import compiled

LEAST = 1 << 22
"""Elements in a table from which on a loop of its own is compiled."""

MOST_COLUMNS = 9

_BLOCK_BYTES, _AHEAD, _LINE = 512, 2048, 64
_LOAD = {
    "bfloat16": "_float_of_bits(u32(u32({0}) << u32(16)))",
    "float16": "_float_of_half({0})",
    "float32": "{0}",
    "float64": "{0}",
}
_STORE = {
    "bfloat16": "_bfloat16_bits(_to_float32({0}))",
    "float16": "_half_of_float(_to_float32({0}))",
    "float32": "np.float32({0})",
    "float64": "np.float64({0})",
}
_RAW = {"bfloat16": "np.uint16", "float16": "np.uint16", "float32": "np.float32", "float64": "np.float64"}
_MAGNITUDE = {
    "bfloat16": "u32(u32({0}) & u32(0x7FFF))",
    "float16": "u32(u32({0}) & u32(0x7FFF))",
    "float32": "u32(_bits_of_float({0}) & u32(0x7FFFFFFF))",
    "float64": "u32(u32(0) if abs({0}) < np.inf else u32(1))",
}
_INFINITE = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 1}
_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array, nonfinite: Array) -> None:
    """See `mergekit_cl.kernels.Backend.weighted_sum`; sets ``nonfinite`` [rows]."""
    addresses = table.addresses
    in_place = bool((addresses[:, :-1] == addresses[:, -1:]).any())
    scratch = np.empty(_BLOCK_BYTES * 8 + _LINE, np.uint8)
    _loop(table.dtypes, weights.dtype.name, about, in_place)(addresses, weights, pieces, scratch, nonfinite)


@cache
def _loop(dtypes: tuple[str, ...], compute: str, about: bool, in_place: bool) -> Callable[..., None]:
    """Compile the loop for these columns; the output is the last."""
    # the digest makes numba's cache on disk forget a loop when its source, or that of a helper, has changed
    sources = b"".join(Path(module).read_bytes() for module in (__file__, compiled.__file__))
    digest = hashlib.blake2b(sources, digest_size=8).hexdigest()
    name = f"weighted_sum_{'_'.join(dtypes)}_{compute}_{about:d}{in_place:d}_{digest}"
    scope: dict[str, Any] = {
        **vars(compiled),
        "_stream": _stream,
        "_copy": _copy,
        "_address": _address,
        "_fence": _fence,
    }
    exec(compile(_source(name, dtypes, compute, about, in_place), __file__, "exec"), scope)
    loop: Callable[..., None] = compiled.compiled(scope[name])
    return loop


def _source(name: str, dtypes: tuple[str, ...], compute: str, about: bool, in_place: bool) -> str:
    """Write the loop: a head up to the first aligned line of the output, whole blocks, a tail."""
    *inputs, out = dtypes
    count = _BLOCK_BYTES // min(map(_SIZE.__getitem__, dtypes))
    terms = range(int(about), len(inputs))

    def view(target: str, size: str) -> str:
        views = [f"x{k} = carray(_pointer(a{k} + at * {_SIZE[d]}), {size}, {_RAW[d]})" for k, d in enumerate(inputs)]
        return "; ".join([*views, f"o = carray(_pointer({target}), {size}, {_RAW[out]})"])

    def element(pad: str) -> str:
        load = [f"np.{compute}({_LOAD[d].format(f'x{k}[i]')})" for k, d in enumerate(inputs)]
        lines = [f"r = {load[0]}", f"acc = np.{compute}(0.0)"] if about else [f"acc = np.{compute}(-0.0)"]
        for k in terms:
            if about:
                lines += [f"x = {load[k]}", "d = r - x", f"d = d if r != x else np.{compute}(0.0)", f"acc += w{k} * d"]
            else:
                lines += [f"acc += w{k} * {load[k]}"]
        lines += ["acc = r - acc"] if about else []
        lines += [f"v = {_STORE[out].format('acc')}", "o[i] = v", f"top = max(top, {_MAGNITUDE[out].format('v')})"]
        return "".join(f"{pad}{line}\n" for line in lines)

    destination = f"a{len(inputs)} + at * {_SIZE[out]}"
    addresses = "; ".join(f"a{k} = addresses[row, {k}]" for k in range(len(dtypes)))
    prefetch = "".join(
        f"            for ahead in range({_AHEAD}, {_AHEAD + count * _SIZE[d]}, {_LINE}):\n"
        f"                _prefetch(a{k} + at * {_SIZE[d]} + ahead)\n"
        for k, d in enumerate(inputs)
    )
    return f"""
def {name}(addresses, weights, pieces, scratch, nonfinite):
    _wide()
    held = _address(scratch)
    held += -held % {_LINE}
    for piece in range(len(pieces)):
        row, at, stop = pieces[piece]
        {addresses}
        {"; ".join(f"w{k} = weights[row, {k - int(about)}]" for k in terms)}
        top = u32(0)
        head = min(stop, at + (-({destination}) % {_LINE}) // {_SIZE[out]})
        if at < head:
            {view(destination, "head - at")}
            for i in range(head - at):
{element(" " * 16)}
            at = head
        while at + {count} <= stop:
            {view("held", str(count))}
{prefetch}
            for i in range({count}):
{element(" " * 16)}
            {"_copy" if in_place else "_stream"}({destination}, held, {count * _SIZE[out]})
            at += {count}
        if at < stop:
            {view(destination, "stop - at")}
            for i in range(stop - at):
{element(" " * 16)}
        if top >= u32({_INFINITE[out]}):
            nonfinite[row] = True
    _fence()
"""


@intrinsic
def _address(typingctx: Any, array: Any) -> Any:
    """Return the address of an array. The array must outlive its use: numba frees what is not mentioned again."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.intp(array), emit


def _copier(name: str, past_the_caches: bool) -> Any:
    """Make a function that copies ``size`` bytes (a multiple of 64) between aligned addresses."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64, byte = ir.IntType(64), ir.IntType(8).as_pointer()
        line = ir.VectorType(ir.IntType(32), 16).as_pointer()
        to, of = (builder.inttoptr(argument, byte) for argument in arguments[:2])
        before, body = builder.block, builder.append_basic_block("stream")
        after = builder.append_basic_block("streamed")
        builder.branch(body)
        builder.position_at_end(body)
        at = builder.phi(i64)
        at.add_incoming(ir.Constant(i64, 0), before)
        value = builder.load(builder.bitcast(builder.gep(of, [at]), line), align=_LINE)
        store = builder.store(value, builder.bitcast(builder.gep(to, [at]), line), align=_LINE)
        if past_the_caches:
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        following = builder.add(at, ir.Constant(i64, _LINE))
        at.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, arguments[2]), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    def typed(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
        return types.none(types.intp, types.intp, types.intp), emit

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


_stream = _copier("_stream", past_the_caches=True)
_copy = _copier("_copy", past_the_caches=False)


@intrinsic
def _fence(typingctx: Any) -> Any:
    """Make all writes visible to other threads: non-temporal ones are not ordered by themselves."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), emit
