"""Answers in words: a prompt is read once, then one token at a time is added to its keys and values.

Greedy, sampled (temperature, top-p) or by beam search, for decoders and encoder-decoders alike. Reading and the whole loop are one
jitted function. Keys and values lie in a buffer of prompt + new slots that is part of the loop's state and written in place: step s
writes slot prompt + s of every row, however long its own prompt is; a mask says which slots are real, and positions count per row.

    generate(model, variables, batch, last, Decoding(max_new=32, stop=(eos,)), key)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models import beam_search
from instructrec_jax.models.block import KeysValues
from instructrec_jax.models.language_model import (
    Batch,
    LanguageModel,
    Memory,
    Output,
    apply,
    read_prompt,
    word_logits,
)
from instructrec_jax.models.sharding import BATCH, rows_by_index


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded.

    Raises:
        ConfigError: a number out of its range, or settings that exclude each other.
    """

    max_new: int = 64  # N, most tokens of an answer, the stop token included
    temperature: float = 0.0  # 0 = the likeliest token; else softmax(logits / temperature) is sampled
    top_p: float = 1.0  # sampling: only the fewest tokens whose probabilities sum to at least this (arXiv 1904.09751)
    beams: int = 1  # hypotheses that are followed side by side
    length_penalty: float = 1.0  # a finished hypothesis scores log P / tokens ** length_penalty
    stop: tuple[int, ...] = ()  # tokens that end an answer
    pad: int = 0  # what stands behind an answer

    def __post_init__(self) -> None:
        if self.max_new < 1:
            raise ConfigError(f"max_new = {self.max_new}: an answer has at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature}", remedy="0 for the likeliest token, else e.g. 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} is not in (0, 1]", remedy="1 keeps every token")
        if self.beams < 1:
            raise ConfigError(f"beams = {self.beams}", remedy="1 = no beam search")
        if self.beams > 1 and self.temperature:
            raise ConfigError(
                f"beams = {self.beams} with temperature = {self.temperature}: beam search does not sample",
                remedy="one beam, or temperature 0",
            )
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(
                f"top_p = {self.top_p} with temperature = 0: nothing is sampled", remedy="a temperature such as 1"
            )


GREEDY = Decoding()


class Generated(NamedTuple):
    """One answer per row."""

    tokens: Int[Array, "B N"]  # ``pad`` behind the answer
    lengths: Int[Array, " B"]  # without the stop token
    log_prob: Float[Array, " B"]  # of the answer and its stop token, in nats, at temperature 1


