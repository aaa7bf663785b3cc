"""Machine code for formulas: one loop for each part of a `Program`, of LLVM's vector instructions.

A program is cut into *stages* at its operations on rows: what the last stage computes may depend on the sums, extremes and
ranks of the stages before it, and is computed again from the inputs. A stage is a function

    int64 stage(int64 *streams, T *scalars, int64 count)

that walks through ``count`` entries, a vector register at a time; it widens, computes and rounds in registers. It returns 1
where an input or a result is not finite (the last stage).

- ``streams`` are addresses: of the inputs; of the hashes of each uniform number; of each operation `ranks`, its operand and,
  in its place, its result; of the output, or of the float64 sums of the outputs.
- ``scalars`` are the constants, the numbers of the slice, its length, and the results of reductions so far.

No instruction of these is contracted or reordered, so that all backends give the same bits. Compiling takes some ten
milliseconds, without numba, and happens once in each process for a program and the dtypes of its columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir

from mergekit_cl.formula import Program

LINE = 64
"""Bytes to which the output is aligned where it is streamed past the caches."""

_AHEAD = 2048
"""Bytes that the inputs are asked for ahead."""

_I1, _I8, _I16, _I32, _I64 = map(ir.IntType, (1, 8, 16, 32, 64))
_FLOATS = {"float16": ir.HalfType(), "float32": ir.FloatType(), "float64": ir.DoubleType()}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}
_REDUCTIONS = ("row_sum", "row_max", "row_min")
_lock = Lock()
_engines: list[Any] = []
_known: set[Any] = set()


@dataclass(frozen=True, eq=False)
class Code:
    """A compiled program."""

    stages: npt.NDArray[np.int64]
    """The address of each stage, and of a last stage for an output that is aligned and streamed past the caches (or 0)."""
    ranked: npt.NDArray[np.int64]
    """After which stage each operation `ranks` is carried out."""
    scalars: int
    """How many scalars there are."""
    width: int
    """Entries in a vector."""


def compiled(program: Program, compute: str, inputs: tuple[str, ...], output: str | None) -> Code:
    """Compile a program for inputs and an output of these dtypes; without an output it adds up the program's outputs."""
    with _lock:  # threads that need the same code wait for it
        code = _compiled(program, compute, inputs, output)
        _known.add((program, compute, inputs, output))
        return code


def known(program: Program, compute: str, inputs: tuple[str, ...], output: str | None) -> bool:
    """Whether `compiled` has been called before."""
    return (program, compute, inputs, output) in _known


@cache
def _compiled(program: Program, compute: str, inputs: tuple[str, ...], output: str | None) -> Code:
    plan = _Plan(program, compute, inputs, output)
    module = ir.Module("formula")
    names = [f"stage{level}" for level in range(plan.last + 1)]
    for level, name in enumerate(names):
        _Stage(plan, level, module, name).emit()
    if output is not None:
        names.append("streamed")
        _Stage(plan, plan.last, module, "streamed", streamed=True).emit()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2, jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as this
    addresses = [engine.get_function_address(name) for name in names]
    ranked = [plan.levels[number] - 1 for number in plan.ranks]
    return Code(
        np.array(addresses if output is not None else [*addresses, 0], np.int64), np.array(ranked, np.int64), plan.scalars,
        plan.width,
    )  # fmt: skip


class _Plan:
    """Which stage computes what, and where the results of stages are."""

    def __init__(self, program: Program, compute: str, dtypes: tuple[str, ...], output: str | None) -> None:
        self.program, self.compute, self.dtypes, self.output = program, compute, dtypes, output
        self.inputs, self.width = len(dtypes), 16 if compute == "float32" else 8
        operations = program.operations
        needed = set(program.outputs)
        for number in range(len(operations) - 1, -1, -1):
            if number in needed and not self.is_leaf(number):
                needed.update(operations[number][1])
        self.reductions: list[int] = []
        self.ranks: list[int] = []
        self.levels: list[int] = []
        for number, (name, arguments) in enumerate(operations):
            level = 0 if self.is_leaf(number) else max(self.levels[argument] for argument in arguments)
            if number in needed and self.looks_along(number):
                (self.ranks if name == "ranks" else self.reductions).append(number)
                level += 1
            self.levels.append(level)
        self.last = max((self.levels[output] for output in program.outputs), default=0)
        self.uniforms, self.constants = program.count("uniform"), program.count("constant")
        self.length = self.constants + program.count("number")
        self.scalars = self.length + 1 + len(self.reductions)

    def is_leaf(self, number: int) -> bool:
        return self.program.operations[number][0] in ("input", "constant", "uniform", "number", "length")

    def looks_along(self, number: int) -> bool:
        """Whether an operation needs all entries of a slice; where these are all the same it does not."""
        name, arguments = self.program.operations[number]
        return name in (*_REDUCTIONS, "ranks") and self.program.kinds[arguments[0]] == "entry"

    def stream(self, number: int) -> int:
        """Return the number of the stream of a leaf that has entries, or of an operation `ranks`."""
        name, arguments = self.program.operations[number]
        if name == "input":
            return arguments[0]
        if name == "uniform":
            return self.inputs + arguments[0]
        return self.inputs + self.uniforms + self.ranks.index(number)


