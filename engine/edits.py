"""One change to some rows of one point: `Edit`, the scopes that choose rows, and the functions that change them.

Scope, resolve_positions, rows_in_scope    which rows
Edit                                       a point, a layer, rows, heads or neurons, and a function
check_order                                refuses edits that others leave nothing of
zeroed, times, plus, replaced_by, placed, component_set, knocked_out    what becomes of the rows
drawn                                      one of several rows for each position
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.errors import HookError, PointError, PositionError, VectorError, clipped
from engine.network import check_numbers
from engine.ops import Array, IntArray
from engine.points import POINTS, point

Scope = Literal["last", "all", "all_but_first", "prompt", "generated"] | Sequence[int]
"""Which rows: `last` is every row that emits a token (the prompt's last, then each generated one), `all_but_first` all
but position 0, `prompt` and `generated` split at the prompt's end, a list holds absolute positions, negative ones from
the prompt's end."""


def resolve_positions(positions: Iterable[int], length: int) -> list[int]:
    """Absolute positions; negative ones count from `length`, the prompt's end. Raises `PositionError`."""
    resolved = []
    for position in positions:
        absolute = position + length if position < 0 else position
        if absolute < 0:
            raise PositionError(f"position {position} is before a prompt of {length} tokens; valid: -{length} and up")
        resolved.append(absolute)
    return resolved


def rows_in_scope(scope: Scope, pos: IntArray, prompt_length: int) -> IntArray:
    """The indices of the rows of `pos` that lie in `scope`."""
    if scope == "all":
        chosen = np.ones(len(pos), bool)
    elif scope == "all_but_first":
        chosen = pos > 0
    elif scope == "last":
        chosen = pos >= prompt_length - 1
    elif scope == "prompt":
        chosen = pos < prompt_length
    elif scope == "generated":
        chosen = pos >= prompt_length
    elif isinstance(scope, str):
        raise PositionError(
            f"scope {scope!r} does not exist; use last, all, all_but_first, prompt, generated or a list"
        )
    else:
        named = {*resolve_positions(scope, prompt_length)}
        chosen = np.array([p in named for p in pos.tolist()], bool)  # np.isin takes ten times as long for short prompts
    return np.flatnonzero(chosen)


EditFunction = Callable[[Array, IntArray, IntArray | None], Array]
"""(rows (batch, rows, [heads,] ...), their positions, the keys' positions at `attn_pattern`) -> the same shape."""


@dataclass
class Edit:
    """Replace some rows (and of them some heads or neurons) at one point of one layer by a function of them.

    `fired` counts the rows it has changed; `kind` is its name in reports. `sets`: what was there before it makes no
    difference, of the whole row or, in edits that have one, along the direction `along`.
    """

    point: str
    layer: int
    function: EditFunction
    scope: Scope = "all"
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    fired: int = 0
    kind: str = "edit"
    sets: bool = False
    along: Array | None = None

    def __post_init__(self) -> None:
        if self.heads is not None and point(self.point).head_axis is None:
            raise PointError(f"{self.point} has no heads; points with heads are q, k, v, attn_pattern and z")
        if self.neurons is not None and point(self.point).axes[-1] != "d_mlp":
            raise PointError(f"{self.point} has no neurons; the point with neurons is mlp_act")

    @property
    def parts(self) -> frozenset[int | None]:
        """The heads or neurons of a row that it changes; None alone means all."""
        chosen = self.heads if self.neurons is None else self.neurons
        return frozenset([None] if chosen is None else chosen)

    @property
    def is_listed(self) -> bool:
        """Whether its scope is a list of positions."""
        return not isinstance(self.scope, str)

    def __call__(self, x: Array, pos: IntArray, key_pos: IntArray | None, prompt_length: int) -> Array | None:
        """`x` with the rows in scope changed, or None if it holds none of them."""
        rows = rows_in_scope(self.scope, pos, prompt_length)
        if not len(rows):
            return None
        where = POINTS[self.point]
        edited = x.copy()  # x may be an array that another hook returned and still holds
        if where.head_axis is None:
            edited[:, rows] = self._changed(edited[:, rows], pos[rows], key_pos)
        else:
            by_row = np.moveaxis(edited, (where.seq_axis, where.head_axis), (1, 2))  # a view: (b, s, heads, ...)
            heads = range(by_row.shape[2]) if self.heads is None else self.heads
            chosen = np.ix_(np.arange(x.shape[0]), rows, np.array(heads))
            by_row[chosen] = self._changed(by_row[chosen], pos[rows], key_pos)
        self.fired += len(rows)
        return edited

    def _changed(self, rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        made = self.function(rows, pos, key_pos)
        if self.neurons is None:
            changed = made
        else:
            changed = rows.copy()
            changed[..., self.neurons] = made[..., self.neurons]
        check_numbers(changed, f"what {self.kind} makes of {self.point}, layer {self.layer},")
        return changed


def check_order(edits: Iterable[Edit], pos: IntArray, prompt_length: int, goes_on: bool = False) -> None:
    """Raise `HookError` for an edit of rows at `pos` that later ones leave nothing of, or two rows for one place.

    Edits apply in the order listed; refused are an edit of which nothing is left, as each row (head, neuron) it changes
    is set by a later one, and two that set the same position, which both name in a list, to different things.
    `goes_on`: more rows may come than those at `pos`: the rest of a prompt, and new tokens.
    """
    places: dict[tuple[str, int], list[Edit]] = {}
    for edit in edits:
        places.setdefault((edit.point, edit.layer), []).append(edit)
    for some in places.values():
        if any(edit.sets for edit in some[1:]):
            _check_place(some, _rows_to_come(some, pos, prompt_length) if goes_on else pos, prompt_length)


def _rows_to_come(edits: Iterable[Edit], pos: IntArray, prompt_length: int) -> IntArray:
    """All of the prompt's, those that edits name, and one beyond, which stands for whatever else is generated."""
    named = [
        p for edit in edits if not isinstance(edit.scope, str) for p in resolve_positions(edit.scope, prompt_length)
    ]
    end = max(prompt_length, int(pos[-1]) + 1)
    beyond = max([end, *(p + 1 for p in named)])
    return np.array([*range(end), *sorted({p for p in named if p >= end}), beyond])


@dataclass
class _Work:
    """What an edit does: its rows' positions, and {position: heads or neurons} of what no later one has set."""

    edit: Edit
    rows: list[int]
    left: dict[int, frozenset[int | None]]


def _check_place(edits: Sequence[Edit], pos: IntArray, prompt_length: int) -> None:
    """`edits` are those of one point and layer."""
    earlier: dict[int, list[_Work]] = {}
    for edit in edits:
        rows = pos[rows_in_scope(edit.scope, pos, prompt_length)].tolist()
        work = _Work(edit, rows, dict.fromkeys(rows, edit.parts))
        for position in rows:
            others = earlier.setdefault(position, [])
            for other in others:
                _take(work, other, position)
            others.append(work)


def _take(later: _Work, earlier: _Work, position: int) -> None:
    """Take from what is left of the earlier what the later one sets at a position."""
    edit, other = later.edit, earlier.edit
    before = earlier.left.get(position, frozenset())
    if (rest := _untouched(edit, other, before)) == before:
        return
    if other.sets and edit.is_listed and other.is_listed and edit.function is not other.function:
        raise HookError(
            f"{_named(edit)} and {_named(other)} both set position {position} at {edit.point}, layer {edit.layer}: "
            "give each row to one of them"
        )
    earlier.left[position] = rest
    if not rest:
        del earlier.left[position]
    if not earlier.left:
        after = "" if other.sets and {*later.rows} <= {*earlier.rows} else ", or list the other one after it"
        raise HookError(
            f"{_named(edit)} would leave nothing of {_named(other)} at {edit.point}, layer {edit.layer}: edits apply "
            f"in the order listed, so leave one of them out{after}"
        )


def _untouched(edit: Edit, other: Edit, parts: frozenset[int | None]) -> frozenset[int | None]:
    """What `edit` does not set of some parts of a row that the other changed."""
    if not edit.sets or not (edit.along is None or _is_parallel(edit.along, other.along)):
        return parts
    return frozenset() if None in edit.parts else parts - edit.parts


def _is_parallel(one: Array, other: Array | None) -> bool:
    if other is None:
        return False
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return bool(size > 0 and abs(one @ other) > 0.9999 * size)


def _named(edit: Edit) -> str:
    """The kind of an edit, and which rows and heads it is for."""
    shown = edit.scope if isinstance(edit.scope, str) else clipped(list(edit.scope))
    heads = "" if edit.heads is None else f", heads {list(edit.heads)}"
    return f"{edit.kind} (positions {shown}{heads})"


def zeroed(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
    """An edit function: zeros."""
    return np.zeros_like(rows)


Unit = Literal["raw", "unit", "row"]
"""What alpha counts in: the vector as it is, its unit vector, or its unit vector times the norm of each row."""


def plus(vec: Array, alpha: float, unit: Unit = "raw") -> EditFunction:
    """An edit function: rows + alpha * vec, in one of the units."""
    if unit != "raw":
        vec = unit_vector(vec)
    step = number(alpha) * np.asarray(vec, np.float32)

    def function(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        _check_width(step, rows)
        added = np.linalg.norm(rows, axis=-1, keepdims=True) * step if unit == "row" else step
        out: Array = rows + added
        return out

    return function


def times(factor: float) -> EditFunction:
    """An edit function: rows * factor; 0 sets them to zero."""
    by = number(factor)
    if by == 0:
        return zeroed
    return lambda rows, pos, key_pos: rows * by


def replaced_by(row: Array) -> EditFunction:
    """An edit function: every row becomes `row`; a row without a head axis, the same in every head."""

    def function(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        return np.broadcast_to(_fitting(row, rows), rows.shape)

    return function


def knocked_out(keys: Sequence[int]) -> EditFunction:
    """An edit function for `attn_pattern`: no attention to these absolute positions; the rest is renormalised.

    Equal to minus infinity before the softmax. A row with nothing left attends to nothing.
    """

    def function(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        if key_pos is None:
            raise HookError("attention can only be knocked out at attn_pattern")
        left = rows * ~np.isin(key_pos, keys)
        total = left.sum(-1, keepdims=True)
        out: Array = np.divide(left, total, out=np.zeros_like(left), where=total > 0)
        return out

    return function


def component_set(vec: Array, component: float) -> EditFunction:
    """An edit function: the component along vec's direction becomes `component`, h += (c - h.u) u."""
    unit = unit_vector(vec)

    def function(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        _check_width(unit, rows)
        return rows + (np.float32(component) - rows @ unit)[..., None] * unit

    return function


def placed(row_of: Callable[[int], Array]) -> EditFunction:
    """An edit function: the row at position p becomes `row_of(p)`, ([heads,] width)."""

    def function(x: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        chosen = np.empty(x.shape[1:], np.float32)
        for place, p in enumerate(pos.tolist()):
            chosen[place] = _fitting(row_of(p), x)
        return np.broadcast_to(chosen, x.shape)

    return function


def drawn(pool: Array, seed: int, position: int) -> Array:
    """One row of a pool (n, [heads,] width), by the seed and the position.

    It does not depend on which rows come together, so decoding draws what one pass draws (resample ablation, Chan et
    al. 2022, "Causal scrubbing").
    """
    row: Array = pool[np.random.default_rng((seed, position)).integers(len(pool))]
    return row


def number(value: float) -> np.float32:
    """One number: an array would scale every feature by its own. Raises `HookError`."""
    if np.ndim(value) != 0:
        raise HookError(f"a factor or alpha is one number, not an array of shape {np.shape(value)}")
    return np.float32(value)


def _check_width(vec: Array, rows: Array) -> None:
    """Raise `VectorError` for a vector that numpy would stretch over the features, or over the rows."""
    if vec.shape != rows.shape[-1:]:
        raise VectorError(f"a vector of shape {vec.shape} has no place in rows of {rows.shape[-1]} features")


def _fitting(row: Array, rows: Array) -> Array:
    """A row that can take the place of each of `rows` (b, s, [heads,] width), with heads or the same in every head."""
    wanted = rows.shape[2:]
    if row.shape not in (wanted, wanted[-1:]):
        raise HookError(f"a row of shape {row.shape} cannot take the place of rows of shape {wanted}")
    return row


def unit_vector(vec: Array) -> Array:
    """Vec / |vec|; raises `VectorError` for zero."""
    length = np.linalg.norm(vec)
    if length == 0:
        raise VectorError("a zero vector has no direction")
    out: Array = vec / np.float32(length)
    return out
