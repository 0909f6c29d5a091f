"""The softmax over a table of words that is never gathered: a tile of its rows at a time, for all positions that have a target.

The table is stored sharded over ``fsdp``. Each tile of V / T rows is gathered, contracted with the hidden states, B · ``chunk`` positions
at a time, and left again; the backward pass does the same once more and scatters the tile's gradient at once. So of the table a device
holds one tile in the compute type, one tile's gradient, and logits ``[B · chunk, V / T]``. Communication is what gathering the table twice
and reducing its gradient once would take, whatever the number of tiles and of positions.

A frozen table (adapters) is walked once: with the normaliser log Σ exp goes its gradient by the hidden state, the mean row under the
softmax, summed as attention sums values; whatever the loss, its gradient is that row and the target's, weighted.

A device's rows have their targets where they may: the positions of all of them form one list with the targets in front, which is walked
to its last target. The work follows the number of targets, not the row that has most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.errors import ConfigError
from instructrec_jax.models.heads import spaces_of
from instructrec_jax.models.sharding import BATCH, RULES

_NONE = -1e30  # a logit without probability


class Scores(NamedTuple):
    """What a cross-entropy needs of a position, float32; 0 where it has no target."""

    chosen: Float[Array, "B S"]  # the target's logit
    normaliser: Float[Array, "B S"]  # log Σ exp of all logits


class _Plan(NamedTuple):
    """What is static."""

    count: int  # real rows; those behind only pad the table
    softcap: float
    tiles: int
    chunk: int
    learns: bool  # whether anybody asks for the table's gradient
    spaces: tuple[
        int, ...
    ] = ()  # where each of several tables in one ends: a target is scored among the rows of its own


def check_tiles(rows: int, tiles: int, tensor: int) -> None:
    """Refuse tiles that do not divide.

    Raises:
        ConfigError: naming the nearest number that does.
    """
    if rows % (tiles * tensor):
        nearest = max(n for n in range(1, tiles + 1) if rows % (n * tensor) == 0)
        raise ConfigError(
            f"the word table's {rows:,} rows do not divide into train.vocab_tiles = {tiles}"
            + (f" on each of {tensor} devices along tensor" if tensor > 1 else ""),
            remedy=f"the nearest number that divides them is {nearest}",
        )


def table_scores(
    hidden: Float[Array, "B S D"],
    target: Int[Array, "B S"],
    table: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    *,
    count: int,
    softcap: float,
    tiles: int,
    chunk: int,
    learns: bool,
    spaces: tuple[int, ...] = (),
) -> Scores:
    """The target's logit and the normaliser of softmax(table · h + bias), for positions whose target (row + 1) is not 0.

    Differentiable in ``hidden``, ``table`` and ``bias``. The time is that of a device's positions with a target.

    Args:
        hidden: in the compute type, in which the products are taken; their sums are float32.
        target: row + 1; 0 = none.
        table: float32 or bfloat16, as stored (``RULES.table_vd``) or gathered.
        bias: of the logits.
        count: real rows.
        softcap: cap · tanh(logits / cap), before the softmax; 0 = none.
        tiles: parts of the table.
        chunk: positions of every row, on average, whose logits exist at one time; divides S.
        learns: False where the table is frozen: its gradient is not computed.
        spaces: as of ``Sizes``.
    """
    chunk = min(chunk, target.shape[1])
    if target.shape[1] % chunk:
        raise ValueError(
            f"train.sequence_length = {target.shape[1]} must be a multiple of train.logits_chunk = {chunk}"
        )
    plan = _Plan(count, softcap, tiles, chunk, learns, spaces)
    return Scores(*_scores(plan, hidden, target, jax.reshard(table, RULES.table_vd), bias))


_ROWS = P(BATCH, None)


def _manual(f: Callable, outs: Any) -> Callable:
    """``f`` on each device's own part."""

    def call(hidden: jax.Array, target: jax.Array, table: jax.Array, bias: jax.Array | None, *more: jax.Array) -> Any:
        ins = (RULES.act_bsd, _ROWS, RULES.table_vd, None if bias is None else RULES.vector_v, *(_ROWS for _ in more))
        return jax.shard_map(f, in_specs=ins, out_specs=outs, check_vma=False)(hidden, target, table, bias, *more)

    return call


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(plan: _Plan, *given: Any) -> tuple[jax.Array, jax.Array]:
    return _manual(partial(_forward_local, plan), (_ROWS, _ROWS))(*given)


