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
from instructrec_jax.data.tokenise import encode_answer, encode_prompt, pad_to, truncate
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import (
    LanguageModel,
    Sizes,
    apply,
    item_logits,
    read_prompt,
    word_log_prob,
)
from instructrec_jax.models.sharding import BATCH, RULES
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
        config, arch, sizes: the model.
        params: its variables ({"params": ..., "lora": ...}), on the mesh.
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
        arch: Architecture,
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
        self._items_step = _items_step(config, arch, sizes, num_items)
        self._likelihood_step = _likelihood_step(config, arch, sizes)
        self._has_items = bool(sizes.items)

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
        if method == "items" and not self._has_items:
            raise UserError("this model has no item head", remedy="score by likelihood, or train with item tokens")
        prompts = [
            truncate(encode_prompt(r.prompt, self._text), self._max_prompt, len(self._text.before))[0] for r in requests
        ]
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
            self._title_tokens[item] = encode_answer(self._titles[item], self._text)
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
        count = np.zeros((rows, slots), np.int32)
        for row, candidates in enumerate(texts):
            for slot, ids in enumerate(candidates):
                tokens[row, slot, : len(ids)] = ids
                count[row, slot] = len(ids)
        offset = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)  # from the prompt's end
        real = offset < count[:, :, None]
        packed = {
            "tokens": tokens,
            "segment_ids": np.where(real, np.arange(1, slots + 1)[None, :, None], 0).astype(np.int32),
            "positions": offset,
        }
        packed = {k: v.reshape(rows, slots * width) for k, v in packed.items()}
        nothing = np.zeros((rows, slots * width), np.int32)
        packed |= {"item": nothing, "feature": nothing, "feature_value": nothing.astype(np.float32)}
        device = {k: jax.device_put(v, self._sharding) for k, v in packed.items()}
        last = jax.device_put(lengths - 1, jax.NamedSharding(self._sharding.mesh, jax.P(BATCH)))
        scores = np.asarray(self._likelihood_step(self.params, batch, last, device, self._content, slots))
        if mean:
            scores = scores / np.maximum(count, 1)
        return [scores[row, : len(c)] for row, c in enumerate(lists)]


def _items_step(config: ModelConfig, arch: Architecture, sizes: Sizes, num_items: int) -> Callable[..., jax.Array]:
    model = LanguageModel(arch, sizes, config)

    @jax.jit
    def step(variables: Any, batch: dict[str, jax.Array], last: jax.Array, content: jax.Array) -> jax.Array:
        hidden, _, out = read_prompt(model, variables, batch, last, content)
        return jax.nn.log_softmax(item_logits(hidden, out, num_items)[:, 0], axis=-1)

    return step


def _likelihood_step(config: ModelConfig, arch: Architecture, sizes: Sizes) -> Callable[..., jax.Array]:
    model = LanguageModel(arch, sizes, config)

    @partial(jax.jit, static_argnums=5)
    def step(
        variables: Any,
        batch: dict[str, jax.Array],
        last: jax.Array,
        candidates: dict[str, jax.Array],
        content: jax.Array,
        slots: int,
    ) -> jax.Array:
        start, memory, _ = read_prompt(model, variables, batch, last, content)
        inputs = {**candidates, "positions": candidates["positions"] + memory.following[:, None]}
        out = apply(model, variables, inputs, content, memory)
        rows, packed = candidates["tokens"].shape
        width = packed // slots

        # Token 0 of every candidate is predicted by what the prompt left, token j by the candidate's position j - 1.
        first = jnp.broadcast_to(start[:, :, None, :], (rows, slots, 1, arch.width))
        rest = out.hidden.reshape(rows, slots, width, arch.width)[:, :, :-1]
        targets = candidates["tokens"].reshape(rows, slots, width)
        real = candidates["segment_ids"].reshape(rows, slots, width) > 0

        def one_slot(hidden: jax.Array, target: jax.Array, real: jax.Array) -> jax.Array:
            # One candidate slot of every row at a time: logits [B, width, V] instead of [B, slots * width, V].
            return jnp.sum(word_log_prob(hidden, target, out, arch) * real, axis=-1)

        by_slot = tuple(jnp.moveaxis(x, 1, 0) for x in (jnp.concatenate([first, rest], axis=2), targets, real))
        return jax.lax.map(lambda part: one_slot(*part), by_slot).T

    return step
