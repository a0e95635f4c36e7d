"""`tile`: a few rows times a panel of WIDTH columns, with all sums in vector registers: what products are made of.

A tile's sums stay in registers over all its features: each feature costs a load of the panel's numbers, and for each
row a load of one number of x, whose rows are laid out feature by feature. Written in LLVM's vectors, so it is the same
text for every processor; how many rows and vectors fit the registers is looked up once. The layout follows Goto & van
de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with panels that were laid out when the weights
were read.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types as t
from numba.extending import intrinsic


def _registers() -> tuple[int, int, int]:
    """(lanes of a vector, vectors beside each other, rows): sums, panel and one number of x fill the registers."""
    if llvmlite.binding.get_host_cpu_features().get("avx512f"):
        return 16, 2, 12
    if llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64")):
        return 4, 4, 6
    return 8, 2, 6


LANES, VECTORS, ROWS = _registers()
WIDTH = LANES * VECTORS
AHEAD = 32
"""Features between what a panel's only tile reads and what it prefetches: the processor's own prefetcher stops at each
4 KiB.
"""

FEATURES = {t.float32: 1, t.uint32: 2, t.int8: 1, t.uint8: 2}
"""Of a column in a number of a panel: float32, words of bfloat16, levels, and halves of bytes."""

_FLOAT, _INT, _WORD, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
_VECTOR, _WORDS, _BYTES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _WORD, _BYTE))

_Sums = list[list[Any]]
"""Of each row, a vector for each of the panel's."""