def _forward(plan: _Plan, *given: Any) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    if _once(plan, given[3]):
        outs = (_ROWS, _ROWS, RULES.act_bsd, RULES.act_bsd)
        chosen, normaliser, own, mean = _manual(partial(_forward_local, plan, rows=True), outs)(*given)
        return (chosen, normaliser), (*given, own, mean)
    chosen, normaliser = _scores(plan, *given)
    return (chosen, normaliser), (*given, normaliser)


def _once(plan: _Plan, bias: jax.Array | None) -> bool:
    """Whether the forward pass finds all that the backward pass needs."""
    return not plan.learns and bias is None and not plan.softcap


def _backward(plan: _Plan, kept: tuple, change: tuple[jax.Array, jax.Array]) -> tuple:
    hidden, target, table, bias, *found = kept
    if _once(plan, bias):
        by_chosen, by_normaliser = (by[..., None] for by in change)
        own, mean = found
        return (by_chosen * own + by_normaliser * mean).astype(hidden.dtype), None, None, None
    (normaliser,) = found
    outs = (RULES.act_bsd, RULES.table_vd if plan.learns else None, None if bias is None else RULES.vector_v)
    by_hidden, by_table, by_bias = _manual(partial(_backward_local, plan), outs)(
        hidden, target, table, bias, normaliser, *change
    )
    return by_hidden, None, by_table, by_bias


_scores.defvjp(_forward, _backward)


# --------------------------------------------------------------------------------------------------------- on each device

_SMALLEST = 128  # positions that a matrix unit takes at once


class _Front(NamedTuple):
    """The positions of all rows of a device as one list [N], those with a target first."""

    order: Int[Array, " N"]  # position b · S + s of each place of the list
    place: Int[Array, " N"]  # of each position that has a target
    real: Bool[Array, " N"]  # which have one
    count: Int[Array, ""]  # how many have

    @classmethod
    def of(cls, target: Int[Array, "B S"]) -> _Front:
        real = target.reshape(-1) > 0
        upto = jnp.cumsum(real, dtype=jnp.int32)
        return cls(jnp.argsort(~real, stable=True), jnp.maximum(upto - 1, 0), real, upto[-1])

    def listed(self, x: Float[Array, "B S ..."]) -> Float[Array, "N ..."]:
        return _rows(x.reshape(-1, *x.shape[2:]), self.order)

    def in_rows(self, x: Float[Array, "N ..."], rows: int) -> Float[Array, "B S ..."]:
        """The inverse of ``listed``, with 0 where there is no target."""
        own = jnp.where(self.real.reshape(-1, *(1,) * (x.ndim - 1)), _rows(x, self.place), 0)
        return own.reshape(rows, -1, *x.shape[1:])

    def walk(self, plan: _Plan, rows: int, visit: Callable[[Callable, Callable, Any], Any], so_far: Any) -> Any:
        """``visit(cut, put, so_far)`` for parts of the list, until all targets are seen.

        ``cut(x)`` is the part of a list and ``put(x, part)`` the list with another part. Parts are of ``plan.chunk`` positions of every
        row; what is left is seen in smaller ones, for there may be few targets in all.
        """
        large = rows * plan.chunk
        small = large // next(n for n in (8, 4, 2, 1) if n == 1 or (large % n == 0 and large // n >= _SMALLEST))
        # A part that is the whole list would be the same in every round: compilers take it out of the loop, which then costs it always.
        whole = self.count // large if small < large < self.order.size else 0
        rest = -(-(self.count - whole * large) // small)
        for size, first, number in ((large, 0, whole), (small, whole * large, rest)):

            def part(k: jax.Array, so_far: Any, size: int = size, first: Any = first) -> Any:
                at = first + k * size
                return visit(
                    lambda x: jax.lax.dynamic_slice_in_dim(x, at, size),
                    lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0),
                    so_far,
                )

            if isinstance(number, jax.Array):
                so_far = jax.lax.fori_loop(0, number, part, so_far)
        return so_far


