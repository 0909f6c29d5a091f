"""``Scorer.score(requests, method)``: scores of every request's candidates, whatever the method.

* ``likelihood``: log P(candidate text | prompt), the paper's method (arXiv 2305.07001, section 2.3).
* ``trie``: the same of the whole catalogue, whose token trie streams through the model in blocks of equal size.
* ``labels``: the candidates are listed in the prompt under letters, and one forward pass reads the letters' logits (LlamaRec,
  arXiv 2311.02089); over k cyclic shifts of the list, so that a place has no advantage.
* ``yesno``: log P(yes) of a question that ends with the candidate (TALLRec, arXiv 2305.00447), all behind one prompt.
* ``items``: the matching head. log softmax over the whole catalogue of f_i · g + θ_i, where g is the hidden state of the last prompt
  position; candidates are read from it.
* ``rerank``: the re-ranking head. log softmax over the request's candidates of θᵀσ(f_i + g) + β_i, which a model has if it was trained
  with ``model.rerank_head``.

A request's prompt is computed once and every distinct prefix of its candidates once, in one of two layouts (``scoring/kernel.py``). Prompt
and candidate are tokenised apart, so the border between them is a token border by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from instructrec_jax.config import ModelConfig
from instructrec_jax.data.mixture import Space
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.sharding import fetch
from instructrec_jax.scoring.forest import Forest
from instructrec_jax.scoring.item_memory import ItemMemory
from instructrec_jax.scoring.prepare import Normalise, Prepared, prepare
from instructrec_jax.scoring.requests import Candidates, Reader, Ready, Request
from instructrec_jax.scoring.rows import Job
from instructrec_jax.scoring.runner import BLOCK, Layout, Runner
from instructrec_jax.scoring.trie import CatalogueTrie
from instructrec_jax.scoring.wish_words import WishWords

METHODS = ("items", "rerank", "likelihood", "trie", "labels", "yesno")

__all__ = ["METHODS", "Candidates", "Request", "Scorer"]


class Scorer:
    """Scores requests with given parameters. Build it, and call it, inside ``jax.set_mesh``.

    Args:
        config, arch, sizes: the model.
        params: its variables ({"params": ..., "lora": ...}), on the mesh.
        content: item features ``[I, Fc]`` on the mesh, padded like the item table.
        num_items: real items in the padded table.
        text: the tokeniser.
        titles: candidate texts, one per item.
        batch_size: most prompts in one device batch where each has a row of its own.
        max_prompt: prompts longer than this many tokens keep ``<bos>`` and their newest tokens.
        max_candidate: candidates longer than this many tokens are cut before ``<eos>``.
        row_tokens: size of a packed row; None = 512 on a CPU, 1,024 elsewhere.
        rows: packed rows per device in one batch; None = 1 on a CPU, 16 elsewhere.
        layout: "packed", "batched", or what the cost model says of each request.
        language: of the words that ``labels`` and ``yesno`` put behind a prompt.
        space: of a catalogue of a mixture: where it lies in the model's. Items are numbered within it, and it alone is ranked.
        between: called between device batches; what it raises ends the scoring.
        memory: links between items that count beside the matching head (``items``).
        words: the match of a wish's words, which counts there too.

    With several processes all make the same calls, with the same requests, and all get the scores.
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
        max_candidate: int = 128,
        row_tokens: int | None = None,
        rows: int | None = None,
        layout: Layout = "auto",
        language: str = "en",
        space: Space | None = None,
        between: Callable[[], None] = lambda: None,
        memory: ItemMemory | None = None,
        words: WishWords | None = None,
    ):
        self.memory, self.words = memory, words
        self._num_items, self._has_items = num_items, bool(sizes.items)
        self._first = space.items[0] if space else None
        self._has_rerank = self._has_items and config.rerank_head
        self.reader = Reader(
            text,
            titles,
            max_prompt=max_prompt,
            max_candidate=min(max_candidate, BLOCK),
            language=language,
            space=space,
        )
        self.runner = Runner(
            config, arch, sizes, params, content, sizes.spaces[-1] if sizes.spaces else num_items,
            batch_size=batch_size, row_tokens=row_tokens, rows=rows, layout=layout, between=between,
        )  # fmt: skip
        self._prior: dict[tuple[int, ...], float] = {}
        self._trie: CatalogueTrie | None = None

    # ------------------------------------------------------------------------------------------------------------ public

    def score(
        self,
        requests: Sequence[Request],
        method: str = "items",
        *,
        normalise: Normalise = "sum",
        shifts: int = 1,
    ) -> list[Float[np.ndarray, " C"]]:
        """Scores of every request's candidates, in the order given; an empty candidate list gives an empty array.

        Args:
            requests: prompts with candidates.
            method: one of ``METHODS``; ``likelihood`` of the whole catalogue is ``trie``.
            normalise: ``likelihood`` and ``trie``: the sum over a candidate's tokens, their mean, or the sum less
                log P(candidate | empty prompt).
            shifts: ``labels``: cyclic shifts of the list; at most one per candidate. Their log probabilities are averaged.

        Raises:
            UserError: unknown method, a candidate outside the catalogue, or what a method cannot score.
        """
        return self.run(self.prepare(requests, method, normalise=normalise, shifts=shifts))

    def prepare(
        self,
        requests: Sequence[Request],
        method: str = "items",
        *,
        normalise: Normalise = "sum",
        shifts: int = 1,
    ) -> Prepared:
        """The host's part of ``score``, for a thread of its own; ``run`` is the device's. Arguments and errors as in ``score``."""
        _one_of(method, METHODS, "scoring method")
        _one_of(normalise, ("sum", "mean", "prior"), "normalisation")
        if method == "items" and not self._has_items:
            raise UserError("this model has no item head", remedy="score by likelihood, or train with item tokens")
        if method == "rerank" and not self._has_rerank:
            raise UserError("this model has no re-ranking head", remedy="train with model.rerank_head: true")
        return prepare(self.reader, requests, method, normalise, shifts, self.runner.encodes)

    def run(self, prepared: Prepared) -> list[Float[np.ndarray, " C"]]:
        """Scores of what ``prepare`` made ready."""
        by = {"items": self._by_items, "rerank": self._by_rerank, "labels": self._by_labels, "yesno": self._by_verdict}
        return by.get(prepared.method, self._by_likelihood)(prepared)

    def score_all(self, prompts: Sequence[InstructionExample]) -> Float[np.ndarray, "B I"]:
        """The matching head over the whole catalogue, as one array."""
        scores = self.score([Request(p) for p in prompts], "items")
        return np.stack(scores) if scores else np.zeros((0, self._num_items), np.float32)

    def top_k(
        self, prompts: Sequence[Any], k: int, *, allowed: Bool[np.ndarray, "B I"] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k likeliest items of the whole catalogue by ``trie``: (scores, catalogue indices), ``[B, k]`` each, best first.

        Args:
            prompts: as in ``Request``.
            k: length of the lists, at most the catalogue.
            allowed: per request, which items may be ranked; places that no item fills have the score -inf.
        """
        k = min(k, self._num_items)
        scores, items = np.zeros((len(prompts), k), np.float32), np.zeros((len(prompts), k), np.int64)
        for group, read in self.runner.read([self.reader.prompt(p) for p in prompts]):
            found = self.runner.every(read, self.trie, None if allowed is None else allowed[group], rank=k)
            scores[group], items[group] = (fetch(x)[: len(group)] for x in found)
        return scores, items

    def beam_search(
        self, prompts: Sequence[Any], k: int, *, beams: int = 64, allowed: Bool[np.ndarray, "B I"] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``top_k``, by a beam search that can only produce (allowed) catalogue items; see ``scoring/constrained.py``.

        Args:
            prompts, k, allowed: as in ``top_k``.
            beams: W, at least k; compiled once per width.

        Raises:
            UserError: fewer beams than wanted items.
        """
        if beams < k:
            raise UserError(f"beams = {beams} are fewer than k = {k}", remedy=f"--beams {k} or more")
        scores = np.full((len(prompts), k), -np.inf, np.float32)
        items = np.zeros((len(prompts), k), np.int64)
        count = len(self.trie)
        for group, read in self.runner.read([self.reader.prompt(p) for p in prompts], logits=True):
            mask = np.zeros((read.hidden.shape[0], self.trie.capacity), bool)
            mask[: len(group), :count] = True if allowed is None else allowed[group]
            log_prob, leaf = self.runner.beams(read, self.trie, mask, beams)
            for row, i in enumerate(group):
                found = self.trie.items_of(np.asarray(leaf)[row], np.asarray(log_prob)[row], mask[row], k)
                scores[i, : len(found[0])], items[i, : len(found[0])] = found
        return scores, items

    @property
    def trie(self) -> CatalogueTrie:
        """The catalogue's trie, built when it is first asked for."""
        if self._trie is None:
            self._trie = CatalogueTrie(self.reader.all_titles(), BLOCK, self.runner.trie_group)
        return self._trie

    def compilations(self) -> int:
        """Shapes that were compiled so far."""
        return sum(self.runner.kernel.compilations().values())

    # ----------------------------------------------------------------------------------------------------------- methods

    def _by_items(self, p: Prepared) -> list[np.ndarray]:
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(p.ready)
        for group, scores in self.runner.items(p.prompts):
            first = self._first or 0
            scores = scores[: len(group), first : first + self._num_items]
            if self._first is not None:
                scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
            if beside := [b for b in (self.memory, self.words) if b is not None]:
                scores = added(scores, [b.scores([p.ready[i].prompt for i in group]) for b in beside])
            for row, i in enumerate(group):
                items = p.ready[i].items
                out[i] = scores[row] if items is None else scores[row, items]
        return out

    def _by_rerank(self, p: Prepared) -> list[np.ndarray]:
        every = np.arange(self._num_items)
        lists = [(every if r.items is None else r.items) + (self._first or 0) for r in p.ready]
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(p.ready)
        for i, logits in self.runner.reranked(p.prompts, lists):
            out[i] = logits - np.logaddexp.reduce(logits)
        return out

    def _by_likelihood(self, p: Prepared) -> list[np.ndarray]:
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(p.ready)
        for group, read in self.runner.read(p.prompts):
            scores = fetch(self.runner.every(read, self.trie, None, rank=0))
            for row, i in enumerate(group):
                items = p.ready[p.asked[i]].items
                out[p.asked[i]] = scores[row, : self._num_items] if items is None else scores[row, items]
        for job, number, found in zip(p.jobs, p.owners, self.runner.leaves(p.jobs, raw=False)):
            out[number] = _of_candidates(job.forest, found)
        return [self._normalised(r, scores, p.normalise) for r, scores in zip(p.ready, out)]

    def _by_verdict(self, p: Prepared) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = [[] for _ in p.ready]
        for job, number, leaves in zip(p.jobs, p.owners, self.runner.leaves(p.jobs, raw=True)):
            logits = leaves[job.forest.leaf_of].reshape(-1, 2)
            found[number].append(-np.logaddexp(0, logits[:, 1] - logits[:, 0]).astype(np.float32))
        return [np.concatenate([np.zeros(0, np.float32), *parts]) for parts in found]

    def _by_labels(self, p: Prepared) -> list[np.ndarray]:
        out = [np.zeros(p.size(r.number, self._num_items), np.float32) for r in p.ready]
        times = np.bincount(p.owners, minlength=len(out))
        for job, number, order, leaves in zip(p.jobs, p.owners, p.orders, self.runner.leaves(p.jobs, raw=True)):
            logits = leaves[job.forest.leaf_of]
            out[number][order] += (logits - np.logaddexp.reduce(logits)) / times[number]
        return out

    def _normalised(self, ready: Ready, scores: np.ndarray, how: Normalise) -> np.ndarray:
        if how == "sum" or not len(scores):
            return scores
        sequences = self.reader.sequences(ready)
        if how == "mean":
            return (scores / np.maximum([len(s) for s in sequences], 1)).astype(np.float32)
        new = sorted({tuple(s) for s in sequences} - self._prior.keys())
        if new:
            forest = Forest.build(new)
            found = self.runner.leaves([Job(0, self.reader.empty_prompt(), forest)], raw=False)[0]
            self._prior.update(zip(new, _of_candidates(forest, found).tolist()))
        return (scores - np.asarray([self._prior[tuple(s)] for s in sequences])).astype(np.float32)


def added(log_prob: Float[np.ndarray, "B I"], scores: Sequence[Float[np.ndarray, "B I"]]) -> Float[np.ndarray, "B I"]:
    """Log probabilities of the matching head with further scores among its logits."""
    logits = sum(scores, start=log_prob)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def _of_candidates(forest: Forest, leaves: np.ndarray) -> np.ndarray:
    """Scores of a forest's candidates; one without tokens is certain."""
    return np.where(forest.leaf_of >= 0, leaves[forest.leaf_of], 0).astype(np.float32)


def _one_of(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise UserError(f"unknown {what} {value!r}{did_you_mean(value, known)}", remedy=f"one of {', '.join(known)}")