def generate(
    model: LanguageModel,
    variables: Any,
    prompts: Batch,
    last: Int[Array, " B"],
    decoding: Decoding = Decoding(),
    key: jax.Array | None = None,
    content: Float[Array, "I Fc"] | None = None,
) -> Generated:
    """Answer every prompt. Call inside ``jax.set_mesh``.

    Compiles once per model, shape of the prompts, ``max_new``, ``stop``, ``pad`` and kind of decoding (not per temperature, top-p or
    length penalty).

    Args:
        model, variables: a decoder or an encoder-decoder, and {"params": ..., "lora": ...}.
        prompts: rows padded on the right, as ``LanguageModel`` takes them; B divides by the mesh's ``replica * fsdp``.
        last: index of each row's last real token; -1 = a row that only fills the batch, and answers nothing.
        decoding: how.
        key: for sampling; one, or one per row ``[B]``. A row's sample depends on its key, not on its company.
        content: item features, for a model with items.

    Raises:
        UserError: a prompt and its answer are longer than a table of learned positions, or the rows do not divide.
        ConfigError: an encoder, sampling without a key, or more beams than there are words.
    """
    arch, rows = model.arch, prompts["tokens"].shape[0]
    if arch.kind == "encoder":
        raise ConfigError("an encoder answers nothing", remedy="a decoder or an encoder-decoder")
    if decoding.temperature and key is None:
        raise ConfigError(f"temperature = {decoding.temperature} needs a key", remedy="jax.random.key(seed)")
    if decoding.beams > 1 and beam_search.kept(decoding) > arch.vocab:
        raise ConfigError(f"beams = {decoding.beams} are too many for a vocabulary of {arch.vocab} tokens")
    mesh = jax.sharding.get_mesh()
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    if rows % shards:
        raise UserError(f"{rows} rows do not divide over {shards} shards of the batch", remedy="fill up with last = -1")
    if arch.positions == "learned" and getattr(last, "is_fully_addressable", True):
        longest = int(np.max(np.asarray(last))) + 1
        if longest + decoding.max_new - 1 > arch.max_positions:
            raise UserError(
                f"a prompt of {longest} tokens and {decoding.max_new} new ones do not fit into the model's "
                f"{arch.max_positions} positions",
                remedy="cut the prompt, or lower max_new",
            )
    key = jax.random.key(0) if key is None else key
    keys = key if key.ndim else jax.random.split(key, rows)
    keys = jax.device_put(keys, jax.NamedSharding(mesh, P(BATCH)))
    # Numbers are arguments and only the kind is static, so that another temperature does not compile again.
    numbers = (decoding.temperature, decoding.top_p, decoding.length_penalty)
    kind = replace(
        decoding,
        temperature=float(decoding.temperature > 0),
        top_p=1.0 if decoding.top_p == 1 else 0.5,
        length_penalty=1.0,
    )
    return _generate(model, kind, variables, prompts, last, keys, tuple(map(np.float32, numbers)), content)


@partial(jax.jit, static_argnums=(0, 1))
def _generate(
    model: LanguageModel,
    kind: Decoding,
    variables: Any,
    prompts: Batch,
    last: jax.Array,
    keys: jax.Array,
    numbers: tuple[jax.Array, jax.Array, jax.Array],
    content: jax.Array | None,
) -> Generated:
    temperature, top_p, length_penalty = numbers
    hidden, memory, out = read_prompt(model, variables, prompts, jnp.maximum(last, 0), content)
    logits = _logits(hidden, out, model)
    if kind.beams == 1:
        loop = Loop(model, variables, content, memory, kind.max_new)

        def pick(logits: jax.Array, step: jax.Array) -> jax.Array:
            if not kind.temperature:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            # The largest becomes 0 first: a tiny temperature then means the likeliest token, not infinity.
            scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.maximum(temperature, 1e-30)
            return sample(scaled, keys, step, top_p if kind.top_p < 1 else None)

        return _one_by_one(loop, kind, logits, last >= 0, pick)
    loop = Loop(model, variables, content, beam_search.of_beams(memory, kind.beams), kind.max_new)
    return Generated(*beam_search.search(loop, kind, logits, last >= 0, length_penalty))


def _logits(hidden: Float[Array, "B 1 D"], out: Output, model: LanguageModel) -> Float[Array, "B V"]:
    """Next-token logits, whole on every device: what sorts and picks goes along the vocabulary."""
    return jax.reshard(word_logits(hidden, out, model.arch)[:, 0], P(BATCH, None))


class Loop:
    """What the steps share: the prompt's memory with room for the new tokens. R rows (of prompts, or of their beams)."""

    def __init__(self, model: LanguageModel, variables: Any, content: jax.Array | None, memory: Memory, max_new: int):
        self._model, self._variables, self._content, self._memory = model, variables, content, memory
        self.border = memory.mask.shape[1]
        self.room = max_new - 1  # the last new token is not read again
        behind = jnp.zeros_like(memory.following)[:, None] + jnp.arange(self.room, dtype=jnp.int32)
        self._behind = behind
        self._positions = jnp.concatenate([memory.positions, memory.following[:, None] + behind], axis=1)
        self.cache: KeysValues = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, self.room), (0, 0), (0, 0))), memory.past
        )

    def advance(
        self, cache: KeysValues, token: Int[Array, " R"], step: jax.Array
    ) -> tuple[Float[Array, "R V"], KeysValues]:
        """Read token number ``step`` of every row's answer: logits of the next, and the cache with its keys and values."""
        m = self._memory
        mask = jnp.concatenate([m.mask, self._behind < step], axis=1)
        batch = {
            "tokens": token[:, None],
            "segment_ids": jnp.ones_like(token)[:, None],
            "positions": (m.following + step)[:, None],
        }
        memory = m._replace(past=cache, mask=mask, positions=self._positions)
        out = apply(self._model, self._variables, batch, self._content, memory)
        cache = jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, self.border + step, axis=2),
            cache,
            out.cache,
        )
        return _logits(out.hidden, out, self._model), cache


