"""The constrained beam search: only catalogue items, only allowed ones, and the trie's own answer when it is wide enough."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given

from instructrec_jax.errors import UserError
from instructrec_jax.scoring import Request
from instructrec_jax.scoring.constrained import edges
from instructrec_jax.scoring.forest import Forest
from tests.test_forest import SEQUENCES
from tests.test_scorer_methods import PROMPTS, scorer, titles


@given(SEQUENCES)
def test_edges_lead_to_every_item_and_know_what_lies_behind(sequences: list[list[int]]) -> None:
    forest = Forest.build(sequences)
    tree, widths = edges(forest, len(sequences))

    def walk(node: int, words: list[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for e in range(tree.start[node], tree.start[node] + tree.count[node]):
            path = [*words, int(tree.token[e])]
            child = int(tree.child[e])
            behind = {int(tree.leaf[e]): path} if child < 0 else walk(child, path)
            assert sorted(behind) == list(range(tree.low[e], tree.high[e]))
            found |= behind
        return found

    by_leaf = walk(0, [])
    for sequence, leaf in zip(sequences, tree.leaf_of):
        assert by_leaf[int(leaf)] == sequence if sequence else leaf == -1
    assert tree.count[0] <= widths.root and max(tree.count[1:], default=0) <= widths.inner
    assert max((len(s) for s in sequences), default=0) <= widths.depth


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama3", (1, 1, 1)),
        pytest.param("gemma2", (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("t5_v11", (1, 2, 1), marks=pytest.mark.slow),
        pytest.param("llama3", (1, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_a_wide_search_is_the_tries_ranking(name: str, mesh: tuple[int, int, int]) -> None:
    made_mesh, made = scorer(name, mesh)
    allowed = np.random.default_rng(0).random((3, len(titles()))) < 0.4
    with jax.set_mesh(made_mesh):
        for mask in (None, allowed):
            exact, expected = made.top_k(PROMPTS[:3], 12, allowed=mask)
            scores, items = made.beam_search(PROMPTS[:3], 12, beams=128, allowed=mask)
            np.testing.assert_allclose(scores, exact, atol=1e-4)
            for row in range(3):  # identical titles may change places
                assert {titles()[i] for i in items[row]} == {titles()[i] for i in expected[row]}
                assert mask is None or mask[row, items[row]].all()
        alone, _ = made.beam_search(PROMPTS[:1], 12, beams=128)
        np.testing.assert_allclose(alone[0], made.top_k(PROMPTS[:1], 12)[0][0], atol=1e-4)


def test_a_narrow_search_finds_items_with_their_exact_scores() -> None:
    mesh, made = scorer("qwen3")
    with jax.set_mesh(mesh):
        whole = made.score([Request(p) for p in PROMPTS[:4]], "trie")
        scores, items = made.beam_search(PROMPTS[:4], 4, beams=4)
    for row in range(4):
        np.testing.assert_allclose(whole[row][items[row]], scores[row], atol=1e-4)
        assert (np.diff(scores[row]) <= 1e-6).all() and scores[row, 0] <= whole[row].max() + 1e-4


def test_fewer_items_than_wanted_and_none() -> None:
    mesh, made = scorer("llama3")
    allowed = np.zeros((2, len(titles())), bool)
    allowed[0, [7, 11]] = True
    with jax.set_mesh(mesh):
        scores, items = made.beam_search(PROMPTS[:2], 5, beams=8, allowed=allowed)
        assert set(items[0, :2].tolist()) == {7, 11} and (scores[0, 2:] == -np.inf).all()
        assert (scores[1] == -np.inf).all()
        with pytest.raises(UserError, match="beams = 3 are fewer than k = 5"):
            made.beam_search(PROMPTS[:1], 5, beams=3)


def test_items_and_allow_sets_change_without_compiling() -> None:
    mesh, made = scorer("llama3")
    allowed = np.ones((1, len(titles())), bool)
    with jax.set_mesh(mesh):
        made.beam_search(PROMPTS[:1], 5, beams=16)
        allowed[0, ::2] = False
        made.beam_search(PROMPTS[:1], 5, beams=16, allowed=allowed)
        made.trie.update({3: [], 5: [9, 9, 2]})
        made.beam_search(PROMPTS[:1], 5, beams=16)
        assert made.runner.kernel.compilations()["beams"] == 1
