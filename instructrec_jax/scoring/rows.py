"""Rows for the packed layout: requests with their candidates under a tree mask, several to a row where they fit.

A row is a forest too: prompts are its trunks, and a prompt that begins like the one before it shares those nodes with it, so that a
system prefix is computed once per row. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from instructrec_jax.scoring.forest import ROOT, Forest

FIELDS = {"tokens": np.int32, "item": np.int32, "feature": np.int32, "feature_value": np.float32}
WORTH_SHARING = 32  # prompt tokens
LEAVES_PER_NODE = 2  # leaves of a row, as a multiple of its nodes
Prompt = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """A prompt with the forest of what may follow it. ``number`` is the caller's."""

    number: int
    prompt: Prompt
    forest: Forest

    @property
    def nodes(self) -> int:
        """Tokens to compute, if nothing is shared with another request."""
        return len(self.prompt["tokens"]) + len(self.forest)


@dataclass
class Row:
    """A row that is being filled. ``source``: the encoder reads the prompts, and the row holds the decoder's side."""

    size: int
    start: int | None = None  # encoder-decoder: the decoder's first token
    source_size: int = 0
    jobs: list[Job] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)  # leading prompt tokens that each job shares with the one before it
    used: int = 0
    leaves: int = 0
    source_used: int = 0

    def cost(self, job: Job) -> tuple[int, int, int]:
        """(nodes, source tokens, shared prompt tokens) that the job would add."""
        shared = common_prefix(self.jobs[-1].prompt, job.prompt) if self.jobs else 0
        length = len(job.prompt["tokens"])
        if self.start is None:
            return job.nodes - shared, 0, shared
        same = shared == length == len(self.jobs[-1].prompt["tokens"]) if self.jobs else False
        return len(job.forest) + (0 if same else 1), 0 if same else length, int(same)

    def fits(self, job: Job) -> bool:
        """Whether there is room."""
        nodes, source, _ = self.cost(job)
        return (
            self.used + nodes <= self.size
            and self.leaves + len(job.forest.leaf_token) <= LEAVES_PER_NODE * self.size
            and self.source_used + source <= self.source_size * (self.start is not None)
        )

    def add(self, job: Job) -> None:
        """Put the job in."""
        nodes, source, shared = self.cost(job)
        self.jobs.append(job)
        self.shared.append(shared)
        self.used += nodes
        self.source_used += source
        self.leaves += len(job.forest.leaf_token)


def common_prefix(a: Prompt, b: Prompt) -> int:
    """Number of leading tokens, words or soft, that two prompts have in common."""
    n = min(len(a["tokens"]), len(b["tokens"]))
    same = np.ones(n, bool)
    for key in FIELDS:
        same &= a[key][:n] == b[key][:n]
    return n if same.all() else int(np.argmin(same))


def shared_prefix(prompts: Sequence[Prompt]) -> int:
    """Leading tokens that prompts have in common with the one most like them (the median of neighbours in the order of tokens)."""
    order = sorted(prompts, key=lambda p: p["tokens"].astype(">i4").tobytes())
    return int(np.median([common_prefix(a, b) for a, b in pairwise(order)])) if len(order) > 1 else 0