# ------------------------------------------------------------------------------------------------- greedy and sampling


def _one_by_one(
    loop: Loop, kind: Decoding, logits: jax.Array, live: Bool[Array, " B"], pick: Callable[..., jax.Array]
) -> Generated:
    n = kind.max_new
    empty = jnp.zeros_like(live, jnp.int32)[:, None] + jnp.full((n,), kind.pad, jnp.int32)
    zero = jnp.zeros_like(live, jnp.int32)

    def take(state: Any, logits: jax.Array, step: jax.Array) -> Any:
        """Choose token number ``step`` of every row that has not stopped."""
        _, live, out = state
        token = pick(logits, step)
        log_prob = rows_by_index(jax.nn.log_softmax(logits, axis=-1), token)
        goes_on = live & ~among(token, kind.stop)
        written = jnp.where(goes_on, token, kind.pad)
        tokens = jax.lax.dynamic_update_slice_in_dim(out.tokens, written[:, None], step, axis=1)
        lengths = out.lengths + goes_on
        return token, goes_on, Generated(tokens, lengths, out.log_prob + jnp.where(live, log_prob, 0.0))

    def body(carry: Any) -> Any:
        step, state, cache = carry
        logits, cache = loop.advance(cache, state[0], step)
        return step + 1, take(state, logits, step + 1), cache

    def goes_on(carry: Any) -> jax.Array:
        step, state, _ = carry
        return (step + 1 < n) & jnp.any(state[1])

    first = (zero, live, Generated(empty, zero, zero.astype(jnp.float32)))
    start = jnp.int32(0)
    _, state, _ = jax.lax.while_loop(goes_on, body, (start, take(first, logits, start), loop.cache))
    return state[2]


def among(token: Int[Array, "*B"], stop: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Whether a token is one of ``stop``."""
    return jnp.any(token[..., None] == jnp.asarray(stop, jnp.int32), axis=-1)


def sample(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    step: int | jax.Array,
    top_p: float | jax.Array | None = None,
) -> Int[Array, " B"]:
    """One token per row from softmax(logits), within its nucleus if ``top_p`` is given. ``keys [B]``; ``step`` is folded in."""
    draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
    if top_p is None:
        return draw(keys, logits).astype(jnp.int32)
    order, kept = nucleus(logits, top_p)
    return rows_by_index(order, draw(keys, kept))


def nucleus(logits: Float[Array, "B V"], top_p: float | jax.Array) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Tokens from the likeliest on, and their logits, which are -inf outside the smallest set whose probabilities sum to at least
    ``top_p`` (Holtzman et al. 2020, arXiv 1904.09751). The likeliest token always stays; of equal ones the lower id comes first.

    The vocabulary must not be sharded.
    """
    ids = jnp.zeros_like(logits, jnp.int32) + jnp.arange(logits.shape[-1], dtype=jnp.int32)
    falling, order = jax.lax.sort((-logits, ids), dimension=-1, is_stable=True, num_keys=1)
    probability = jax.nn.softmax(-falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    outside = (before >= top_p) & (jnp.arange(logits.shape[-1]) > 0)
    return order, jnp.where(outside, -jnp.inf, -falling)
