"""The softmax over a table of words that is never gathered: a tile of its rows at a time, for all positions that have a target.

The table is stored sharded over ``fsdp``. Each tile of V / T rows is gathered, contracted with all hidden states, ``chunk`` positions of
every row at a time, and left again; the backward pass does the same once more and scatters the tile's gradient at once. So of the table
a device holds one tile in the compute type, one tile's gradient, and logits ``[B, chunk, V / T]``. Communication is what gathering the
table twice and reducing its gradient once would take, whatever the number of tiles and of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

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

    Differentiable in ``hidden``, ``table`` and ``bias``. Chunks of positions in which no row of a device has a target are skipped there.

    Args:
        hidden: in the compute type, in which the products are taken; their sums are float32.
        target: row + 1; 0 = none.
        table: float32 or bfloat16, as stored (``RULES.table_vd``) or gathered.
        bias: of the logits.
        count: real rows.
        softcap: cap · tanh(logits / cap), before the softmax; 0 = none.
        tiles: parts of the table.
        chunk: positions of every row whose logits exist at one time; divides S.
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
    chosen, normaliser = _scores(plan, *given)
    return (chosen, normaliser), (*given, normaliser)


def _backward(plan: _Plan, kept: tuple, change: tuple[jax.Array, jax.Array]) -> tuple:
    hidden, target, table, bias, normaliser = kept
    outs = (RULES.act_bsd, RULES.table_vd if plan.learns else None, None if bias is None else RULES.vector_v)
    by_hidden, by_table, by_bias = _manual(partial(_backward_local, plan), outs)(
        hidden, target, table, bias, normaliser, *change
    )
    return by_hidden, None, by_table, by_bias


_scores.defvjp(_forward, _backward)


# --------------------------------------------------------------------------------------------------------- on each device


class _Tile(NamedTuple):
    """Some rows of the table, gathered."""

    first: jax.Array  # their number in the whole table
    rows: Float[Array, "T D"]
    bias: Float[Array, " T"] | None

    def logits(self, plan: _Plan, hidden: Float[Array, "B C D"], wanted: Int[Array, "B C"]) -> Float[Array, "B C T"]:
        raw = jnp.einsum("bcd,td->bct", hidden, self.rows, preferred_element_type=jnp.float32)
        if self.bias is not None:
            raw = raw + self.bias
        if plan.softcap:
            raw = plan.softcap * jnp.tanh(raw / plan.softcap)
        if plan.spaces:
            first, last = spaces_of(wanted[..., None] - 1, plan.spaces)
            return jnp.where((self.numbers >= first) & (self.numbers < last), raw, _NONE)
        return jnp.where(self.numbers < plan.count, raw, _NONE)

    @property
    def numbers(self) -> Int[Array, " T"]:
        return self.first + jnp.arange(self.rows.shape[0])


def _tiles(plan: _Plan, table: jax.Array, bias: jax.Array | None, dtype: Any) -> Callable[[jax.Array], _Tile]:
    size = table.shape[0] // plan.tiles
    offset = jax.lax.axis_index("tensor") * table.shape[0]

    def tile(number: jax.Array) -> _Tile:
        own = jax.lax.dynamic_slice_in_dim(table, number * size, size).astype(dtype)
        rows = jax.lax.all_gather(own, "fsdp", axis=1, tiled=True)
        part = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, number * size, size)
        return _Tile(offset + number * size, rows, part)

    return tile


def _chunks(x: Float[Array, "B S ..."], size: int) -> Float[Array, "N B C ..."]:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(x: Float[Array, "N B C ..."]) -> Float[Array, "B S ..."]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _forward_local(
    plan: _Plan, hidden: jax.Array, target: jax.Array, table: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    tile_of = _tiles(plan, table, bias, hidden.dtype)
    parts = (_chunks(hidden, plan.chunk), _chunks(target, plan.chunk))

    def visit(so_far: tuple, number: jax.Array) -> tuple[tuple, None]:
        tile = tile_of(number)

        def compute(h: jax.Array, wanted: jax.Array, highest: jax.Array, total: jax.Array, chosen: jax.Array) -> tuple:
            logits = tile.logits(plan, h, wanted)
            higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
            total = total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
            hit = wanted[..., None] - 1 == tile.numbers
            return higher, total, chosen + jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

        def chunk(_: None, part: tuple) -> tuple[None, tuple]:
            return None, jax.lax.cond(jnp.any(part[1] > 0), compute, lambda h, wanted, *rest: rest, *part)

        return jax.lax.scan(chunk, None, (*parts, *so_far))[1], None

    zero = jnp.zeros(parts[1].shape, jnp.float32)
    (highest, total, chosen), _ = jax.lax.scan(visit, (zero + _NONE, zero, zero), jnp.arange(plan.tiles))
    # Each device along ``tensor`` has seen its own rows of the table.
    top = jax.lax.pmax(highest, "tensor")
    total = jax.lax.psum(total * jnp.exp(highest - top), "tensor")
    seen = total > 0
    normaliser = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
    return _joined(jax.lax.psum(chosen, "tensor")), _joined(normaliser)


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
    given = (hidden, target, normaliser, by_chosen, by_normaliser)
    parts = tuple(_chunks(x, plan.chunk) for x in given)

    def visit(so_far: tuple, number: jax.Array) -> tuple[tuple, None]:
        by_hidden, by_table, by_bias = so_far
        tile = tile_of(number)

        def compute(so_far: tuple, by_h: jax.Array, h: jax.Array, wanted: jax.Array, total: jax.Array, *by: jax.Array):
            logits = tile.logits(plan, h, wanted)
            hit = wanted[..., None] - 1 == tile.numbers
            real = (wanted > 0)[..., None]
            probability = jnp.where(real, jnp.exp(logits - total[..., None]), 0.0)
            by_logits = probability * by[1][..., None] + jnp.where(hit, by[0][..., None], 0.0)
            if plan.softcap:
                capped = jnp.where(tile.numbers < plan.count, logits, 0.0)
                by_logits = by_logits * (1 - (capped / plan.softcap) ** 2)
            narrow = by_logits.astype(hidden.dtype)
            by_h = by_h + jnp.einsum("bct,td->bcd", narrow, tile.rows, preferred_element_type=jnp.float32)
            by_rows, by_part = so_far
            if by_rows is not None:
                by_rows = by_rows + jnp.einsum("bct,bcd->td", narrow, h, preferred_element_type=jnp.float32)
            if by_part is not None:
                by_part = by_part + jnp.sum(by_logits, axis=(0, 1))
            return (by_rows, by_part), by_h

        def chunk(so_far: tuple, part: tuple) -> tuple[tuple, jax.Array]:
            return jax.lax.cond(jnp.any(part[2] > 0), compute, lambda so_far, by_h, *_: (so_far, by_h), so_far, *part)

        start = (
            jnp.zeros(tile.rows.shape, jnp.float32) if plan.learns else None,
            None if bias is None else jnp.zeros(tile.rows.shape[0], jnp.float32),
        )
        (by_rows, by_part), by_hidden = jax.lax.scan(chunk, start, (by_hidden, *parts))
        first = number * tile.rows.shape[0]
        if by_rows is not None:
            by_rows = jax.lax.psum_scatter(by_rows, "fsdp", scatter_dimension=1, tiled=True)
            by_table = jax.lax.dynamic_update_slice_in_dim(by_table, by_rows, first, axis=0)
        if by_part is not None:
            by_bias = jax.lax.dynamic_update_slice_in_dim(by_bias, by_part, first, axis=0)
        return (by_hidden, by_table, by_bias), None

    start = (
        jnp.zeros(parts[0].shape, jnp.float32),
        jnp.zeros(table.shape, jnp.float32) if plan.learns else None,
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (by_hidden, by_table, by_bias), _ = jax.lax.scan(visit, start, jnp.arange(plan.tiles))
    by_hidden = _joined(jax.lax.psum(by_hidden, "tensor")).astype(hidden.dtype)
    if by_table is not None:
        by_table = jax.lax.psum(by_table, "replica").astype(table.dtype)
    if by_bias is not None:
        by_bias = jax.lax.psum(by_bias, BATCH)
    return by_hidden, by_table, by_bias