class _Tile(NamedTuple):
    """Some rows of the table, gathered."""

    first: jax.Array  # their number in the whole table
    rows: Float[Array, "T D"]
    bias: Float[Array, " T"] | None
    # Added to logits: rows that pad the table have no probability. None = there are no such rows.
    closed: Float[Array, " T"] | None

    def logits(self, plan: _Plan, hidden: Float[Array, "C D"]) -> Float[Array, "C T"]:
        """Of all rows, before any is masked."""
        raw = jnp.einsum("cd,td->ct", hidden, self.rows, preferred_element_type=jnp.float32)
        return _finished(plan, raw, self.bias)

    def masked(self, plan: _Plan, logits: Float[Array, "C T"], wanted: Int[Array, " C"]) -> Float[Array, "C T"]:
        if plan.spaces:
            first, last = spaces_of(wanted[:, None] - 1, plan.spaces)
            return jnp.where((self.numbers >= first) & (self.numbers < last), logits, _NONE)
        return logits if self.closed is None else logits + self.closed

    def chosen(self, plan: _Plan, hidden: Float[Array, "C D"], wanted: Int[Array, " C"]) -> Float[Array, " C"]:
        """The target's logit from its own row, 0 if that is in another tile: nothing is picked from [C, T]."""
        here, at = self._place(wanted)
        raw = jnp.sum(hidden.astype(jnp.float32) * _rows(self.rows, at).astype(jnp.float32), axis=-1)
        return jnp.where(here, _finished(plan, raw, None if self.bias is None else _rows(self.bias, at)), 0.0)

    def own(self, wanted: Int[Array, " C"]) -> Float[Array, "C D"]:
        """The target's row, 0 if that is in another tile."""
        here, at = self._place(wanted)
        return jnp.where(here[:, None], _rows(self.rows, at), 0)

    def _place(self, wanted: Int[Array, " C"]) -> tuple[Bool[Array, " C"], Int[Array, " C"]]:
        """Whether the target is here, and where."""
        at = wanted - 1 - self.first
        here = (at >= 0) & (at < self.rows.shape[0])
        return here, jnp.where(here, at, 0)

    @property
    def numbers(self) -> Int[Array, " T"]:
        return self.first + jnp.arange(self.rows.shape[0])


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    return x.at[at].get(mode="promise_in_bounds")


def _finished(plan: _Plan, raw: jax.Array, bias: jax.Array | None) -> jax.Array:
    raw = raw if bias is None else raw + bias
    return plan.softcap * jnp.tanh(raw / plan.softcap) if plan.softcap else raw


def _tiles(plan: _Plan, table: jax.Array, bias: jax.Array | None, dtype: Any) -> Callable[[jax.Array], _Tile]:
    size = table.shape[0] // plan.tiles
    offset = jax.lax.axis_index("tensor") * table.shape[0]
    padded = table.shape[0] * jax.lax.axis_size("tensor") > plan.count

    def tile(number: jax.Array) -> _Tile:
        own = jax.lax.dynamic_slice_in_dim(table, number * size, size).astype(dtype)
        rows = jax.lax.all_gather(own, "fsdp", axis=1, tiled=True) if jax.lax.axis_size("fsdp") > 1 else own
        part = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, number * size, size)
        first = offset + number * size
        closed = jnp.where(first + jnp.arange(size) < plan.count, 0.0, _NONE) if padded else None
        return _Tile(first, rows, part, closed)

    return tile


def _forward_local(
    plan: _Plan, hidden: jax.Array, target: jax.Array, table: jax.Array, bias: jax.Array | None, *, rows: bool = False
) -> tuple[jax.Array, ...]:
    """The target's logit and the normaliser; with ``rows`` also the target's row, and the mean row under the softmax, [B, S, D]."""
    tile_of = _tiles(plan, table, bias, hidden.dtype)
    front = _Front.of(target)
    given = front.listed(hidden), front.listed(target)

    def visit(so_far: tuple, number: jax.Array) -> tuple[tuple, None]:
        tile = tile_of(number)

        def part(cut: Callable, put: Callable, so_far: tuple) -> tuple:
            h, wanted = map(cut, given)
            highest, total, chosen, *found = map(cut, so_far)
            logits = tile.masked(plan, tile.logits(plan, h), wanted)
            higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
            weights, less = jnp.exp(logits - higher[:, None]), jnp.exp(highest - higher)
            total = total * less + jnp.sum(weights, axis=-1)
            if rows:
                own, weighted = found
                more = jnp.einsum("ct,td->cd", weights.astype(h.dtype), tile.rows)
                found = [own + tile.own(wanted), weighted * less[:, None] + more]
            return tuple(map(put, so_far, (higher, total, chosen + tile.chosen(plan, h, wanted), *found)))

        return front.walk(plan, target.shape[0], part, so_far), None

    zero = jnp.zeros(target.size, jnp.float32)
    wide = [jnp.zeros((target.size, hidden.shape[2]), t) for t in (hidden.dtype, jnp.float32) if rows]
    (highest, total, chosen, *found), _ = jax.lax.scan(visit, (zero + _NONE, zero, zero, *wide), jnp.arange(plan.tiles))
    # Each device along ``tensor`` has seen its own rows of the table.
    top = jax.lax.pmax(highest, "tensor")
    less = jnp.exp(highest - top)
    total = jax.lax.psum(total * less, "tensor")
    total = jnp.where(total > 0, total, 1.0)
    results = [jax.lax.psum(chosen, "tensor"), top + jnp.log(total)]
    if rows:
        own, weighted = found
        results += [jax.lax.psum(own, "tensor"), jax.lax.psum(weighted * less[:, None], "tensor") / total[:, None]]
    return tuple(front.in_rows(x, target.shape[0]) for x in results)