class _Tile:
    """Emits the loop for one number of rows.

    `out_step`, in numbers, leads from row to row of the result, and `soon_step` from what one feature prefetches to
    what the next does.
    """

    def __init__(self, builder: Any, rows: int, arguments: Any, kind: Any) -> None:
        self.builder, self.rows, self.kind = builder, rows, kind
        self.x, self.w, self.out, self.out_step, self.steps, self.add, self.soon, self.soon_step, *packed = arguments
        self.scales, self.minima, self.first, self.shift = packed
        self.fma = self._named(ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32")

    def emit(self) -> None:
        """Sum up over the panel's rows, then write the sums or add them to what is there."""
        none = [[_zeros() for _ in range(VECTORS)] for _ in range(self.rows)]
        has_levels = self.kind.bitwidth == 8
        sums = self._loop(_int(0), self.steps, none, self._group if has_levels else self._step)
        with self.builder.if_else(self.add) as (adding, writing):
            with adding:
                self._store(sums, add=True)
            with writing:
                self._store(sums, add=False)

    def _loop(self, start: Any, stop: Any, given: _Sums, body: Callable[[Any, _Sums], tuple[Any, _Sums]]) -> _Sums:
        """The sums after rows `start` to `stop`, at least one: `body` adds some and says where it came to."""
        builder, before = self.builder, self.builder.block
        loop, end = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_INT)
        sums = [[builder.phi(_VECTOR) for _ in range(VECTORS)] for _ in range(self.rows)]
        then, after = body(at, sums)
        for phi, first, later in [(at, start, then), *zip(*map(_vectors, (sums, given, after)), strict=True)]:
            phi.add_incoming(first, before)
            phi.add_incoming(later, builder.block)
        builder.cbranch(builder.icmp_signed("<", then, stop), loop, end)
        builder.position_at_end(end)
        return after

    def _group(self, at: Any, sums: _Sums) -> tuple[Any, _Sums]:
        """The sums with the rest of a group more: its scales and minima stay in registers."""
        builder = self.builder
        group = builder.lshr(builder.add(self.first, at), self.shift)
        places = [builder.add(builder.mul(group, _int(WIDTH)), _int(LANES * v)) for v in range(VECTORS)]
        steps = [[self._load(builder.gep(part, [x]), _VECTOR) for x in places] for part in (self.scales, self.minima)]
        end = builder.sub(builder.shl(builder.add(group, _int(1)), self.shift), self.first)
        end = builder.select(builder.icmp_signed("<", end, self.steps), end, self.steps)
        return end, self._loop(at, end, sums, partial(self._step, scales_and_minima=list(zip(*steps, strict=True))))

    def _step(self, at: Any, sums: _Sums, scales_and_minima: Sequence[Any] = (None,) * VECTORS) -> tuple[Any, _Sums]:
        """The sums with one row of the panel more: a feature, or two that share its numbers."""
        builder, per_step = self.builder, FEATURES[self.kind]
        row_of_w = builder.gep(self.w, [builder.mul(at, _int(WIDTH))])
        self._prefetch(builder.gep(self.soon, [builder.mul(at, self.soon_step)]))
        for feature in range(per_step):  # one after the other: vectors of both beside the sums are too many for AVX2
            places = [builder.gep(row_of_w, [_int(LANES * v)]) for v in range(VECTORS)]
            panel = [self._widened(x, feature, steps) for x, steps in zip(places, scales_and_minima, strict=True)]
            after = []
            for row, before in enumerate(sums):
                self._fence()
                place = builder.add(builder.mul(at, _int(self.rows * per_step)), _int(self.rows * feature + row))
                number = self._spread(builder.load(builder.gep(self.x, [place])))
                after.append([builder.call(self.fma, [number, w, y]) for w, y in zip(panel, before, strict=True)])
            sums = after
        return builder.add(at, _int(1)), sums

    def _widened(self, place: Any, feature: int, scale_and_minimum: Any) -> Any:
        """A vector of float32: of shared numbers the lower halves are the first feature, the upper ones the second."""
        builder = self.builder
        if self.kind == t.float32:
            return self._load(place, _VECTOR)
        if self.kind == t.uint32:
            word = self._load(place, _WORDS)
            bits = builder.and_(word, _words(0xFFFF0000)) if feature else builder.shl(word, _words(16))
            return builder.bitcast(bits, _VECTOR)
        level = self._load(place, _BYTES)
        if self.kind == t.uint8:
            both = builder.zext(level, _WORDS)
            whole = builder.lshr(both, _words(4)) if feature else builder.and_(both, _words(15))
        else:
            whole = builder.sext(level, _WORDS)
        return builder.call(self.fma, [builder.sitofp(whole, _VECTOR), *scale_and_minimum])

    def _store(self, sums: list[list[Any]], add: bool) -> None:
        builder = self.builder
        for row, parts in enumerate(sums):
            for v, part in enumerate(parts):
                place = builder.gep(self.out, [builder.add(builder.mul(self.out_step, _int(row)), _int(LANES * v))])
                whole = builder.fadd(self._load(place, _VECTOR), part) if add else part
                builder.store(whole, builder.bitcast(place, _VECTOR.as_pointer())).align = 4

    def _load(self, place: Any, kind: Any) -> Any:
        loaded = self.builder.load(self.builder.bitcast(place, kind.as_pointer()))
        loaded.align = 1 if kind == _BYTES else 4
        return loaded

    def _spread(self, number: Any) -> Any:
        """The number in every lane."""
        nothing, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
        return self.builder.shuffle_vector(
            self.builder.insert_element(nothing, number, ir.Constant(_WORD, 0)), nothing, first
        )

    def _prefetch(self, numbers: Any) -> None:
        """As many as a panel has in a row."""
        byte = _BYTE.as_pointer()
        fetch = self._named(ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD]), "llvm.prefetch.p0")
        for line in range(0, WIDTH, 64 * 8 // self.kind.bitwidth):
            place = self.builder.bitcast(self.builder.gep(numbers, [_int(line)]), byte)
            self.builder.call(fetch, [place, *(ir.Constant(_WORD, n) for n in (0, 3, 1))])

    def _named(self, kind: Any, name: str) -> Any:
        """One of LLVM's intrinsic functions."""
        known = self.builder.module.globals
        return known[name] if name in known else ir.Function(self.builder.module, kind, name)

    def _fence(self) -> None:
        """No instruction, but LLVM must not load beyond it: it would load all rows first, and run out of registers."""
        nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", side_effect=True)
        self.builder.call(nothing, [])


def _int(n: int) -> Any:
    return ir.Constant(_INT, n)


def _words(n: int) -> Any:
    return ir.Constant(_WORDS, [ir.Constant(_WORD, n)] * LANES)


def _zeros() -> Any:
    return ir.Constant(_VECTOR, [0.0] * LANES)


def _vectors(sums: _Sums) -> list[Any]:
    return [vector for of_row in sums for vector in of_row]


def _tile(
    _: Any,
    rows: Any,
    x: Any,
    panels: Any,
    at: Any,
    out: Any,
    out_step: Any,
    steps: Any,
    add: Any,
    soon: Any,
    soon_step: Any,
    scales: Any,
    minima: Any,
    first: Any,
    shift: Any,
) -> Any:
    """Out (rows, WIDTH) = or += x (features, rows).T @ `steps` rows of the panels from number `at` on.

    x and out are addresses. Each row of a panel prefetches the panels' numbers from number `soon` on, the next one
    `soon_step` later; they need not exist. Levels have scales and minima in (groups, WIDTH) arrays: those of row r
    here in group `(first + r) >> shift`. Others read none.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n, x, panels, at, out, out_step, steps, add, soon, soon_step, scales, minima, first, shift = arguments
        kind = signature.args[2].dtype
        numbers, scales, minima = (
            context.make_array(signature.args[i])(context, builder, array).data
            for i, array in ((2, panels), (10, scales), (11, minima))
        )
        unit = _FLOAT if kind.bitwidth == 32 else _BYTE
        from_x, to = (builder.inttoptr(place, _FLOAT.as_pointer()) for place in (x, out))
        from_w, then = (builder.gep(builder.bitcast(numbers, unit.as_pointer()), [place]) for place in (at, soon))
        given = (from_x, from_w, to, out_step, steps, add, then, soon_step, scales, minima, first, shift)
        done = builder.append_basic_block()
        switch = builder.switch(n, done)
        for count in range(1, ROWS + 1):
            case = builder.append_basic_block()
            switch.add_case(_int(count), case)
            builder.position_at_end(case)
            _Tile(builder, count, given, kind).emit()
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    whole, address = t.int64, t.uintp
    signature = t.void(
        whole, address, panels, whole, address, whole, whole, t.boolean, whole, whole, scales, minima, whole, whole
    )
    return signature, generate


tile: Any = intrinsic(_tile)
