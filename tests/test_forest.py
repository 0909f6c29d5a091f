"""Forests of token sequences, and blocks of them: every sequence can be read back, and nobody reads what is not its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.scoring.forest import ROOT, Blocks, Forest, cut

SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=30)


def path(forest: Forest, node: int) -> list[int]:
    """Tokens from the root to a node."""
    out: list[int] = []
    while node != ROOT:
        out.append(int(forest.tokens[node]))
        node = int(forest.parent[node])
    return out[::-1]


@given(SEQUENCES)
def test_every_sequence_is_read_back(sequences: list[list[int]]) -> None:
    forest = Forest.build(sequences)
    for sequence, leaf in zip(sequences, forest.leaf_of):
        if not sequence:
            assert leaf == -1
            continue
        assert [*path(forest, int(forest.leaf_parent[leaf])), int(forest.leaf_token[leaf])] == sequence
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s))}
    assert len(forest) == len(prefixes), "each shared prefix is one node, and no other is made"
    assert len(forest.leaf_token) == len({tuple(s) for s in sequences if s})
    assert all(len(path(forest, n)) == forest.depth[n] + 1 for n in range(len(forest)))
    assert (np.diff(forest.leaf_parent) >= 0).all()


@given(SEQUENCES)
def test_until_names_the_descendants(sequences: list[list[int]]) -> None:
    forest = Forest.build(sequences)
    for i in range(len(forest)):
        ancestors = {i}
        at = int(forest.parent[i])
        while at != ROOT:
            ancestors.add(at)
            at = int(forest.parent[at])
        assert {j for j in range(len(forest)) if j <= i < forest.until[j]} == ancestors


def scores_of_blocks(forest: Forest, blocks: Blocks, value: dict[tuple[int, ...], float]) -> np.ndarray:
    """Sum of ``value[prefix]`` along each leaf's path, computed inside the blocks as the scorer does."""
    n, size = blocks.tokens.shape
    out = np.zeros((n, blocks.leaf_token.shape[1]))
    for k in range(n):
        words: list[list[int]] = []
        for i in range(size):
            if not blocks.until[k, i]:
                words.append([])
                continue
            chain = [j for j in range(i + 1) if j <= i < blocks.until[k, j]]
            words.append([int(blocks.tokens[k, j]) for j in chain])
            parent = int(blocks.parent[k, i])
            assert words[i][:-1] == ([] if parent == size else words[parent]), "the parent is the last ancestor"
            assert blocks.depth[k, i] == len(chain) - 1
        for e, (parent, token) in enumerate(zip(blocks.leaf_parent[k], blocks.leaf_token[k])):
            before = [] if parent == size else words[parent]
            whole = [*before, int(token)]
            out[k, e] = sum(value.get(tuple(whole[:m]), 0.0) for m in range(1, len(whole) + 1))
    return out.reshape(-1)[blocks.slot]


@given(SEQUENCES, st.integers(6, 12), st.integers(1, 8))
def test_blocks_hold_every_leaf_with_its_whole_path(sequences: list[list[int]], nodes: int, leaves: int) -> None:
    forest = Forest.build(sequences)
    blocks = cut(forest, nodes, leaves)
    r = np.random.default_rng(0)
    value = {tuple(s[:n]): float(r.normal()) for s in sequences for n in range(1, len(s) + 1)}
    got = scores_of_blocks(forest, blocks, value)
    for sequence, leaf in zip(sequences, forest.leaf_of):
        if sequence:
            assert got[leaf] == pytest.approx(sum(value[tuple(sequence[:n])] for n in range(1, len(sequence) + 1)))
    assert len(set(blocks.slot.tolist())) == len(blocks.slot)


def test_blocks_of_a_catalogue_repeat_little() -> None:
    r = np.random.default_rng(1)
    sequences = [[int(t) for t in r.zipf(1.5, r.integers(3, 16)) % 1000] for _ in range(5000)]
    forest = Forest.build(sequences)
    blocks = cut(forest, 256, 512)
    assert blocks.computed <= 1.06 * len(forest)
    assert len(blocks) <= 1.1 * len(forest) / 256 + 1


def test_a_sequence_longer_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit into blocks of 4 nodes"):
        cut(Forest.build([list(range(9))]), 4, 4)
