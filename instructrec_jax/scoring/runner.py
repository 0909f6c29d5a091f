"""Jobs to device batches: which layout, how many rows, in which shapes. What the scores mean is the scorer's affair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from instructrec_jax.config import ModelConfig
from instructrec_jax.data.tokenise import pad_to
from instructrec_jax.errors import UserError
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.sharding import BATCH, fetch, put
from instructrec_jax.scoring.buckets import bucket, groups_by_length
from instructrec_jax.scoring.forest import cut, stacked
from instructrec_jax.scoring.kernel import Kernel, Read
from instructrec_jax.scoring.layout import Cost
from instructrec_jax.scoring.rows import LEAVES_PER_NODE, WORTH_SHARING, Job, Prompt, arrays, pack, shared_prefix
from instructrec_jax.scoring.trie import CatalogueTrie

Layout = Literal["auto", "packed", "batched"]
BLOCK = 256  # nodes of a block of the batched layout and of the catalogue's trie
ROOM = 16  # blocks of a request that there is always room for: how many are computed is no matter of shape
SHORTEST = 128  # prompts of the batched layout are padded to at least this


class Runner:
    """Runs jobs of one model on the current mesh; see ``Scorer`` for the arguments.

    Raises:
        UserError: unknown layout.
    """

    def __init__(
        self,
        config: ModelConfig,
        arch: Architecture,
        sizes: Sizes,
        params: Any,
        content: jax.Array,
        num_items: int,
        *,
        batch_size: int,
        row_tokens: int | None,
        rows: int | None,
        layout: Layout,
        between: Callable[[], None] = lambda: None,
    ):
        if layout not in ("auto", "packed", "batched"):
            raise UserError(f"unknown layout {layout!r}", remedy="auto, packed or batched")
        self.params, self.content, self.layout, self._between = params, content, layout, between
        self._arch, self._cost = arch, Cost.of(arch)
        self.encodes = arch.kind == "encoder-decoder"
        self.kernel = Kernel(config, arch, sizes, num_items)
        mesh = jax.sharding.get_mesh()
        self._mesh = mesh
        self._shards = mesh.shape["replica"] * mesh.shape["fsdp"]
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._row_tokens = row_tokens or (512 if on_cpu else 1024)
        self._rows = (rows or (1 if on_cpu else 16)) * self._shards
        self._group = 1 if on_cpu else 4  # blocks of a prompt at a time

    def items(self, prompts: list[Prompt]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices of some prompts, their log probabilities over the padded catalogue)."""
        for group in groups_by_length([len(p["tokens"]) for p in prompts], self._batch_size):
            self._between()
            batch, last = self._prompt_batch([prompts[i] for i in group], self._batch_size, 16)
            yield group, fetch(self.kernel.items(self.params, batch, last, self.content))

    def reranked(self, prompts: list[Prompt], lists: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """(index of a prompt, re-ranking logits of its list of catalogue indices), for lists that are not empty."""
        asked = [i for i, items in enumerate(lists) if len(items)]
        for group in groups_by_length([len(prompts[i]["tokens"]) for i in asked], self._batch_size):
            self._between()
            chosen = [asked[i] for i in group]
            batch, last = self._prompt_batch([prompts[i] for i in chosen], self._batch_size, 16)
            most = bucket(max(len(lists[i]) for i in chosen), SHORTEST, steps=1)
            candidates = np.zeros((last.shape[0], most), np.int32)
            for row, i in enumerate(chosen):
                candidates[row, : len(lists[i])] = lists[i]
            on_mesh = self.put({"candidates": candidates})["candidates"]
            logits = fetch(self.kernel.rerank(self.params, batch, last, on_mesh, self.content))
            for row, i in enumerate(chosen):
                yield i, logits[row, : len(lists[i])]

    # ----------------------------------------------------------------------------------------------------------- layouts

    def leaves(self, jobs: list[Job], *, raw: bool) -> list[np.ndarray]:
        """The leaves' scores of every job, by the layout that is told or cheaper."""
        out: list[np.ndarray] = [np.zeros(max(len(j.forest.leaf_token), 1), np.float32) for j in jobs]
        jobs = [j for j in jobs if len(j.forest.leaf_token)]
        shared = 0 if self.encodes else shared_prefix([j.prompt for j in jobs])
        shared = shared if shared >= WORTH_SHARING else 0
        room = self._cost.room(float(np.mean([j.nodes for j in jobs])) if jobs else 0.0, shared, self._row_tokens)
        batched = [j for j in jobs if self._is_batched(j, shared, room)]
        chosen = {j.number for j in batched}
        for number, scores in self._packed([j for j in jobs if j.number not in chosen], raw, room):
            out[number] = scores
        for number, scores in self._batched(batched, raw):
            out[number] = scores
        return out

    def _is_batched(self, job: Job, shared: int, room: int) -> bool:
        if self.layout != "auto":
            return self.layout == "batched"
        prompt, nodes = len(job.prompt["tokens"]), len(job.forest)
        return self._cost.batched(prompt, nodes, BLOCK) < self._cost.packed(max(prompt - shared, 0), nodes, room)

    def _packed(self, jobs: list[Job], raw: bool, room: int) -> list[tuple[int, np.ndarray]]:
        """(job number, leaf scores) by rows that hold prompts and candidates."""
        out: list[tuple[int, np.ndarray]] = []
        sizes: dict[int, list[Job]] = {}
        for job in jobs:
            sizes.setdefault(max(bucket(self._room(job)), room), []).append(job)
        if len(jobs) == 1:
            sizes = {bucket(self._room(jobs[0])): jobs}
        by_number = {j.number: j for j in jobs}
        start = self._arch.decoder_start if self.encodes else None
        pending = []
        for size, some in sorted(sizes.items()):
            source = bucket(max(len(j.prompt["tokens"]) for j in some), size) if start is not None else 0
            rows = pack(some, size, start, source)
            # A few requests are no full batch; many are, and so is their last one, for the sake of one shape.
            count = min(self._rows, -(-bucket(len(rows), 1, steps=1) // self._shards) * self._shards)
            for first in range(0, len(rows), count):
                part = arrays(rows[first : first + count], count, size, source)
                scores = self.kernel.packed(
                    self.params, self.put(part.batch), self.put(part.tree), np.int32(part.reads), self.content,
                    raw=raw,
                )  # fmt: skip
                pending.append((part.leaves, scores))  # dispatched: the host goes on with the next rows
        for places, scores in pending:
            self._between()
            found = fetch(scores)
            for number, row, leaf in places:
                out.append((number, found[row, leaf : leaf + len(by_number[number].forest.leaf_token)]))
        return out

    def _room(self, job: Job) -> int:
        """Nodes of a row that holds the job alone."""
        nodes = len(job.forest) + 1 if self.encodes else job.nodes
        return max(nodes, -(-len(job.forest.leaf_token) // LEAVES_PER_NODE))

    def _batched(self, jobs: list[Job], raw: bool) -> list[tuple[int, np.ndarray]]:
        """(job number, leaf scores) by rows that continue the prompts' cache."""
        out = []
        cuts = [cut(j.forest, BLOCK, LEAVES_PER_NODE * BLOCK) for j in jobs]
        for group, read in self.read([j.prompt for j in jobs]):
            prompts = read.hidden.shape[0]
            # A prompt on every device has its blocks over the mesh, as many at a time as there are shards.
            most = max(len(cuts[i]) for i in group)
            at_once = self.trie_group if prompts % self._shards else min(self._group, bucket(most, 1, steps=1))
            room = -(-bucket(most, ROOM, steps=1) // at_once) * at_once
            number = np.int32(-(-most // at_once) * at_once)
            blocks = self.put(stacked([cuts[i] for i in group], prompts, room))
            self._between()
            found = fetch(self.kernel.blocks(self.params, read, blocks, number, self.content, group=at_once, raw=raw))
            out += [(jobs[i].number, found[row, cuts[i].slot]) for row, i in enumerate(group)]
        return out

    # ----------------------------------------------------------------------------------------------------------- prompts

    def read(self, prompts: list[Prompt], *, logits: bool = False) -> Iterator[tuple[np.ndarray, Read]]:
        """Prompts read in batches of like length: (indices, what was read).

        Where there are fewer prompts than shards of the batch, each is read alone and lies on every device, so that the rows that
        continue it can lie over the mesh.
        """
        alone = len(prompts) < self._shards
        for group in groups_by_length([len(p["tokens"]) for p in prompts], 1 if alone else self._rows):
            batch, last = self._prompt_batch([prompts[i] for i in group], self._rows, SHORTEST)
            yield group, self.kernel.read(self.params, batch, last, self.content, alone=alone, logits=logits)

    def _prompt_batch(self, prompts: list[Prompt], most: int, shortest: int) -> tuple[dict[str, jax.Array], jax.Array]:
        """Padded prompt arrays on the mesh, and the index of each row's last token."""
        # Either a full batch or the next power of two: two row counts per length at most.
        wanted = most if len(prompts) > most // 2 else bucket(len(prompts), 1, steps=1)
        rows = -(-wanted // self._shards) * self._shards
        length = bucket(max(len(p["tokens"]) for p in prompts), shortest)
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(p["tokens"]) for p in prompts]
        batch = pad_to(prompts, rows, length)
        batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        batch["segment_ids"] = (batch["positions"] < lengths[:, None]).astype(np.int32)
        return self.put(batch), self.put({"last": lengths - 1})["last"]

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows on the mesh: sharded over the batch, or on every device if they do not divide."""
        rows = len(next(iter(batch.values())))
        first = BATCH if rows % self._shards == 0 else None
        return {
            k: put(v, jax.NamedSharding(self._mesh, jax.P(first, *(None,) * (v.ndim - 1)))) for k, v in batch.items()
        }

    @property
    def trie_group(self) -> int:
        """Blocks of a catalogue's trie that are computed at a time."""
        return -(-self._group // self._shards) * self._shards

    def every(self, read: Read, trie: CatalogueTrie, allowed: np.ndarray | None, *, rank: int) -> Any:
        """Scores of the whole catalogue, or the best; see ``Kernel.every``. ``allowed [B, I]`` may have fewer rows than ``read``."""
        mask = None if allowed is None else self.put({"allowed": _grown(allowed, read, trie)})["allowed"]
        blocks, slots, number = trie.on(self._mesh)
        return self.kernel.every(
            self.params, read, blocks, number, slots, self.content, mask, group=trie.group, rank=rank
        )

    def beams(self, read: Read, trie: CatalogueTrie, allowed: np.ndarray, beams: int) -> tuple[np.ndarray, np.ndarray]:
        """(log probabilities, leaves) of a constrained beam search, ``[B, W]``. ``read`` has its logits."""
        tree, widths = trie.edges_on(self._mesh)
        mask = self.put({"allowed": _grown(allowed, read, trie)})["allowed"]
        found = self.kernel.beams(self.params, read, tree, mask, self.content, widths=widths, beams=beams)
        return fetch(found[0]), fetch(found[1])


def _grown(allowed: np.ndarray, read: Read, trie: CatalogueTrie) -> np.ndarray:
    """An allow set with the rows of a batch and the places of a size class."""
    wide = np.zeros((read.hidden.shape[0], trie.capacity), bool)
    wide[: len(allowed), : allowed.shape[1]] = allowed
    return wide
