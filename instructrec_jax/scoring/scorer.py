"""``Scorer.score(requests, method)``: scores of every request's candidates, whatever the method.

* ``likelihood``: log P(candidate text | prompt), the paper's method (arXiv 2305.07001, section 2.3).
* ``trie``: the same of the whole catalogue, whose token trie streams through the model in blocks of equal size.
* ``labels``: the candidates are listed in the prompt under letters, and one forward pass reads the letters' logits (LlamaRec,
  arXiv 2311.02089); over k cyclic shifts of the list, so that a place has no advantage.
* ``yesno``: log P(yes) of a question that ends with the candidate (TALLRec, arXiv 2305.00447), all behind one prompt.
* ``items``: the matching head. log softmax over the whole catalogue of f_i · g + θ_i, where g is the hidden state of the last prompt
  position; candidates are read from it.

A request's prompt is computed once and every distinct prefix of its candidates once, in one of two layouts (``scoring/kernel.py``). Prompt
and candidate are tokenised apart, so the border between them is a token border by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float

from instructrec_jax.config import ModelConfig
from instructrec_jax.data.tokenise import pad_to
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.sharding import BATCH
from instructrec_jax.scoring import constrained
from instructrec_jax.scoring.buckets import bucket, groups_by_length
from instructrec_jax.scoring.forest import Blocks, Forest, cut
from instructrec_jax.scoring.kernel import Kernel, Read
from instructrec_jax.scoring.layout import Cost
from instructrec_jax.scoring.requests import Candidates, Reader, Ready, Request
from instructrec_jax.scoring.rows import LEAVES_PER_NODE, Job, Prompt, arrays, pack
from instructrec_jax.scoring.trie import CatalogueTrie

METHODS = ("items", "likelihood", "trie", "labels", "yesno")
Layout = Literal["auto", "packed", "batched"]
Normalise = Literal["sum", "mean", "prior"]
BLOCK = 256  # nodes of a block of the batched layout and of the catalogue's trie

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
    ):
        if layout not in ("auto", "packed", "batched"):
            raise UserError(f"unknown layout {layout!r}", remedy="auto, packed or batched")
        self.params, self._content = params, content
        self._num_items, self._arch, self._layout = num_items, arch, layout
        self.reader = Reader(
            text, titles, max_prompt=max_prompt, max_candidate=min(max_candidate, BLOCK), language=language
        )
        mesh = jax.sharding.get_mesh()
        self._mesh = mesh
        self._shards = mesh.shape["replica"] * mesh.shape["fsdp"]
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._row_tokens = row_tokens or (512 if on_cpu else 1024)
        self._rows = (rows or (1 if on_cpu else 16)) * self._shards
        self._group = 1 if on_cpu else 4  # blocks of a prompt at a time
        self.kernel = Kernel(config, arch, sizes, num_items)
        self._cost = Cost.of(arch)
        self._has_items = bool(sizes.items)
        self._prior: dict[tuple[int, ...], float] = {}
        self._trie: CatalogueTrie | None = None
        self._config, self._sizes = config, sizes
        self._beam_search: Any = None

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
        _one_of(method, METHODS, "scoring method")
        _one_of(normalise, ("sum", "mean", "prior"), "normalisation")
        if method == "items" and not self._has_items:
            raise UserError("this model has no item head", remedy="score by likelihood, or train with item tokens")
        ready = [self.reader.check(number, request) for number, request in enumerate(requests)]
        if method == "items":
            return self._by_items(ready)
        if method == "labels":
            return self._by_labels(ready, shifts)
        if method == "yesno":
            return self._by_verdict(ready)
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(ready)
        whole = [r for r in ready if r.everything or (method == "trie" and r.items is not None and len(r))]
        for r, scores in zip(whole, self._by_trie(whole)):
            out[r.number] = scores if r.everything else scores[r.items]
        listed = [r for r in ready if r not in whole and len(r)] if len(whole) < len(ready) else []
        for r, scores in zip(listed, self._by_likelihood(listed)):
            out[r.number] = scores
        return [self._normalised(r, out[r.number], normalise) for r in ready]

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
        for group, read in self._read_in_groups([self.reader.prompt(p) for p in prompts]):
            mask = None if allowed is None else allowed[group]
            found = self._every(read, len(group), mask, rank=k)
            scores[group], items[group] = (np.asarray(x)[: len(group)] for x in found)
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
        if self._beam_search is None:
            self._beam_search = constrained.beam_search(self._config, self._arch, self._sizes)
        scores = np.full((len(prompts), k), -np.inf, np.float32)
        items = np.zeros((len(prompts), k), np.int64)
        count = len(self.trie)
        for group, read in self._read_in_groups([self.reader.prompt(p) for p in prompts], logits=True):
            mask = np.zeros((read.hidden.shape[0], self.trie.capacity), bool)
            mask[: len(group), :count] = True if allowed is None else allowed[group]
            tree, widths = self.trie.edges_on(self._mesh)
            log_prob, leaf = self._beam_search(
                self.params, read, tree, self._put({"mask": mask})["mask"], self._content, widths=widths, beams=beams
            )
            for row, i in enumerate(group):
                found = self.trie.items_of(np.asarray(leaf)[row], np.asarray(log_prob)[row], mask[row], k)
                scores[i, : len(found[0])], items[i, : len(found[0])] = found
        return scores, items

    @property
    def trie(self) -> CatalogueTrie:
        """The catalogue's trie, built when it is first asked for."""
        if self._trie is None:
            self._trie = CatalogueTrie(self.reader.all_titles(), BLOCK, self._trie_group)
        return self._trie

    def compilations(self) -> int:
        """Shapes that were compiled so far."""
        return sum(self.kernel.compilations().values())

    # ----------------------------------------------------------------------------------------------------------- methods

    def _by_items(self, ready: list[Ready]) -> list[np.ndarray]:
        for r in ready:
            if r.words is not None:
                raise UserError(f"request {r.number}: the item head scores catalogue items, not texts")
        prompts = [self.reader.prompt(r.prompt) for r in ready]
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(ready)
        for group in groups_by_length([len(p["tokens"]) for p in prompts], self._batch_size):
            batch, last = self._prompt_batch([prompts[i] for i in group], self._batch_size)
            scores = np.asarray(self.kernel.items(self.params, batch, last, self._content))[:, : self._num_items]
            for row, i in enumerate(group):
                items = ready[i].items
                out[i] = scores[row] if items is None else scores[row, items]
        return out

    def _by_likelihood(self, ready: list[Ready]) -> list[np.ndarray]:
        jobs, forests = [], []
        for n, r in enumerate(ready):
            forests.append(Forest.build(self.reader.sequences(r)))
            jobs.append(Job(n, self.reader.prompt(r.prompt), forests[-1]))
        leaves = self._leaves(jobs, raw=False)
        return [np.where(f.leaf_of >= 0, found[f.leaf_of], 0).astype(np.float32) for f, found in zip(forests, leaves)]

    def _by_verdict(self, ready: list[Ready]) -> list[np.ndarray]:
        yes, no = self.reader.verdicts()
        # Where the encoder reads the prompt, the frame's end is in it; else it follows the candidate.
        jobs, forests = [], []
        for n, r in enumerate(ready):
            ends = [[*words, word] for words in self.reader.asked(r) for word in (yes, no)]
            forests.append(Forest.build(ends))
            jobs.append(Job(n, self.reader.prompt(r.prompt, framed=False), forests[-1]))
        out = []
        for forest, leaves in zip(forests, self._leaves(jobs, raw=True)):
            logits = (leaves[forest.leaf_of] if len(forest.leaf_of) else leaves[:0]).reshape(-1, 2)
            out.append(-np.logaddexp(0, logits[:, 1] - logits[:, 0]).astype(np.float32))
        return out

    def _by_labels(self, ready: list[Ready], shifts: int) -> list[np.ndarray]:
        if shifts < 1:
            raise UserError(f"shifts = {shifts}: a list is read at least once")
        jobs: list[Job] = []
        owners: list[tuple[int, np.ndarray]] = []
        forests = []
        sizes = [self._num_items if r.everything else len(r) for r in ready]
        for n, (r, size) in enumerate(zip(ready, sizes)):
            times = min(shifts, size)
            for k in range(times):
                # Shifts as far apart as they can be: each candidate visits places over the whole list.
                order = np.roll(np.arange(size), -(k * size // times))
                example, tokens = self.reader.listed(r, order.tolist())
                forests.append(Forest.build([[token] for token in tokens]))
                jobs.append(Job(len(jobs), self.reader.prompt(example), forests[-1]))
                owners.append((n, order))
        out = [np.zeros(size, np.float32) for size in sizes]
        for (n, order), forest, leaves in zip(owners, forests, self._leaves(jobs, raw=True)):
            logits = leaves[forest.leaf_of]
            out[n][order] += (logits - np.logaddexp.reduce(logits)) / min(shifts, sizes[n])
        return out

    def _by_trie(self, ready: list[Ready]) -> list[np.ndarray]:
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(ready)
        for group, read in self._read_in_groups([self.reader.prompt(r.prompt) for r in ready]):
            scores = np.asarray(self._every(read, len(group), None, rank=0))
            for row, i in enumerate(group):
                out[i] = scores[row, : self._num_items]
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
            found = self._leaves([Job(0, self.reader.empty_prompt(), forest)], raw=False)[0]
            self._prior.update(zip(new, np.where(forest.leaf_of >= 0, found[forest.leaf_of], 0).tolist()))
        return (scores - np.asarray([self._prior[tuple(s)] for s in sequences])).astype(np.float32)

    # ----------------------------------------------------------------------------------------------------------- layouts

    def _leaves(self, jobs: list[Job], *, raw: bool) -> list[np.ndarray]:
        """The leaves' scores of every job, by the layout that is told or cheaper."""
        out: list[np.ndarray] = [np.zeros(max(len(j.forest.leaf_token), 1), np.float32) for j in jobs]
        jobs = [j for j in jobs if len(j.forest.leaf_token)]
        batched = [j for j in jobs if self._is_batched(j)]
        chosen = {j.number for j in batched}
        for number, scores in self._packed([j for j in jobs if j.number not in chosen], raw):
            out[number] = scores
        for number, scores in self._batched(batched, raw):
            out[number] = scores
        return out

    def _is_batched(self, job: Job) -> bool:
        if self._layout != "auto":
            return self._layout == "batched"
        prompt, nodes = len(job.prompt["tokens"]), len(job.forest)
        return self._cost.batched(prompt, nodes, BLOCK) < self._cost.packed(prompt, nodes, self._row_tokens)

    def _packed(self, jobs: list[Job], raw: bool) -> list[tuple[int, np.ndarray]]:
        """(job number, leaf scores) by rows that hold prompts and candidates."""
        out: list[tuple[int, np.ndarray]] = []
        sizes: dict[int, list[Job]] = {}
        for job in jobs:
            sizes.setdefault(max(bucket(self._room(job)), self._row_tokens), []).append(job)
        if len(jobs) == 1:
            sizes = {bucket(self._room(jobs[0])): jobs}
        by_number = {j.number: j for j in jobs}
        start = self._arch.decoder_start if self._arch.kind == "encoder-decoder" else None
        pending = []
        for size, some in sorted(sizes.items()):
            source = bucket(max(len(j.prompt["tokens"]) for j in some), size) if start is not None else 0
            rows = pack(some, size, start, source)
            # A few requests are no full batch; many are, and so is their last one, for the sake of one shape.
            count = min(self._rows, -(-bucket(len(rows), 1, steps=1) // self._shards) * self._shards)
            for first in range(0, len(rows), count):
                part = arrays(rows[first : first + count], count, size, source)
                scores = self.kernel.packed(
                    self.params, self._put(part.batch), self._put(part.tree), np.int32(part.reads), self._content,
                    raw=raw,
                )  # fmt: skip
                pending.append((part.leaves, scores))  # dispatched: the host goes on with the next rows
        for places, scores in pending:
            found = np.asarray(scores)
            for number, row, leaf in places:
                out.append((number, found[row, leaf : leaf + len(by_number[number].forest.leaf_token)]))
        return out

    def _room(self, job: Job) -> int:
        """Nodes of a row that holds the job alone."""
        nodes = len(job.forest) + 1 if self._arch.kind == "encoder-decoder" else job.nodes
        return max(nodes, -(-len(job.forest.leaf_token) // LEAVES_PER_NODE))

    def _batched(self, jobs: list[Job], raw: bool) -> list[tuple[int, np.ndarray]]:
        """(job number, leaf scores) by rows that continue the prompts' cache."""
        out = []
        cuts = [cut(j.forest, BLOCK, LEAVES_PER_NODE * BLOCK) for j in jobs]
        for group, read in self._read_in_groups([j.prompt for j in jobs]):
            prompts = read.hidden.shape[0]
            # A prompt on every device has its blocks over the mesh, as many at a time as there are shards.
            most = max(len(cuts[i]) for i in group)
            at_once = self._trie_group if prompts % self._shards else min(self._group, bucket(most, 1, steps=1))
            room = bucket(-(-most // at_once), 1, steps=1) * at_once
            number = np.int32(-(-most // at_once) * at_once)
            blocks = self._put(_stacked([cuts[i] for i in group], prompts, room))
            found = np.asarray(
                self.kernel.blocks(self.params, read, blocks, number, self._content, group=at_once, raw=raw)
            )
            out += [(jobs[i].number, found[row, cuts[i].slot]) for row, i in enumerate(group)]
        return out

    # ----------------------------------------------------------------------------------------------------------- prompts

    def _read_in_groups(self, prompts: list[Prompt], *, logits: bool = False) -> Iterator[tuple[np.ndarray, Read]]:
        """Prompts read in batches of like length: (indices, what was read).

        Where there are fewer prompts than shards of the batch, each is read alone and lies on every device, so that the rows that
        continue it can lie over the mesh.
        """
        alone = len(prompts) < self._shards
        for group in groups_by_length([len(p["tokens"]) for p in prompts], 1 if alone else self._rows):
            batch, last = self._prompt_batch([prompts[i] for i in group], self._rows)
            yield group, self.kernel.read(self.params, batch, last, self._content, alone=alone, logits=logits)

    def _prompt_batch(self, prompts: list[Prompt], most: int) -> tuple[dict[str, jax.Array], jax.Array]:
        """Padded prompt arrays on the mesh, and the index of each row's last token."""
        # Either a full batch or the next power of two: two row counts per length at most.
        wanted = most if len(prompts) > most // 2 else bucket(len(prompts), 1, steps=1)
        rows = -(-wanted // self._shards) * self._shards
        length = bucket(max(len(p["tokens"]) for p in prompts), 16)
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(p["tokens"]) for p in prompts]
        batch = pad_to(prompts, rows, length)
        batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        batch["segment_ids"] = (batch["positions"] < lengths[:, None]).astype(np.int32)
        return self._put(batch), self._put({"last": lengths - 1})["last"]

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows on the mesh: sharded over the batch, or on every device if they do not divide."""
        rows = len(next(iter(batch.values())))
        first = BATCH if rows % self._shards == 0 else None
        return {
            k: jax.device_put(v, jax.NamedSharding(self._mesh, jax.P(first, *(None,) * (v.ndim - 1))))
            for k, v in batch.items()
        }

    @property
    def _trie_group(self) -> int:
        return -(-self._group // self._shards) * self._shards

    def _every(self, read: Read, count: int, allowed: np.ndarray | None, *, rank: int) -> Any:
        trie = self.trie
        rows = read.hidden.shape[0]
        mask = None
        if allowed is not None:
            wide = np.zeros((rows, trie.capacity), bool)
            wide[:count, : allowed.shape[1]] = allowed
            mask = self._put({"allowed": wide})["allowed"]
        blocks, slots, number = trie.on(self._mesh)
        return self.kernel.every(
            self.params, read, blocks, number, slots, self._content, mask, group=trie.group, rank=rank
        )


def _stacked(cuts: list[Blocks], rows: int, most: int) -> dict[str, np.ndarray]:
    """Each request's blocks, filled up to ``most``: ``[rows, most, S]``."""
    some = cuts[0]
    out = {}
    for name, fill in (
        ("tokens", 0), ("depth", 0), ("until", 0), ("parent", BLOCK), ("leaf_parent", BLOCK), ("leaf_token", 0),
    ):  # fmt: skip
        table = np.full((rows, most, getattr(some, name).shape[1]), fill, np.int32)
        for row, blocks in enumerate(cuts):
            table[row, : len(blocks)] = getattr(blocks, name)
        out[name] = table
    return out


def _one_of(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise UserError(f"unknown {what} {value!r}{did_you_mean(value, known)}", remedy=f"one of {', '.join(known)}")
