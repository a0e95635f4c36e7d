"""`tile`: a few rows times a panel of WIDTH columns, with all sums in vector registers: what products are made of.

A tile's sums stay in registers over all its features: each feature costs a load of the panel's numbers, and for each
row a load of one number of x, whose rows are laid out feature by feature. Written in LLVM's vectors, so it is the same
text for every processor; how many rows and vectors fit the registers is looked up once. The layout follows Goto & van
de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with panels that were laid out when the weights
were read.
"""

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

_FLOAT, _INT, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


class _Tile:
    """Emits the loop for one number of rows.

    `out_step`, in numbers, leads from row to row of the result, and `soon_step` from what one feature prefetches to
    what the next does.
    """

    def __init__(self, builder: Any, rows: int, arguments: Any, words: bool) -> None:
        self.builder, self.rows, self.words = builder, rows, words
        self.x, self.w, self.out, self.out_step, self.features, self.add, self.soon, self.soon_step = arguments
        self.fma = self._named(ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32")

    def emit(self) -> None:
        """Sum up over the features, then write the sums or add them to what is there."""
        builder, start = self.builder, self.builder.block
        loop, end = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_INT)
        sums = [[builder.phi(_VECTOR) for _ in range(VECTORS)] for _ in range(self.rows)]
        after, step = self._step(at, sums), builder.add(at, _int(1))
        for phi, first, later in [(at, _int(0), step), *((y, _zeros(), z) for y, z in _pairs(sums, after))]:
            phi.add_incoming(first, start)
            phi.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", step, self.features), loop, end)
        builder.position_at_end(end)
        with builder.if_else(self.add) as (adding, writing):
            with adding:
                self._store(after, add=True)
            with writing:
                self._store(after, add=False)

    def _step(self, at: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """The sums with one feature more, or with the two of a word."""
        builder, per_step = self.builder, 2 if self.words else 1
        row_of_w = builder.gep(self.w, [builder.mul(at, _int(WIDTH))])
        self._prefetch(builder.gep(self.soon, [builder.mul(at, self.soon_step)]))
        for feature in range(per_step):  # one after the other: vectors of both beside the sums are too many for AVX2
            panel = self._panel(row_of_w, feature)
            after = []
            for row, before in enumerate(sums):
                self._fence()
                place = builder.add(builder.mul(at, _int(self.rows * per_step)), _int(self.rows * feature + row))
                number = self._spread(builder.load(builder.gep(self.x, [place])))
                after.append([builder.call(self.fma, [number, w, y]) for w, y in zip(panel, before, strict=True)])
            sums = after
        return sums

    def _panel(self, row_of_w: Any, feature: int) -> list[Any]:
        """The vectors of a feature: of words the lower halves are the first, the upper ones the second."""
        builder = self.builder
        kind = _WORDS if self.words else _VECTOR
        loaded = [self._load(builder.gep(row_of_w, [_int(LANES * v)]), kind) for v in range(VECTORS)]
        if not self.words:
            return loaded
        low, high = (ir.Constant(_WORDS, [ir.Constant(_WORD, n)] * LANES) for n in (16, 0xFFFF0000))
        bits = [builder.and_(word, high) if feature else builder.shl(word, low) for word in loaded]
        return [builder.bitcast(number, _VECTOR) for number in bits]

    def _store(self, sums: list[list[Any]], add: bool) -> None:
        builder = self.builder
        for row, parts in enumerate(sums):
            for v, part in enumerate(parts):
                place = builder.gep(self.out, [builder.add(builder.mul(self.out_step, _int(row)), _int(LANES * v))])
                whole = builder.fadd(self._load(place, _VECTOR), part) if add else part
                builder.store(whole, builder.bitcast(place, _VECTOR.as_pointer())).align = 4

    def _load(self, place: Any, kind: Any) -> Any:
        loaded = self.builder.load(self.builder.bitcast(place, kind.as_pointer()))
        loaded.align = 4
        return loaded

    def _spread(self, number: Any) -> Any:
        """The number in every lane."""
        nothing, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
        return self.builder.shuffle_vector(
            self.builder.insert_element(nothing, number, ir.Constant(_WORD, 0)), nothing, first
        )

    def _prefetch(self, numbers: Any) -> None:
        """As many as a feature has in a panel."""
        byte = ir.IntType(8).as_pointer()
        fetch = self._named(ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD]), "llvm.prefetch.p0")
        for line in range(0, WIDTH, 16):
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


def _zeros() -> Any:
    return ir.Constant(_VECTOR, [0.0] * LANES)


def _pairs(sums: list[list[Any]], after: list[list[Any]]) -> list[tuple[Any, Any]]:
    return [pair for before, now in zip(sums, after, strict=True) for pair in zip(before, now, strict=True)]


def _tile(
    _: Any,
    rows: Any,
    x: Any,
    panels: Any,
    at: Any,
    out: Any,
    out_step: Any,
    features: Any,
    add: Any,
    soon: Any,
    soon_step: Any,
) -> Any:
    """Out (rows, WIDTH) = or += x (features, rows).T @ the panels' numbers from number `at` on: (features, WIDTH).

    x and out are addresses. Panels of words: `features` counts words. Each feature prefetches the panels' numbers from
    number `soon` on, the next one `soon_step` later; they need not exist.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n, x, panels, at, out, out_step, features, add, soon, soon_step = arguments
        numbers = context.make_array(signature.args[2])(context, builder, panels).data
        from_x, to = (builder.inttoptr(place, _FLOAT.as_pointer()) for place in (x, out))
        from_w, then = (builder.gep(builder.bitcast(numbers, _FLOAT.as_pointer()), [place]) for place in (at, soon))
        given = (from_x, from_w, to, out_step, features, add, then, soon_step)
        words = signature.args[2].dtype == t.uint32
        done = builder.append_basic_block()
        switch = builder.switch(n, done)
        for count in range(1, ROWS + 1):
            case = builder.append_basic_block()
            switch.add_case(_int(count), case)
            builder.position_at_end(case)
            _Tile(builder, count, given, words).emit()
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    whole, address = t.int64, t.uintp
    signature = t.void(whole, address, panels, whole, address, whole, whole, t.boolean, whole, whole)
    return signature, generate


tile: Any = intrinsic(_tile)