class _Stage:
    """Emits a stage: whole vectors in a loop, and a rest whose missing entries are masked."""

    def __init__(self, plan: _Plan, level: int, module: ir.Module, name: str, streamed: bool = False) -> None:
        self.plan, self.level, self.module, self.streamed = plan, level, module, streamed
        self.scalar, self.bits, self.width = _FLOATS[plan.compute], 8 * _SIZE[plan.compute], plan.width
        self.vector, self.integers = self.of(self.scalar), self.of(ir.IntType(self.bits))
        self.function = ir.Function(module, ir.FunctionType(_I64, [_I64] * 3), name)
        set.add(self.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add() knows no such attribute
        blocks = [ir.IRBuilder(self.function.append_basic_block(name)) for name in ("before", "loop", "then", "rest", "after")]
        self.before, self.loop, self.then, self.rest, self.after = blocks
        streams, given, self.count = self.function.args
        self.streams = self.before.inttoptr(streams, _I64.as_pointer())
        self.given = self.before.inttoptr(given, self.scalar.as_pointer())
        self.pointers: dict[int, Any] = {}
        self.fixed: dict[int, Any] = {}  # vectors of what is the same for all entries
        # what the loop works on at the moment
        self.body, self.index = self.loop, self.count
        self.mask: Any = None
        self.values: dict[int, Any] = {}

    def of(self, element: Any) -> Any:
        return ir.VectorType(element, self.width)

    def emit(self) -> None:
        before, loop, then, rest, after = self.before, self.loop, self.then, self.rest, self.after
        sinks = self._sinks()
        starts = [sink[0] for sink in sinks]
        whole = before.and_(self.count, ir.Constant(_I64, -self.width))
        index = self._phi(loop, ir.Constant(_I64, 0))
        running = [self._phi(loop, start) for start in starts]
        self.index = index
        results = [sink[1](value) for sink, value in zip(sinks, running, strict=True)]
        following = loop.add(index, ir.Constant(_I64, self.width))
        for phi, value in zip([index, *running], [following, *results], strict=True):
            phi.add_incoming(value, loop.block)
        loop.cbranch(loop.icmp_signed("<", following, whole), loop.block, then.block)

        held = [self._phi(then, start) for start in starts]
        for phi, value in zip(held, results, strict=True):
            phi.add_incoming(value, loop.block)
        then.cbranch(then.icmp_signed("<", whole, self.count), rest.block, after.block)

        self.body, self.index, self.values = rest, whole, {}
        lanes = self.of(_I32)
        left = self._spread(rest, rest.trunc(rest.sub(self.count, whole), _I32))
        self.mask = rest.icmp_signed("<", ir.Constant(lanes, list(range(self.width))), left)
        lasts = [sink[1](value) for sink, value in zip(sinks, held, strict=True)]
        rest.branch(after.block)

        ends = []
        for start, value, last in zip(starts, held, lasts, strict=True):
            phi = after.phi(start.type)
            phi.add_incoming(value, then.block)
            phi.add_incoming(last, rest.block)
            ends.append(phi)
        bad = ir.Constant(_I1, 0)
        for sink, value in zip(sinks, ends, strict=True):
            found = sink[2](value)
            bad = bad if found is None else after.or_(bad, found)
        after.ret(after.zext(bad, _I64))
        before.cbranch(before.icmp_signed(">", whole, ir.Constant(_I64, 0)), loop.block, then.block)

    def _phi(self, build: ir.IRBuilder, start: Any) -> Any:
        value = build.phi(start.type)
        value.add_incoming(start, self.before.block)
        return value

    # Where results go: (what to start with, what makes of the value so far that with the next vector, what ends it)

    def _sinks(self) -> list[tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]]:
        plan = self.plan
        sinks = []
        for slot, number in enumerate(plan.reductions):
            if plan.levels[number] - 1 == self.level:
                name, (operand,) = plan.program.operations[number]
                sinks.append(self._reduction(name, operand, self._into_scalar(plan.length + 1 + slot)))
        operands = [
            (plan.program.operations[number][1][0], plan.stream(number))
            for number in plan.ranks
            if plan.levels[number] - 1 == self.level
        ]
        if operands:
            sinks.append(self._kept(operands))
        if self.level == plan.last:
            first = plan.inputs + plan.uniforms + len(plan.ranks)
            sinks.append(self._input_check())
            if plan.output is not None:
                sinks.append(self._written(plan.program.outputs[0], first, plan.output))
            else:
                sinks += [
                    self._reduction("row_sum", output, self._into_stream(first + number))
                    for number, output in enumerate(plan.program.outputs)
                ]
        return sinks

    def _reduction(self, name: str, operand: int, write: Callable[[Any], None]) -> Any:
        kind = self.of(ir.DoubleType()) if name == "row_sum" else self.vector
        start = {"row_sum": 0.0, "row_max": -np.inf, "row_min": np.inf}[name]
        neutral = ir.Constant(kind, [start] * self.width)

        def combine(build: ir.IRBuilder, one: Any, other: Any) -> Any:
            return build.fadd(one, other) if name == "row_sum" else self._extreme(build, name[4:], one, other)

        def step(so_far: Any) -> Any:
            value = self.value(operand)
            value = value if value.type == kind else self.body.fpext(value, kind)
            return combine(self.body, so_far, value if self.mask is None else self.body.select(self.mask, value, neutral))

        def end(lanes: Any) -> None:
            half = self.width
            while half > 1:  # halve the lanes, always in this order
                half //= 2
                turn = ir.Constant(self.of(_I32), [(lane + half) % self.width for lane in range(self.width)])
                lanes = combine(self.after, lanes, self.after.shuffle_vector(lanes, lanes, turn))
            write(self.after.extract_element(lanes, ir.Constant(_I32, 0)))

        return neutral, step, end

    def _into_scalar(self, place: int) -> Callable[[Any], None]:
        def write(result: Any) -> None:
            rounded = result if result.type == self.scalar else self.after.fptrunc(result, self.scalar)
            self.after.store(rounded, self.after.gep(self.given, [ir.Constant(_I64, place)]))

        return write

    def _into_stream(self, stream: int) -> Callable[[Any], None]:
        where = self.pointer(stream)
        return lambda result: self.after.store(result, self.after.inttoptr(where, ir.DoubleType().as_pointer()))

    def _kept(self, operands: Sequence[tuple[int, int]]) -> Any:
        """Write the operands of `ranks`."""

        def step(so_far: Any) -> Any:
            for operand, stream in operands:
                self.store(stream, self.value(operand))
            return so_far

        return ir.Constant(_I64, 0), step, lambda _: None

    def _input_check(self) -> Any:
        """Find the largest magnitude of the inputs, as bits."""

        def step(top: Any) -> Any:
            for column in range(self.plan.inputs):
                top = self._larger(top, self._integer(self.body, self._input(column)))
            return top

        return self._top(self.plan.compute, step)

    def _written(self, output: int, stream: int, dtype: str) -> Any:
        """Round and write the result; find its largest magnitude."""

        def step(top: Any) -> Any:
            rounded = self._rounded(self.value(output), dtype)
            self.store(stream, rounded)
            bits = self.body.bitcast(rounded, top.type)
            bits = bits if self.mask is None else self.body.select(self.mask, bits, ir.Constant(top.type, [0] * self.width))
            return self._larger(top, bits)

        return self._top(dtype, step)

    def _top(self, dtype: str, step: Callable[[Any], Any]) -> Any:
        bits = ir.IntType(8 * _SIZE[dtype])

        def end(top: Any) -> Any:
            name = f"llvm.vector.reduce.umax.v{self.width}i{bits.width}"
            return self.after.icmp_unsigned(">=", self._call(self.after, name, bits, top), ir.Constant(bits, _INFINITY[dtype]))

        return ir.Constant(self.of(bits), [0] * self.width), step, end

    def _larger(self, top: Any, bits: Any) -> Any:
        width = bits.type.element.width
        magnitude = self.body.and_(bits, ir.Constant(bits.type, [2 ** (width - 1) - 1] * self.width))
        return self.body.select(self.body.icmp_unsigned(">", magnitude, top), magnitude, top)

    # Memory

    def pointer(self, stream: int) -> Any:
        if stream not in self.pointers:
            where = self.before.gep(self.streams, [ir.Constant(_I64, stream)])
            self.pointers[stream] = self.before.load(where)
        return self.pointers[stream]

    def _at(self, stream: int, vector: Any, ahead: int = 0) -> Any:
        """Point to the vector that is worked on."""
        size = {_I16: 2, _I32: 4, ir.HalfType(): 2, ir.FloatType(): 4, ir.DoubleType(): 8}[vector.element]
        offset = self.body.mul(self.index, ir.Constant(_I64, size))
        offset = self.body.add(offset, ir.Constant(_I64, ahead)) if ahead else offset
        return self.body.inttoptr(self.body.add(self.pointer(stream), offset), vector.as_pointer()), size

    def load(self, stream: int, vector: Any) -> Any:
        where, size = self._at(stream, vector)
        if self.mask is None:
            return self.body.load(where, align=size)
        zeros = ir.Constant(vector, [0.0 if vector.element in _FLOATS.values() else 0] * self.width)
        name = f"llvm.masked.load.{_mangled(vector)}.p0"
        return self._call(self.body, name, vector, where, ir.Constant(_I32, size), self.mask, zeros)

    def store(self, stream: int, value: Any) -> None:
        where, size = self._at(stream, value.type)
        if self.mask is not None:
            name = f"llvm.masked.store.{_mangled(value.type)}.p0"
            self._call(self.body, name, ir.VoidType(), value, where, ir.Constant(_I32, size), self.mask)
            return
        stored = self.body.store(value, where, align=min(LINE, size * self.width) if self.streamed else size)
        if self.streamed:
            stored.set_metadata("nontemporal", self.module.add_metadata([ir.Constant(_I32, 1)]))

    def prefetch(self, stream: int, vector: Any) -> None:
        where, _ = self._at(stream, vector, _AHEAD)
        pointer = self.body.bitcast(where, _I8.as_pointer())
        self._call(self.body, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(_I32, each) for each in (0, 3, 1)))

    # Values

    def value(self, number: int) -> Any:
        """Return the vector of an operation's values, emitting what computes it."""
        entry = self.plan.program.kinds[number] == "entry"
        values = self.values if entry else self.fixed
        if number not in values:
            name, arguments = self.plan.program.operations[number]
            if name in ("constant", "number", "length") or (name in _REDUCTIONS and self.plan.looks_along(number)):
                values[number] = self._fixed(number, name, arguments)
            elif name == "input":
                values[number] = self._input(arguments[0])
            elif name == "uniform":
                values[number] = self._uniform(number)
            elif name == "ranks" and self.plan.looks_along(number):
                values[number] = self.load(self.plan.stream(number), self.vector)
            else:
                given = [self.value(argument) for argument in arguments]
                values[number] = self._operation(self.body if entry else self.before, name, given)
        return values[number]

    def _spread(self, build: ir.IRBuilder, value: Any) -> Any:
        vector = self.of(value.type)
        one = build.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
        return build.shuffle_vector(one, one, ir.Constant(self.of(_I32), [0] * self.width))

    def _fixed(self, number: int, name: str, arguments: tuple[int, ...]) -> Any:
        plan = self.plan
        if name == "constant":
            place = arguments[0]
        elif name == "number":
            place = plan.constants + arguments[0]
        else:
            place = plan.length if name == "length" else plan.length + 1 + plan.reductions.index(number)
        return self._spread(self.before, self.before.load(self.before.gep(self.given, [ir.Constant(_I64, place)])))

    def _input(self, column: int) -> Any:
        """Read and widen."""
        if -1 - column in self.values:
            return self.values[-1 - column]
        dtype, body = self.plan.dtypes[column], self.body
        raw = self.of(_FLOATS.get(dtype, _I16))
        value = self.load(column, raw)
        if self.mask is None:
            self.prefetch(column, raw)
        if dtype == "bfloat16":
            words = self.of(_I32)
            value = body.bitcast(
                body.shl(body.zext(value, words), ir.Constant(words, [16] * self.width)), self.of(ir.FloatType())
            )
        if value.type != self.vector:
            value = body.fpext(value, self.vector)
        self.values[-1 - column] = value
        return value

    def _uniform(self, number: int) -> Any:
        words = self.of(_I32)
        shifted = self.body.lshr(self.load(self.plan.stream(number), words), ir.Constant(words, [8] * self.width))
        return self.body.fmul(self.body.sitofp(shifted, self.vector), self.number(2.0**-24))

    def _rounded(self, value: Any, dtype: str) -> Any:
        """Round once, to nearest even; bfloat16 as integers."""
        body, float32 = self.body, self.of(ir.FloatType())
        if dtype in ("float32", "float64"):
            kind = self.of(_FLOATS[dtype])
            if value.type == kind:
                return value
            return body.fptrunc(value, kind) if dtype == "float32" else body.fpext(value, kind)
        words = self.of(_I32)

        def word(number: int) -> Any:
            return ir.Constant(words, [number] * self.width)

        if value.type != float32:  # round to odd first, see `mergekit_cl.kernels.numba.compiled`
            near = body.fptrunc(value, float32)
            back = body.fpext(near, self.vector)
            bits = body.bitcast(near, words)
            beyond = body.fcmp_ordered(">", self._magnitude(body, back), self._magnitude(body, value))
            bits = body.select(beyond, body.sub(bits, word(1)), bits)
            bits = body.select(body.fcmp_ordered("!=", back, value), body.or_(bits, word(1)), bits)
            value = body.bitcast(bits, float32)
        if dtype == "float16":
            return body.fptrunc(value, self.of(ir.HalfType()))
        bits = body.bitcast(value, words)
        odd = body.and_(body.lshr(bits, word(16)), word(1))
        rounded = body.add(bits, body.add(odd, word(0x7FFF)))
        rounded = body.select(body.fcmp_unordered("uno", value, value), body.or_(bits, word(0x400000)), rounded)
        return body.trunc(body.lshr(rounded, word(16)), self.of(_I16))

    def number(self, value: float) -> Any:
        return ir.Constant(self.vector, [value] * self.width)

    def integer(self, value: int) -> Any:
        return ir.Constant(self.integers, [value] * self.width)

    def _operation(self, build: ir.IRBuilder, name: str, given: list[Any]) -> Any:
        if name in _COMPARISONS:
            return build.fcmp_ordered(_COMPARISONS[name], *given)
        simple = {
            "add": build.fadd, "sub": build.fsub, "mul": build.fmul, "div": build.fdiv, "neg": build.fneg,
            "where": build.select, "and": build.and_, "or": build.or_, "xor": build.xor, "not": build.not_,
        }  # fmt: skip
        if name in simple:
            return simple[name](*given)
        if name in ("max", "min"):
            return self._extreme(build, name, *given)
        one = given[0]
        if name == "ne":
            return build.fcmp_unordered("!=", *given)
        if name == "float":
            return build.select(one, self.number(1.0), self.number(0.0))
        if name == "abs":
            return self._magnitude(build, one)
        if name == "copysign":
            sign = build.and_(self._integer(build, given[1]), self.integer(2 ** (self.bits - 1)))
            return self._float(build, build.or_(self._integer(build, self._magnitude(build, one)), sign))
        if name == "sqrt":
            return self._call(build, f"llvm.sqrt.v{self.width}f{self.bits}", self.vector, one)
        if name == "sign":
            zero = self.number(0.0)
            negative = build.select(build.fcmp_ordered("<", one, zero), self.number(-1.0), one)
            some = build.select(build.fcmp_ordered(">", one, zero), self.number(1.0), negative)
            return build.select(build.fcmp_ordered("==", one, zero), zero, some)
        # of what is the same for all entries of a slice
        if name == "row_sum":
            return build.fmul(one, self._fixed(-1, "length", ()))
        return self.number(0.5) if name == "ranks" else one

    def _extreme(self, build: ir.IRBuilder, name: str, one: Any, other: Any) -> Any:
        """Return the larger or smaller; NaN wins, and -0 is smaller than 0."""
        # one instruction each: of numbers that are equal the second, so that both differ in the sign of a zero alone
        sign = ">" if name == "max" else "<"
        left, right = (
            self._integer(build, build.select(build.fcmp_ordered(sign, a, b), a, b)) for a, b in ((one, other), (other, one))
        )
        both = self._float(build, build.and_(left, right) if name == "max" else build.or_(left, right))
        return build.select(build.fcmp_unordered("uno", one, other), build.fadd(one, other), both)

    def _magnitude(self, build: ir.IRBuilder, value: Any) -> Any:
        return self._float(build, build.and_(self._integer(build, value), self.integer(2 ** (self.bits - 1) - 1)))

    def _integer(self, build: ir.IRBuilder, value: Any) -> Any:
        return build.bitcast(value, self.integers)

    def _float(self, build: ir.IRBuilder, bits: Any) -> Any:
        return build.bitcast(bits, self.vector)

    def _call(self, build: ir.IRBuilder, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return build.call(self.module.globals.get(name) or ir.Function(self.module, kind, name), arguments)


def _mangled(vector: Any) -> str:
    element = {_I16: "i16", _I32: "i32", ir.HalfType(): "f16", ir.FloatType(): "f32", ir.DoubleType(): "f64"}
    return f"v{vector.count}{element[vector.element]}"
