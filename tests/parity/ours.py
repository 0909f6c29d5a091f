"""The project's side of a parity test: a published folder, loaded and run in fp32 on the current mesh.

Letters: B batch, S sequence (source), T target, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructrec_jax.config import MeshConfig
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.hf.names import entries, inputs, spellings
from instructrec_jax.models.language_model import (
    LanguageModel,
    Memory,
    apply,
    plain_batch,
    pooled,
    read_prompt,
    word_log_prob,
)
from instructrec_jax.training.mesh import make_mesh

LOGITS = 1e-5  # largest absolute difference of a logit or a hidden state
GRADIENTS = 1e-4  # of a gradient

# A loss and its gradient by published parameter name.
Gradients = tuple[float, dict[str, np.ndarray]]


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def assert_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS)


def assert_gradients(arch: Architecture, ours: Gradients, theirs: Gradients) -> None:
    """Equal losses, and equal gradients of every tensor that ``theirs`` names; ours may know more."""
    assert abs(ours[0] - theirs[0]) <= LOGITS
    # Named by whoever wrote the file; a pooling head that no embedding reads has no gradient on either side.
    known = {spelling: value for name, value in ours[1].items() for spelling in spellings(arch.family, name)}
    assert theirs[1]
    for name, gradient in theirs[1].items():
        assert known[name].shape == gradient.shape
        np.testing.assert_allclose(known[name], gradient, rtol=0, atol=GRADIENTS, err_msg=name)


@dataclass(frozen=True)
class Ours:
    """A published folder in this project. Use inside ``jax.set_mesh``."""

    folder: Path

    @cached_property
    def arch(self) -> Architecture:
        return read_config(self.folder)

    @cached_property
    def model(self) -> LanguageModel:
        return LanguageModel(self.arch)

    @cached_property
    def params(self) -> Any:
        return load_params(self.folder, self.arch, dtype="float32")

    # --------------------------------------------------------------------------------------------------------- decoders

    def logits(
        self, tokens: np.ndarray, segments: np.ndarray | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """``[B, S, V]``, zero at padding (segment 0)."""
        segments = np.ones_like(tokens) if segments is None else segments
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        # Batches of a test come in few shapes: a shape is a compilation.
        rows, length = (-size % least for size, least in zip(tokens.shape, (4, 32)))
        batch = [
            np.pad(array, ((0, rows), (0, length)), constant_values=fill)
            for array, fill in ((tokens, 5), (segments, 0), (positions, 0))
        ]
        values = self._run(self._logits, plain_batch(*batch))[: tokens.shape[0], : tokens.shape[1]]
        return _masked(values, segments)

    def cached_logits(self, tokens: np.ndarray, prefix: int, padding: int = 2) -> np.ndarray:
        """Logits ``[B, S - prefix, V]`` of what follows a prompt that was read before, itself padded on the right."""
        rows = tokens.shape[0]
        prompt = np.pad(tokens[:, :prefix], ((0, 0), (0, padding)), constant_values=3)
        real = np.pad(np.ones((rows, prefix), np.int32), ((0, 0), (0, padding)))
        rest = tokens[:, prefix:]
        positions = prefix + np.broadcast_to(np.arange(rest.shape[1]), rest.shape)

        def function(params: Any, prompt: dict, rest: dict) -> jax.Array:
            _, memory, _ = read_prompt(self.model, {"params": params}, prompt, _last(prompt))
            return self._continued(params, rest, memory)

        return self._run(function, plain_batch(prompt, real), plain_batch(rest, None, positions))

    def gradients(self, tokens: np.ndarray, mask: np.ndarray) -> Gradients:
        """Mean cross-entropy of every real token that follows a real token."""
        batch = plain_batch(tokens, mask)
        weight = mask[:, 1:] * mask[:, :-1]
        return self._gradients(lambda p: _mean_cross_entropy(self._logits(p, batch)[:, :-1], tokens[:, 1:], weight))

    def mean_loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy of tokens ``[1, S]`` after the first, in nats; no logits of all positions at once."""

        def function(params: Any, batch: dict) -> jax.Array:
            out = apply(self.model, {"params": params}, batch)
            pieces = np.array_split(np.arange(tokens.shape[1] - 1), 8)
            target = jnp.asarray(tokens[:, 1:])
            return -sum(word_log_prob(out.hidden[:, p], target[:, p], out, self.arch).sum() for p in pieces)

        return float(self._run(function, plain_batch(tokens))) / (tokens.shape[1] - 1)

    def _logits(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.word_logits(apply(self.model, {"params": params}, batch))

    def _continued(self, params: Any, rest: dict[str, jax.Array], memory: Memory) -> jax.Array:
        return self.model.word_logits(apply(self.model, {"params": params}, rest, None, memory))

    # ------------------------------------------------------------------------------------------------- encoder-decoders

    def seq2seq_logits(
        self, source: np.ndarray, source_segments: np.ndarray, target: np.ndarray, target_segments: np.ndarray
    ):
        """Logits ``[B, T, V]`` at the decoder's input tokens (zero at padding) by a training row that holds both sides."""
        rows = training_rows(source, source_segments, target, target_segments)
        return _masked(self._run(lambda p, b: self._at_answers(p, b, rows.at), rows.batch()), target_segments)

    def seq2seq_read_logits(
        self, source: np.ndarray, source_mask: np.ndarray, target: np.ndarray, target_mask: np.ndarray
    ):
        """The same by reading the source (and with it the start token), then continuing with the other tokens."""

        def function(params: Any, prompt: dict, rest: dict) -> jax.Array:
            _, memory, out = read_prompt(self.model, {"params": params}, prompt, _last(prompt))
            return jnp.concatenate([self.model.word_logits(out), self._continued(params, rest, memory)], axis=1)

        rest = target[:, 1:]
        positions = 1 + np.broadcast_to(np.arange(rest.shape[1]), rest.shape)
        parts = plain_batch(source, source_mask), plain_batch(rest, target_mask[:, 1:], positions)
        return _masked(self._run(function, *parts), target_mask)

    def seq2seq_gradients(
        self, source: np.ndarray, source_mask: np.ndarray, target: np.ndarray, target_mask: np.ndarray
    ) -> Gradients:
        """Mean cross-entropy of the target's tokens after the start token."""
        rows = training_rows(source, source_mask, target, target_mask)
        batch, weight = rows.batch(), target_mask[:, 1:] * target_mask[:, :-1]
        return self._gradients(
            lambda p: _mean_cross_entropy(self._at_answers(p, batch, rows.at)[:, :-1], target[:, 1:], weight)
        )

    def _at_answers(self, params: Any, batch: dict[str, jax.Array], at: np.ndarray) -> jax.Array:
        return jnp.take_along_axis(self._logits(params, batch), jnp.asarray(at)[..., None], axis=1)

    # --------------------------------------------------------------------------------------------------------- encoders

    def hidden(
        self, tokens: np.ndarray, segments: np.ndarray, token_types: np.ndarray, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """Hidden states ``[B, S, D]``, zero at padding."""
        batch = plain_batch(tokens, segments, positions, token_types=token_types)
        return _masked(self._run(lambda p, b: apply(self.model, {"params": p}, b).hidden, batch), segments)

    def embedding(self, tokens: np.ndarray, mask: np.ndarray, token_types: np.ndarray) -> np.ndarray:
        """Normalised means ``[B, D]``."""
        return self._run(self._embedding, plain_batch(tokens, mask, token_types=token_types))

    def encoder_gradients(
        self, tokens: np.ndarray, mask: np.ndarray, token_types: np.ndarray, direction: np.ndarray
    ) -> Gradients:
        """Mean over rows of the embedding's dot product with ``direction [B, D]``."""
        batch = plain_batch(tokens, mask, token_types=token_types)
        return self._gradients(lambda p: (self._embedding(p, batch) * direction).sum(-1).mean())

    def _embedding(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return pooled(apply(self.model, {"params": params}, batch).hidden, batch["segment_ids"] > 0)

    # ----------------------------------------------------------------------------------------------------------- common

    def _run(self, function: Callable[..., jax.Array], *arguments: Any) -> np.ndarray:
        return np.asarray(jax.jit(function)(self.params, *arguments))

    def _gradients(self, loss: Callable[[Any], jax.Array]) -> Gradients:
        value, tree = jax.jit(jax.value_and_grad(loss))(self.params)
        return float(value), self._published(jax.tree.map(np.asarray, tree))

    def _published(self, tree: Any) -> dict[str, np.ndarray]:
        """A tree like the parameters under published names and in published shapes."""
        parts: dict[str, dict[int, np.ndarray]] = {}
        for entry in entries(self.arch):
            value = tree
            for key in entry.path:
                value = value[key]
            vocab = self.arch.vocab if entry.path in (("words",), ("word_head",)) else 0
            for layer in range(max(entry.layers, 1)):
                own = value[layer] if entry.layers else value
                piece = entry.theirs(own, vocab, inputs(entry.path[-1]))
                parts.setdefault(entry.published(layer), {})[entry.part[0]] = piece
        return {name: np.concatenate([p[i] for i in range(len(p))], axis=-1) for name, p in parts.items()}


def _masked(values: np.ndarray, segments: np.ndarray) -> np.ndarray:
    return np.where((segments > 0)[..., None], values, 0)


def _last(prompt: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(prompt["segment_ids"] > 0, axis=1) - 1


def _mean_cross_entropy(logits: jax.Array, targets: np.ndarray, weight: np.ndarray) -> jax.Array:
    chosen = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, logits.shape[-1]), axis=-1)
    return -(chosen * weight).sum() / weight.sum()


@dataclass(frozen=True)
class TrainingRows:
    """Pairs as training rows: a segment is its source, then its target without the start token."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    predicts: np.ndarray  # 1 where something is predicted: at the source's last token and on the target
    at: np.ndarray  # [B, T]: the place in the row where each decoder input sits

    def batch(self) -> dict[str, jax.Array]:
        more = {"text_target": self.predicts, "item_target": np.zeros_like(self.predicts)}
        return plain_batch(self.tokens, self.segments, self.positions, **more)


def training_rows(
    source: np.ndarray, source_segments: np.ndarray, target: np.ndarray, target_segments: np.ndarray
) -> TrainingRows:
    """``source [B, S]`` and ``target [B, T]``, whose equal segment numbers (not 0) are pairs, as rows."""
    shape = (source.shape[0], source.shape[1] + target.shape[1])
    tokens, segments, positions, predicts = (np.zeros(shape, np.int32) for _ in range(4))
    at = np.zeros(target.shape, np.int32)
    for row in range(shape[0]):
        begin = 0
        for number in range(1, target_segments[row].max() + 1):
            prompt = source[row, source_segments[row] == number]
            answer = target[row, target_segments[row] == number]
            whole = np.concatenate([prompt, answer[1:]])
            place = slice(begin, begin + len(whole))
            tokens[row, place], segments[row, place], positions[row, place] = whole, number, np.arange(len(whole))
            decoded = begin + len(prompt) - 1 + np.arange(len(answer))
            at[row, target_segments[row] == number] = decoded
            predicts[row, decoded] = 1
            begin += len(whole)
    return TrainingRows(tokens, segments, positions, predicts, at)