def pack(
    jobs: Iterable[Job], size: int, start: int | None = None, source_size: int = 0, look_back: int = 16
) -> list[Row]:
    """Jobs in rows of ``size`` nodes, long ones first.

    Each goes into the row of the newest ``look_back`` with whose last prompt it shares most, and among like ones into the fullest.
    """
    rows: list[Row] = []
    for job in sorted(jobs, key=lambda j: -j.nodes):
        fitting = [row for row in rows[-look_back:] if row.fits(job)]
        # A few tokens in common, such as a template's first words, are not worth a hole in another row.
        best = max(fitting, key=lambda row: (row.cost(job)[2] // WORTH_SHARING, row.used), default=None)
        if best is None:
            best = Row(size, start, source_size)
            rows.append(best)
        best.add(job)
    return rows


@dataclass(frozen=True)
class Packed:
    """B rows as arrays, and where each job's leaves are.

    ``batch``: what the model reads, ``[B, S]`` each. ``tree``: what is read from it: ``reads [B, S]`` nodes whose next-token
    distribution is needed, ``read_of [B, S]`` their index in it, ``parent [B, S]`` of every candidate's node (S = not one),
    ``leaf_node, leaf_token [B, E]``.
    """

    batch: dict[str, np.ndarray]
    tree: dict[str, np.ndarray]
    reads: int  # most of any row
    leaves: list[tuple[int, int, int]]  # (number of the job, row, first leaf)


def arrays(rows: Sequence[Row], count: int, size: int, source_size: int = 0) -> Packed:
    """``rows`` as arrays of ``count`` rows."""
    b = {k: np.zeros((count, size), v) for k, v in FIELDS.items()}
    b |= {k: np.zeros((count, size), np.int32) for k in ("positions", "segment_ids", "until")}
    encodes = any(row.start is not None for row in rows)
    if encodes:
        names = {**FIELDS, "positions": np.int32, "segment_ids": np.int32}
        b |= {f"source_{k}": np.zeros((count, source_size), v) for k, v in names.items()}
    leaves = LEAVES_PER_NODE * size
    t = {k: np.zeros((count, size), np.int32) for k in ("reads", "read_of")}
    t["parent"] = np.full((count, size), size, np.int32)
    t |= {k: np.zeros((count, leaves), np.int32) for k in ("leaf_node", "leaf_token")}
    places: list[tuple[int, int, int]] = []
    most = 1
    for number, row in enumerate(rows):
        places += [(job, number, first) for job, first in _fill(row, {k: v[number] for k, v in b.items()}, t, number)]
        parents = t["parent"][number]
        wanted = np.unique(np.concatenate([parents[parents < size], t["leaf_node"][number, : row.leaves]]))
        t["reads"][number, : len(wanted)] = wanted
        t["read_of"][number, wanted] = np.arange(len(wanted))
        most = max(most, len(wanted))
    return Packed(b, t, most, places)


def _fill(row: Row, b: dict[str, np.ndarray], t: dict[str, np.ndarray], number: int) -> list[tuple[int, int]]:
    """Write one row; returns (job number, first leaf)."""
    at = leaf = source_at = segment = 0
    trunk: Int[np.ndarray, " P"] = np.zeros(0, np.int64)  # nodes of the newest prompt
    out = []
    for job, shared in zip(row.jobs, row.shared):
        prompt, forest = job.prompt, job.forest
        b["until"][trunk[shared:]] = at  # their descendants end here
        if row.start is None:
            new = len(prompt["tokens"]) - shared
            for key in FIELDS:
                b[key][at : at + new] = prompt[key][shared:]
            length = shared + new
            segment = 1
        else:
            new = 0 if shared else 1
            if new:
                segment += 1
                span = slice(source_at, source_at + len(prompt["tokens"]))
                for key in FIELDS:
                    b[f"source_{key}"][span] = prompt[key]
                b["source_positions"][span] = np.arange(len(prompt["tokens"]))
                b["source_segment_ids"][span] = segment
                source_at = span.stop
                b["tokens"][at] = row.start
            length = 1
        b["positions"][at : at + new] = np.arange(length - new, length)
        trunk = np.concatenate([trunk[:shared], np.arange(at, at + new)])
        b["segment_ids"][at : at + new + len(forest)] = segment
        at += new
        last, size = int(trunk[-1]), len(forest)
        b["tokens"][at : at + size] = forest.tokens
        b["positions"][at : at + size] = length + forest.depth
        b["until"][at : at + size] = at + forest.until
        t["parent"][number, at : at + size] = np.where(forest.parent == ROOT, last, forest.parent + at)
        count = len(forest.leaf_token)
        t["leaf_node"][number, leaf : leaf + count] = np.where(
            forest.leaf_parent == ROOT, last, forest.leaf_parent + at
        )
        t["leaf_token"][number, leaf : leaf + count] = forest.leaf_token
        out.append((job.number, leaf))
        at, leaf = at + size, leaf + count
    b["until"][trunk] = at
    return out
