"""``Scorer.score(requests, method)``: scores [B, C], whatever the method.

* ``items``: the matching head. log softmax over the whole catalogue of f_i · g + θ_i, where g is the hidden state of the last
  prompt position; candidates are read from it.
* ``likelihood``: log P(candidate text | prompt), the paper's method (arXiv 2305.07001, section 2.3). The prompt is read once; all
  candidates of a request share its keys and values, stand side by side in one row, see the prompt and themselves, and their
  positions start right behind the prompt. The score of a candidate is the sum (or mean) over its tokens and ``<eos>``.

A request's prompt and a candidate's text are tokenised apart, so the border between them is a token border by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from instructrec_jax.config import ModelConfig
from instructrec_jax.data.tokenise import encode_prompt, pad_to, truncate
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models.decoder import Decoder, Sizes, apply, item_logits, word_logits
from instructrec_jax.models.sharding import BATCH, RULES, lookup
from instructrec_jax.scoring.buckets import bucket, groups_by_length

METHODS = ("items", "likelihood")
Candidates = Sequence[int] | np.ndarray | Literal["all"]


@dataclass(frozen=True)
class Request:
    """One prompt with any number of candidates (catalogue indices; repeats allowed), or the whole catalogue."""

    prompt: InstructionExample
    candidates: Candidates = "all"


class Scorer:
    """Scores requests with given parameters. Build it, and call it, inside ``jax.set_mesh``.

    Args:
        config, sizes: the model.
        params: its parameters, on the mesh.
        content: item features ``[I, Fc]`` on the mesh, padded like the item table.
        num_items: real items in the padded table.
        text: the tokeniser.
        titles: candidate texts for ``likelihood``, one per item.
        batch_size: most requests in one device batch.
        max_prompt: prompts longer than this many tokens keep ``<bos>`` and their newest tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: Sizes,
        params: Any,
        content: jax.Array,
        num_items: int,
        text: Text,
        titles: Sequence[str],
        *,
        batch_size: int = 64,
        max_prompt: int = 1024,
    ):
        self.params, self._content = params, content
        self._num_items, self._text, self._titles = num_items, text, titles
        self._max_prompt = max_prompt
        mesh = jax.sharding.get_mesh()
        shards = mesh.shape["replica"] * mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // shards) * shards
        self._shards = shards
        self._sharding = jax.NamedSharding(mesh, RULES.ids_bs)
        self._title_tokens: dict[int, list[int]] = {}
        self._items_step = _items_step(config, sizes, num_items)
        self._likelihood_step = _likelihood_step(config, sizes)

    def score(
        self, requests: Sequence[Request], method: str = "items", *, normalise: Literal["sum", "mean"] = "sum"
    ) -> list[Float[np.ndarray, " C"]]:
        """Scores of every request's candidates, in the order given; an empty candidate list gives an empty array.

        Raises:
            UserError: unknown method, or a candidate outside the catalogue.
        """
        if method not in METHODS:
            raise UserError(
                f"unknown scoring method {method!r}{did_you_mean(method, METHODS)}",
                remedy=f"one of {', '.join(METHODS)}",
            )
        prompts = [truncate(encode_prompt(r.prompt, self._text), self._max_prompt)[0] for r in requests]
        chosen = [self._check(number, r.candidates) for number, r in enumerate(requests)]
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(requests)
        size = self._batch_size
        if method == "likelihood":
            # Rows hold all candidates of a request: fewer requests at a time where there are many candidates.
            most = max((len(c) for c in chosen if c is not None), default=self._num_items)
            size = max(self._shards, min(size, 4096 // max(most, 1) // self._shards * self._shards))
        for group in groups_by_length([len(p["tokens"]) for p in prompts], size):
            scores = (
                self._by_items([prompts[i] for i in group], [chosen[i] for i in group])
                if method == "items"
                else self._by_likelihood([prompts[i] for i in group], [chosen[i] for i in group], normalise == "mean")
            )
            for i, row in zip(group, scores):
                out[i] = row
        return out

    def score_all(self, prompts: Sequence[InstructionExample]) -> Float[np.ndarray, "B I"]:
        """The matching head over the whole catalogue, as one array."""
        scores = self.score([Request(p) for p in prompts], "items")
        return np.stack(scores) if scores else np.zeros((0, self._num_items), np.float32)

    def _check(self, number: int, candidates: Candidates) -> np.ndarray | None:
        if isinstance(candidates, str):
            return None
        index = np.asarray(candidates, np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= self._num_items):
            bad = int(index[(index < 0) | (index >= self._num_items)][0])
            raise UserError(f"request {number}: candidate {bad} is outside the catalogue of {self._num_items} items")
        return index

    def _prompt_batch(self, prompts: list[dict[str, np.ndarray]]) -> tuple[dict[str, jax.Array], np.ndarray]:
        """Padded prompt arrays on the mesh, and the real lengths (1 for padding rows)."""
        # Either a full batch or the next power of two: two row counts per length at most.
        wanted = self._batch_size if len(prompts) > self._batch_size // 2 else bucket(len(prompts), 1, steps=1)
        rows = -(-wanted // self._shards) * self._shards
        length = bucket(max(len(p["tokens"]) for p in prompts), 16)
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(p["tokens"]) for p in prompts]
        batch = pad_to(prompts, rows, length)
        batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        batch["segment_ids"] = (batch["positions"] < lengths[:, None]).astype(np.int32)
        return {k: jax.device_put(v, self._sharding) for k, v in batch.items()}, lengths

    def _by_items(self, prompts: list[dict[str, np.ndarray]], chosen: list[np.ndarray | None]) -> list[np.ndarray]:
        batch, lengths = self._prompt_batch(prompts)
        last = jax.device_put(lengths - 1, jax.NamedSharding(self._sharding.mesh, jax.P(BATCH)))
        scores = np.asarray(self._items_step(self.params, batch, last, self._content))[:, : self._num_items]
        return [scores[row] if c is None else scores[row, c] for row, c in enumerate(chosen)]

    def _tokens_of(self, item: int) -> list[int]:
        if item not in self._title_tokens:
            self._title_tokens[item] = [*self._text.encode(self._titles[item]), self._text.eos]
        return self._title_tokens[item]

    def _by_likelihood(
        self, prompts: list[dict[str, np.ndarray]], chosen: list[np.ndarray | None], mean: bool
    ) -> list[np.ndarray]:
        batch, lengths = self._prompt_batch(prompts)
        rows = len(lengths)
        everything = np.arange(self._num_items)
        lists = [everything if c is None else c for c in chosen]
        texts = [[self._tokens_of(int(i)) for i in c] for c in lists]
        slots = bucket(max((len(t) for t in texts), default=1), 1)
        width = bucket(max((len(t) for row in texts for t in row), default=1), 4)
        # Candidate c of a row occupies [c * width, (c + 1) * width): inputs are its tokens but the last, which is only predicted.
        tokens = np.zeros((rows, slots, width), np.int32)
        for row, candidates in enumerate(texts):
            for slot, ids in enumerate(candidates):
                tokens[row, slot, : len(ids)] = ids
        real = tokens > 0  # <pad> is 0 and never part of a text
        packed = {
            "tokens": tokens,
            "segment_ids": np.where(real, np.arange(1, slots + 1)[None, :, None], 0).astype(np.int32),
            "positions": (lengths[:, None, None] + np.arange(width)[None, None, :]).astype(np.int32)
            * np.ones((1, slots, 1), np.int32),
        }
        packed = {k: v.reshape(rows, slots * width) for k, v in packed.items()}
        nothing = np.zeros((rows, slots * width), np.int32)
        packed |= {"item": nothing, "feature": nothing, "feature_value": nothing.astype(np.float32)}
        device = {k: jax.device_put(v, self._sharding) for k, v in packed.items()}
        last = jax.device_put(lengths - 1, jax.NamedSharding(self._sharding.mesh, jax.P(BATCH)))
        scores = np.asarray(self._likelihood_step(self.params, batch, last, device, self._content, slots))
        if mean:
            scores = scores / np.maximum(real.sum(-1), 1)
        return [scores[row, : len(c)] for row, c in enumerate(lists)]


def _last_hidden(hidden: jax.Array, last: jax.Array) -> jax.Array:
    """Hidden state [B, 1, D] of each row's last real position."""
    return jax.vmap(lambda row, at: row.at[at[None]].get())(hidden, last)


def _items_step(config: ModelConfig, sizes: Sizes, num_items: int) -> Callable[..., jax.Array]:
    model = Decoder(config, sizes)

    @jax.jit
    def step(params: Any, batch: dict[str, jax.Array], last: jax.Array, content: jax.Array) -> jax.Array:
        out = apply(model, params, batch, content)
        logits = item_logits(_last_hidden(out.hidden, last), out, num_items)[:, 0]
        return jax.nn.log_softmax(logits, axis=-1)

    return step


def _likelihood_step(config: ModelConfig, sizes: Sizes) -> Callable[..., jax.Array]:
    model = Decoder(config, sizes)

    @partial(jax.jit, static_argnums=5)
    def step(
        params: Any,
        batch: dict[str, jax.Array],
        last: jax.Array,
        candidates: dict[str, jax.Array],
        content: jax.Array,
        slots: int,
    ) -> jax.Array:
        prompt = apply(model, params, batch, content)
        out = apply(model, params, candidates, content, (prompt.cache, batch["segment_ids"] > 0))
        rows, packed = candidates["tokens"].shape
        width = packed // slots

        # Token 0 of every candidate is predicted by the prompt's last position, token j by the candidate's position j - 1.
        first = jnp.broadcast_to(_last_hidden(prompt.hidden, last)[:, :, None, :], (rows, slots, 1, config.width))
        rest = out.hidden.reshape(rows, slots, width, config.width)[:, :, :-1]
        targets = candidates["tokens"].reshape(rows, slots, width)

        def one_slot(hidden: jax.Array, target: jax.Array) -> jax.Array:
            # One candidate slot of every row at a time: logits [B, width, V] instead of [B, slots * width, V].
            normaliser = jax.nn.logsumexp(word_logits(hidden, out), axis=-1)
            chosen = jnp.sum(hidden.astype(jnp.float32) * lookup(out.word_head, target), axis=-1)
            return jnp.sum((chosen - normaliser) * (target > 0), axis=-1)

        by_slot = (jnp.moveaxis(jnp.concatenate([first, rest], axis=2), 1, 0), jnp.moveaxis(targets, 1, 0))
        scores = jax.lax.map(lambda part: one_slot(*part), by_slot)
        return scores.T

    return step
