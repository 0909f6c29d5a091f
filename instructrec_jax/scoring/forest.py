"""Token sequences that share prefixes, as trees in arrays: every shared prefix is computed once.

The *candidates* of a request are sequences that follow its prompt. Their distinct prefixes are the nodes of a forest, in depth-first
order, so that a node's descendants are a contiguous range: one integer per node (``until``) says who may read whom. The last token of
a candidate is never an input; it is a *leaf*, an edge that is read from its parent node.

The same arrays serve a handful of candidates, which stand in one row with their prompt, and a catalogue, whose trie is cut into
blocks of equal size. NumPy only: no loop runs over tokens in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

ROOT = -1  # parent of what follows the prompt itself


@dataclass(frozen=True)
class Forest:
    """Distinct prefixes of C sequences: N nodes in depth-first order (a parent stands before its children), E leaves.

    Leaves are sorted by parent, those of the root first.
    """

    tokens: Int[np.ndarray, " N"]
    depth: Int[np.ndarray, " N"]  # 0 = follows the prompt
    parent: Int[np.ndarray, " N"]  # node, or ROOT
    until: Int[np.ndarray, " N"]  # one past the node's last descendant
    leaf_parent: Int[np.ndarray, " E"]  # node, or ROOT
    leaf_token: Int[np.ndarray, " E"]
    leaf_of: Int[np.ndarray, " C"]  # leaf of every sequence; -1 = the sequence is empty

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> Forest:
        """The forest of token sequences of any lengths; repeats share their leaf."""
        lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
        table = np.full((len(sequences), max(int(lengths.max(initial=0)), 1)), -1, np.int64)
        table[np.arange(table.shape[1]) < lengths[:, None]] = np.fromiter(
            (t for s in sequences for t in s), np.int64, int(lengths.sum())
        )
        return cls.of_table(table, lengths)

    @classmethod
    def of_table(cls, table: Int[np.ndarray, "C W"], lengths: Int[np.ndarray, " C"]) -> Forest:
        """As ``build``, of a table padded with -1."""
        count, width = table.shape
        order = np.lexsort(
            table.T[::-1]
        )  # by the first token, then the second, ...; a prefix stands before its continuations
        rows, length = table[order], lengths[order]
        same = np.zeros((count, width), bool)  # begins like the row before, up to and with this token
        same[1:] = np.logical_and.accumulate(rows[1:] == rows[:-1], axis=1)
        at = np.arange(width)
        inside = at < length[:, None] - 1  # inputs: all tokens but the last
        # Rows that share a prefix follow each other, those that end with it first: it becomes a node at the first that goes on.
        made_before = np.zeros_like(inside)
        made_before[1:] = same[1:] & inside[:-1]
        is_new = inside & ~made_before

        number = np.cumsum(is_new.reshape(-1)).reshape(count, width) - 1
        row, depth = np.nonzero(is_new)
        # The node of a prefix is the newest one made at its depth in this row or before.
        node_at = np.maximum.accumulate(np.where(is_new, number, -1), axis=0)
        parent = np.where(depth > 0, node_at[row, np.maximum(depth - 1, 0)], ROOT)
        until = _ends(row, depth, same)

        nonempty = length > 0
        last = np.maximum(length - 1, 0)
        end_parent = np.where(length > 1, node_at[np.arange(count), np.maximum(last - 1, 0)], ROOT)
        end_token = rows[np.arange(count), last]
        pairs = np.stack([end_parent, end_token], axis=1)[nonempty]
        leaves, which = np.unique(pairs, axis=0, return_inverse=True)
        leaf_of = np.full(count, -1, np.int64)
        leaf_of[order[nonempty]] = which.reshape(-1)
        return cls(rows[row, depth], depth, parent, until, leaves[:, 0], leaves[:, 1], leaf_of)


def _ends(row: np.ndarray, depth: np.ndarray, same: Bool[np.ndarray, "C W"]) -> Int[np.ndarray, " N"]:
    """One past each node's last descendant: the first node of the first later row that does not share the node's prefix."""
    count = len(same)
    first_node = np.searchsorted(row, np.arange(count + 1))  # nodes are in order of rows
    leaves_at = np.where(same, count, np.arange(count)[:, None])  # rows where the prefix of a depth changes
    following = np.full((count + 1, same.shape[1]), count, np.int64)
    following[:-1] = np.minimum.accumulate(leaves_at[::-1], axis=0)[::-1]
    return first_node[following[row + 1, depth]]


@dataclass(frozen=True)
class Blocks:
    """A forest in n blocks of S nodes and E leaves each; a block repeats the few ancestors that its first node has in earlier blocks.

    Padding: ``until`` 0, ``leaf_parent`` S, which is the root. ``parent`` is S at the root too.
    """

    tokens: Int[np.ndarray, "n S"]
    depth: Int[np.ndarray, "n S"]
    parent: Int[np.ndarray, "n S"]
    until: Int[np.ndarray, "n S"]
    leaf_parent: Int[np.ndarray, "n E"]
    leaf_token: Int[np.ndarray, "n E"]
    slot: Int[np.ndarray, " leaves"]  # place of every leaf of the forest in the flattened [n, E]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def computed(self) -> int:
        """Nodes that are computed, the repeated ancestors included."""
        return int((self.until > 0).sum())


def stacked(cuts: Sequence[Blocks], rows: int, room: int) -> dict[str, np.ndarray]:
    """Blocks of several forests as arrays ``[rows, room, S]`` and ``[rows, room, E]``, filled up with padding."""
    size = cuts[0].tokens.shape[1]
    out = {}
    for name in ("tokens", "depth", "until", "parent", "leaf_parent", "leaf_token"):
        fill = size if name in ("parent", "leaf_parent") else 0
        table = np.full((rows, room, getattr(cuts[0], name).shape[1]), fill, np.int32)
        for row, blocks in enumerate(cuts):
            table[row, : len(blocks)] = getattr(blocks, name)
        out[name] = table
    return out


def cut(forest: Forest, nodes: int, leaves: int) -> Blocks:
    """Cut a forest into blocks of ``nodes`` nodes and ``leaves`` leaves.

    Raises:
        ValueError: a sequence is longer than a block.
    """
    if len(forest) and int(forest.depth.max()) >= nodes:
        raise ValueError(
            f"a sequence of {int(forest.depth.max()) + 2} tokens does not fit into blocks of {nodes} nodes"
        )
    total = len(forest)
    # Leaves of node i stand at [bounds[i + 1], bounds[i + 2]); those of the root first.
    bounds = np.searchsorted(forest.leaf_parent, np.arange(-1, total + 1))
    parts: list[tuple[np.ndarray, int, int, int]] = []  # ancestors, nodes [start, stop), first leaf
    spans: list[tuple[int, int]] = []
    start, leaf = 0, 0
    everything = len(forest.leaf_token)
    while start < total or leaf < everything:
        path = _ancestors(forest, start) if start < total else np.zeros(0, np.int64)
        # As many nodes as fit, whose leaves fit too.
        stop = min(total, start + nodes - len(path))
        fits = (
            int(np.searchsorted(bounds[1:], leaf + leaves, side="right")) - 1
        )  # nodes [0, fits) have all leaves inside
        stop = min(stop, max(fits, start))
        if stop > start:
            end = int(bounds[stop + 1])
        elif start < total and bounds[start + 1] <= leaf:
            # One node with more leaves than a block holds: it comes again with the next of them.
            stop, end = start + 1, min(leaf + leaves, int(bounds[start + 2]))
        else:  # the same of the root
            end = min(leaf + leaves, int(bounds[start + 1]))
        parts.append((path, start, stop, leaf))
        spans.append((leaf, end))
        done = stop > start and end == bounds[stop + 1]
        start, leaf = (stop if done else start), end
    return _fill(forest, parts, spans, nodes, leaves)


def _ancestors(forest: Forest, node: int) -> Int[np.ndarray, " d"]:
    path = []
    at = int(forest.parent[node])
    while at != ROOT:
        path.append(at)
        at = int(forest.parent[at])
    return np.asarray(path[::-1], np.int64)


def _fill(forest: Forest, parts: list, spans: list[tuple[int, int]], nodes: int, leaves: int) -> Blocks:
    n = len(parts)
    out = {k: np.zeros((n, nodes), np.int32) for k in ("tokens", "depth", "until")}
    parent = np.full((n, nodes), nodes, np.int32)
    leaf_parent = np.full((n, leaves), nodes, np.int32)
    leaf_token = np.zeros((n, leaves), np.int32)
    slot = np.zeros(len(forest.leaf_token), np.int64)
    for k, ((path, start, stop, _), (first, end)) in enumerate(zip(parts, spans)):
        index = np.concatenate([path, np.arange(start, stop)])
        d, size = len(path), len(path) + stop - start
        local = lambda x, path=path, start=start, d=d: np.where(  # noqa: E731
            x == ROOT, nodes, np.where(x >= start, x - start + d, np.searchsorted(path, x))
        )
        out["tokens"][k, :size] = forest.tokens[index]
        out["depth"][k, :size] = forest.depth[index]
        out["until"][k, :size] = np.minimum(forest.until[index], stop) - start + d
        parent[k, :size] = local(forest.parent[index])
        leaf_parent[k, : end - first] = local(forest.leaf_parent[first:end])
        leaf_token[k, : end - first] = forest.leaf_token[first:end]
        slot[first:end] = k * leaves + np.arange(end - first)
    return Blocks(out["tokens"], out["depth"], parent, out["until"], leaf_parent, leaf_token, slot)
