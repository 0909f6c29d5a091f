"""The catalogue as a trie of token sequences, in arrays of a size class: items come and go without another compilation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from instructrec_jax.models.sharding import put
from instructrec_jax.scoring.buckets import bucket
from instructrec_jax.scoring.constrained import Edges, Widths, edges
from instructrec_jax.scoring.forest import Forest, cut, stacked
from instructrec_jax.scoring.rows import LEAVES_PER_NODE


class CatalogueTrie:
    """Token sequences of all items as blocks.

    Capacities of blocks and items are the next powers of two, so catalogues of one size class share a compilation.

    Args:
        sequences: tokens of every item with what ends an answer; an empty one stands for an item that is gone.
        nodes: of a block.
        group: blocks that are computed at a time; their number is filled up to a multiple.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], nodes: int, group: int):
        self.group, self._nodes = group, nodes
        self._sequences = [list(s) for s in sequences]
        self._device: tuple | None = None
        self._edges: tuple | None = None
        self._build()

    def _build(self) -> None:
        self.forest = Forest.build(self._sequences)
        self.blocks = cut(self.forest, self._nodes, LEAVES_PER_NODE * self._nodes)
        self.capacity = bucket(len(self._sequences), 128, steps=1)
        self._device = self._edges = None
        # Items of a leaf stand together here: titles may be the same.
        self._by_leaf = np.argsort(self.forest.leaf_of, kind="stable")
        self._first = np.searchsorted(self.forest.leaf_of[self._by_leaf], np.arange(len(self.forest.leaf_token) + 1))

    def update(self, items: dict[int, Sequence[int]]) -> None:
        """Replace items' sequences by catalogue index; an index beyond the last adds items, an empty sequence takes one away."""
        for index, sequence in items.items():
            while index >= len(self._sequences):
                self._sequences.append([])
            self._sequences[index] = list(sequence)
        self._build()

    def __len__(self) -> int:
        return len(self._sequences)

    def on(self, mesh: jax.sharding.Mesh) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """(blocks ``[n, ...]``, slot of every item, number of real blocks), on every device of the mesh."""
        if self._device is None or self._device[0] is not mesh:
            n = len(self.blocks)
            room = -(-bucket(n, self.group, steps=1) // self.group) * self.group
            arrays = {k: v[0] for k, v in stacked([self.blocks], 1, room).items()}
            slots = np.full(self.capacity, -1, np.int32)
            leaf = self.forest.leaf_of
            slots[: len(leaf)] = np.where(leaf >= 0, self.blocks.slot[leaf] if len(self.blocks.slot) else -1, -1)
            number = np.int32(-(-n // self.group) * self.group)
            everywhere = jax.NamedSharding(mesh, jax.P())
            on_mesh = jax.tree.map(lambda x: put(np.asarray(x), everywhere), (arrays, slots, number))
            self._device = (mesh, *on_mesh)
        return self._device[1:]

    def edges_on(self, mesh: jax.sharding.Mesh) -> tuple[Edges, Widths]:
        """The trie as edges on every device of the mesh, for a beam search."""
        if self._edges is None or self._edges[0] is not mesh:
            tree, widths = edges(self.forest, self.capacity)
            everywhere = jax.NamedSharding(mesh, jax.P())
            self._edges = (mesh, jax.tree.map(lambda x: put(np.asarray(x), everywhere), tree), widths)
        return self._edges[1:]

    def items_of(
        self, leaves: np.ndarray, scores: np.ndarray, allowed: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, items) of leaves, best first, at most ``most``; items of the same text stand side by side."""
        found = [
            (score, item)
            for leaf, score in zip(leaves.tolist(), scores.tolist())
            if leaf >= 0
            for item in self._by_leaf[self._first[leaf] : self._first[leaf + 1]].tolist()
            if allowed[item]
        ][:most]
        return np.asarray([s for s, _ in found], np.float32), np.asarray([i for _, i in found], np.int64)