def _backward_local(
    plan: _Plan,
    hidden: jax.Array,
    target: jax.Array,
    table: jax.Array,
    bias: jax.Array | None,
    normaliser: jax.Array,
    by_chosen: jax.Array,
    by_normaliser: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    tile_of = _tiles(plan, table, bias, hidden.dtype)
    front = _Front.of(target)
    # A part's last positions may have no target: they have no probability anywhere, and change nothing.
    real = target > 0
    normaliser = jnp.where(real, normaliser, -_NONE)
    by_chosen, by_normaliser = (jnp.where(real, by, 0.0) for by in (by_chosen, by_normaliser))
    given = tuple(map(front.listed, (hidden, target, normaliser, by_chosen, by_normaliser)))

    def visit(so_far: tuple, number: jax.Array) -> tuple[tuple, None]:
        by_hidden, by_table, by_bias = so_far
        tile = tile_of(number)

        def part(cut: Callable, put: Callable, so_far: tuple) -> tuple:
            by_hidden, by_rows, by_part = so_far
            h, wanted, total, by_chosen, by_total = map(cut, given)
            logits = tile.logits(plan, h)
            probability = jnp.exp(tile.masked(plan, logits, wanted) - total[:, None])
            hit = wanted[:, None] - 1 == tile.numbers
            by_logits = probability * by_total[:, None] + jnp.where(hit, by_chosen[:, None], 0.0)
            if plan.softcap:
                by_logits = by_logits * (1 - (logits / plan.softcap) ** 2)
            narrow = by_logits.astype(hidden.dtype)
            by_h = jnp.einsum("ct,td->cd", narrow, tile.rows)
            if by_rows is not None:
                by_rows = by_rows + jnp.einsum("ct,cd->td", narrow, h)
            if by_part is not None:
                by_part = by_part + jnp.sum(by_logits, axis=0)
            return put(by_hidden, cut(by_hidden) + by_h), by_rows, by_part

        start = (
            by_hidden,
            jnp.zeros(tile.rows.shape, jnp.float32) if plan.learns else None,
            None if bias is None else jnp.zeros(tile.rows.shape[0], jnp.float32),
        )
        by_hidden, by_rows, by_part = front.walk(plan, target.shape[0], part, start)
        first = number * tile.rows.shape[0]
        if by_rows is not None:
            by_rows = jax.lax.psum_scatter(by_rows, "fsdp", scatter_dimension=1, tiled=True)
            by_table = jax.lax.dynamic_update_slice_in_dim(by_table, by_rows, first, axis=0)
        if by_part is not None:
            by_bias = jax.lax.dynamic_update_slice_in_dim(by_bias, by_part, first, axis=0)
        return (by_hidden, by_table, by_bias), None

    start = (
        jnp.zeros((target.size, hidden.shape[2]), jnp.float32),
        jnp.zeros(table.shape, jnp.float32) if plan.learns else None,
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (by_hidden, by_table, by_bias), _ = jax.lax.scan(visit, start, jnp.arange(plan.tiles))
    by_hidden = front.in_rows(jax.lax.psum(by_hidden, "tensor").astype(hidden.dtype), target.shape[0])
    if by_table is not None:
        by_table = jax.lax.psum(by_table, "replica").astype(table.dtype)
    if by_bias is not None:
        by_bias = jax.lax.psum(by_bias, BATCH)
    return by_hidden, by_table, by_bias
