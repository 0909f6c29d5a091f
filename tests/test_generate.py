"""Generation against a plain search that keeps no keys and values, and what a caller may rely on: rows, stops, seeds, meshes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from instructrec_jax.config import MeshConfig
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models import generate as module
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.generate import Decoding, Generated, generate, nucleus
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.language_model import (
    PLAIN,
    LanguageModel,
    Sizes,
    apply,
    init_variables,
    plain_batch,
    word_logits,
)
from instructrec_jax.models.sharding import BATCH
from instructrec_jax.training.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[7, 31, 9, 44, 12, 23, 50], [15], [40, 8, 29], [33, 21, 60, 5, 17]]
NEW = 7
WIDTH = 8  # of the padded prompts


def on_one_device() -> Any:
    return jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the log probabilities of a next token from whole rows, without keys and values that are kept."""

    model: LanguageModel
    variables: Any
    next: Callable[[list[int], list[list[int]]], np.ndarray]


_cases: dict[str, Case] = {}


def case(name: str) -> Case:
    """A published model of ``tests/golden`` on one device, loaded once."""
    if name not in _cases:
        with on_one_device():
            arch = read_config(GOLDEN / name)
            variables = {"params": load_params(GOLDEN / name, arch)}
        _cases[name] = Case(LanguageModel(arch), variables, whole_rows(LanguageModel(arch), variables))
    return _cases[name]


def whole_rows(model: LanguageModel, variables: Any) -> Callable[[list[int], list[list[int]]], np.ndarray]:
    arch = model.arch

    @jax.jit
    def log_probs(variables: Any, batch: dict[str, jax.Array], at: jax.Array) -> jax.Array:
        out = apply(model, variables, batch)
        logits = jax.reshard(word_logits(out.hidden, out, arch), jax.P())[..., : arch.vocab]
        return jax.nn.log_softmax(logits)[jnp.arange(at.shape[0]), at]

    def following(prompt: list[int], answers: list[list[int]]) -> np.ndarray:
        """[answers, V]: log P(token | prompt, answer)."""
        rows, source = np.zeros((4, WIDTH + NEW), np.int32), np.zeros((4, WIDTH), np.int32)
        at = np.zeros(4, np.int32)
        for row, answer in enumerate(answers):
            text = [arch.decoder_start, *answer] if arch.kind == "encoder-decoder" else [*prompt, *answer]
            rows[row, : len(text)], at[row] = text, len(text) - 1
            source[row, : len(prompt)] = prompt
        more: dict[str, Any] = {}
        if arch.kind == "encoder-decoder":
            real = np.broadcast_to(np.arange(WIDTH) < len(prompt), source.shape)
            place = np.broadcast_to(np.arange(WIDTH), source.shape)
            more = {"source_tokens": source, "source_segment_ids": real, "source_positions": place}
        with on_one_device():
            return np.asarray(log_probs(variables, plain_batch(rows, **more), at))[: len(answers)]

    return following


def plain_search(c: Case, prompt: list[int], how: Decoding) -> tuple[list[int], float]:
    """The answer and its log probability: beam search with lists; one beam is greedy decoding."""
    live: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[float, float, list[int]]] = []
    for step in range(how.max_new):
        log = c.next(prompt, [tokens for tokens, _ in live])
        ways = sorted(
            ((s + log[b, t], b, t) for b, (_, s) in enumerate(live) for t in range(log.shape[1])), reverse=True
        )
        going_on = []
        for rank, (total, beam, token) in enumerate(ways[: 10 * how.beams]):
            tokens = [*live[beam][0], token]
            if token in how.stop or step + 1 == how.max_new:
                if rank < how.beams:
                    said = tokens[:-1] if token in how.stop else tokens
                    finished.append((total / (step + 1) ** how.length_penalty, total, said))
            elif len(going_on) < how.beams:
                going_on.append((tokens, total))
        finished = sorted(finished, reverse=True)[: how.beams]
        live = going_on
        if not live:
            break
        if len(finished) == how.beams and live[0][1] / (step + 1) ** how.length_penalty <= finished[-1][0]:
            break
    return [int(t) for t in finished[0][2]], float(finished[0][1])


def rows_of(prompts: list[list[int]], rows: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Prompts padded to ``[rows, WIDTH]`` on the current mesh, and where each ends; rows without a prompt end at -1."""
    tokens, lengths = np.full((rows, WIDTH), 3, np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    batch = plain_batch(tokens, np.arange(WIDTH) < np.maximum(lengths, 1)[:, None])
    mesh = jax.sharding.get_mesh()
    return batch, jax.device_put(lengths - 1, jax.NamedSharding(mesh, jax.P(BATCH)))


def answers(c: Case, how: Decoding, prompts: list[list[int]] = PROMPTS, **more: Any) -> Generated:
    with on_one_device():
        batch, last = rows_of(prompts, len(prompts))
        return Generated(*map(np.asarray, generate(c.model, c.variables, batch, last, how, **more)))


def said(found: Generated) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(np.asarray(found.tokens), np.asarray(found.lengths))]


# ------------------------------------------------------------------------------------------------- against a plain search


@pytest.mark.parametrize(
    ("name", "beams"),
    [
        ("llama3", 1),
        pytest.param("qwen2_window", 3, marks=pytest.mark.slow),
        ("t5", 3),
        *[
            pytest.param(*x, marks=pytest.mark.slow)
            for x in [("gpt2", 1), ("llama3", 3), ("gemma3", 1), ("gemma3", 3), ("t5", 1), ("mt5", 1), ("mt5", 3)]
        ],
    ],
)
def test_equals_a_search_without_a_cache(name: str, beams: int) -> None:
    """Prompts of different lengths in one batch, each as if alone; some rows stop and others do not."""
    c = case(name)
    free = said(answers(c, Decoding(NEW, beams=beams)))
    how = Decoding(NEW, beams=beams, stop=(free[0][2], free[1][4]), pad=59)
    found = answers(c, how)
    expected = [plain_search(c, prompt, how) for prompt in PROMPTS]
    assert said(found) == [tokens for tokens, _ in expected]
    np.testing.assert_allclose(found.log_prob, [log for _, log in expected], rtol=0, atol=1e-4)
    # A greedy answer must meet its own token again; a beam may go round it.
    assert beams > 1 or min(found.lengths) < NEW
    for row, length in zip(found.tokens, found.lengths):
        assert (row[length:] == how.pad).all() and not set(row[:length].tolist()) & set(how.stop)


@pytest.mark.parametrize("penalty", [0.0, 2.0, -0.5])
@pytest.mark.parametrize("name", ["qwen2_window", pytest.param("mt5", marks=pytest.mark.slow)])
def test_length_penalty(name: str, penalty: float) -> None:
    c = case(name)
    free = said(answers(c, Decoding(NEW, beams=3)))
    how = Decoding(NEW, beams=3, length_penalty=penalty, stop=(free[0][1], free[2][3]))
    assert said(answers(c, how)) == [plain_search(c, prompt, how)[0] for prompt in PROMPTS]


def test_more_beams_find_what_greedy_decoding_misses() -> None:
    c = case("qwen2_window")
    greedy, beams = (answers(c, Decoding(NEW, beams=n, length_penalty=0.0)).log_prob for n in (1, 4))
    assert (beams > greedy + 1e-3).any()  # (not all: a beam may lose the greedy path and end below it)


def test_one_token() -> None:
    c = case("llama3")
    first = [plain_search(c, prompt, Decoding(1))[0] for prompt in PROMPTS]
    assert said(answers(c, Decoding(1))) == first == said(answers(c, Decoding(1, beams=3)))


# -------------------------------------------------------------------------------------------------------------- sampling


def unlikely(counts: np.ndarray, probability: np.ndarray) -> bool:
    """Whether counts differ from what is expected, by a chi-square test at 1 in 10,000; rare outcomes are pooled."""
    expected = probability * counts.sum()
    often = expected >= 5
    pairs = [(counts[often], expected[often])]
    if expected[~often].sum() >= 5:
        pairs.append((counts[~often].sum(keepdims=True), expected[~often].sum(keepdims=True)))
    seen, wanted = (np.concatenate(part) for part in zip(*pairs))
    return float(((seen - wanted) ** 2 / wanted).sum()) > chi2.ppf(1 - 1e-4, len(seen) - 1)


def test_samples_have_the_models_probabilities() -> None:
    c, prompt = case("qwen2_window"), PROMPTS[0]
    found = answers(c, Decoding(2, temperature=0.8), [prompt] * 4000, key=jax.random.key(5)).tokens
    wanted = np.exp(c.next(prompt, [[]])[0] / 0.8)
    counts = np.bincount(found[:, 0], minlength=61)
    assert not unlikely(counts, wanted / wanted.sum())
    assert unlikely(counts, np.exp(c.next(prompt, [[]])[0]))  # the temperature is seen
    # The second token, after the most frequent first one.
    first = int(counts.argmax())
    wanted = np.exp(c.next(prompt, [[first]])[0] / 0.8)
    assert not unlikely(np.bincount(found[found[:, 0] == first, 1], minlength=61), wanted / wanted.sum())


def test_top_p_samples_the_nucleus_alone() -> None:
    c, prompt = case("qwen2_window"), PROMPTS[0]
    found = answers(c, Decoding(1, temperature=1.0, top_p=0.6), [prompt] * 4000, key=jax.random.key(6)).tokens
    probability = np.exp(c.next(prompt, [[]])[0])
    order = np.argsort(-probability)
    inside = order[: int(np.searchsorted(np.cumsum(probability[order]), 0.6)) + 1]
    wanted = np.zeros(61)
    wanted[inside] = probability[inside] / probability[inside].sum()
    assert 1 < len(inside) < 61
    counts = np.bincount(found[:, 0], minlength=61)
    assert counts[wanted == 0].sum() == 0 and not unlikely(counts, wanted)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.floats(0.01, 0.99), st.permutations(list(range(20))))
def test_the_nucleus_is_the_smallest_set_of_that_mass(weights: list[int], p: float, ids: list[int]) -> None:
    # Always 20 tokens (one compilation), most of them impossible, in any order.
    probability = np.zeros(20)
    probability[ids[: len(weights)]] = np.asarray(weights) / sum(weights)
    with on_one_device():
        logits = jnp.log(jnp.maximum(jnp.asarray(probability, jnp.float32), 1e-30))[None]
        order, kept = (np.asarray(x)[0] for x in jax.jit(nucleus)(logits, p))
    assert sorted(order) == list(range(20)) and (np.diff(probability[order]) <= 0).all()
    size = int(np.isfinite(kept).sum())
    assert np.isfinite(kept[:size]).all()
    mass = np.cumsum(probability[order])
    assert mass[size - 1] >= p - 1e-6 and (size == 1 or mass[size - 2] < p + 1e-6)


def test_equal_tokens_do_not_widen_the_nucleus() -> None:
    with on_one_device():
        order, kept = nucleus(jnp.zeros((1, 8)), 0.5)
        assert order[0].tolist() == list(range(8)) and np.isfinite(np.asarray(kept)).sum() == 4
        assert np.isfinite(np.asarray(nucleus(jnp.zeros((1, 8)), 1e-9)[1])).sum() == 1


@pytest.mark.parametrize("temperature", [1e-4, 1e-45])
def test_cold_sampling_is_greedy(temperature: float) -> None:
    c, how = case("qwen2_window"), Decoding(NEW, stop=(5,))
    cold = dataclasses.replace(how, temperature=temperature, top_p=0.9)
    np.testing.assert_array_equal(answers(c, cold, key=jax.random.key(0)).tokens, answers(c, how).tokens)


def test_a_sample_depends_on_its_key_and_not_on_its_company() -> None:
    c, how = case("gemma3"), Decoding(NEW, temperature=1.0, top_p=0.95)
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    together = said(answers(c, how, key=keys))
    alone = [said(answers(c, how, [prompt], key=keys[i : i + 1]))[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone and len({tuple(row) for row in together}) == len(PROMPTS)
    same = said(answers(c, how, [PROMPTS[0]] * 4, key=keys))
    assert len({tuple(row) for row in same}) == 4
    assert said(answers(c, how, key=jax.random.key(4))) != together


def test_another_temperature_does_not_compile_again() -> None:
    c = case("gpt2")
    answers(c, Decoding(3, temperature=0.5, top_p=0.5), key=jax.random.key(0))
    before = module._generate._cache_size()
    for temperature, top_p in ((0.7, 0.9), (1.3, 0.1)):
        answers(c, Decoding(3, temperature=temperature, top_p=top_p), key=jax.random.key(1))
    assert module._generate._cache_size() == before


# ---------------------------------------------------------------------------------------------------------------- meshes

TINY = Architecture(
    vocab=128, width=32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=32, tied_head=False, window=4
)
TINY_T5 = dataclasses.replace(
    TINY, kind="encoder-decoder", encoder_layers=2, kv_heads=4, positions="relative", relative_buckets=8, window=0
)


def random_variables(arch: Architecture) -> Any:
    variables = jax.jit(lambda: init_variables(arch, Sizes(128), PLAIN, jax.random.key(1)))()
    # Fresh tables hardly tell words apart: far from ties, another order of summation changes no token.
    return jax.tree_util.tree_map_with_path(lambda path, x: x * (30 if "word" in str(path) else 1), variables)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("arch", "meshes"),
    [
        pytest.param(TINY, [(2, 2, 2)], id="decoder", marks=pytest.mark.slow),
        pytest.param(TINY, [(1, 8, 1)], id="decoder, fsdp", marks=pytest.mark.slow),
        pytest.param(TINY_T5, [(2, 2, 2)], id="encoder-decoder", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_say_what_one_says(arch: Architecture, meshes: list[tuple[int, int, int]]) -> None:
    prompts = [[9 + n, *range(n, 3 * n, 2)][:WIDTH] for n in range(1, 7)]  # two of eight rows only fill the batch
    free = Decoding(NEW, pad=1)
    expected: dict[Decoding, Generated] = {}
    ways: list[Decoding] = []
    for sizes in ((1, 1, 1), *meshes):
        with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])):
            variables = random_variables(arch)
            batch, last = rows_of(prompts, 8)

            def found(how: Decoding, variables: Any = variables, batch: Any = batch, last: Any = last) -> Generated:
                key = jax.random.key(2)
                got = generate(LanguageModel(arch, Sizes(128)), variables, batch, last, how, key)
                return Generated(*map(np.asarray, got))

            if not ways:
                tokens = found(free).tokens
                stop = (int(tokens[0, 2]), int(tokens[3, 4]))
                kinds = ({}, {"temperature": 0.9, "top_p": 0.8}, {"beams": 3})
                ways = [dataclasses.replace(free, stop=stop, **kind) for kind in kinds]
                expected = {how: found(how) for how in ways}
                assert 0 < expected[ways[0]].lengths[:6].min() < NEW
                continue
            for how in ways:
                got = found(how)
                np.testing.assert_array_equal(got.tokens, expected[how].tokens, err_msg=f"{sizes} {how}")
                np.testing.assert_array_equal(got.lengths, expected[how].lengths)
                np.testing.assert_allclose(got.log_prob, expected[how].log_prob, rtol=1e-4, atol=1e-4)
                assert (got.tokens[6:] == how.pad).all() and not got.lengths[6:].any() and not got.log_prob[6:].any()


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new": 0}, "max_new = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p = 0.0 is not in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.1}, r"top_p = 1.1 is not in \(0, 1\]"),
        ({"top_p": 0.9}, "top_p = 0.9 with temperature = 0"),
        ({"beams": 0}, "beams = 0"),
        ({"beams": 2, "temperature": 0.5}, "beams = 2 with temperature = 0.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)


def test_calls_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="an encoder answers nothing"):
        answers(dataclasses.replace(case("gpt2"), model=LanguageModel(read_config(GOLDEN / "bert"))), Decoding())
    with pytest.raises(ConfigError, match=r"temperature = 1.0 needs a key"):
        answers(case("gpt2"), Decoding(temperature=1.0))
    with pytest.raises(ConfigError, match="beams = 40 are too many for a vocabulary of 61"):
        answers(case("gpt2"), Decoding(beams=40))
    with pytest.raises(UserError, match="a prompt of 7 tokens and 171 new ones do not fit into the model's 176"):
        answers(case("gpt2"), Decoding(171))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_rows_must_divide() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])):
        batch = plain_batch(np.ones((4, WIDTH), np.int32))
        with pytest.raises(UserError, match="4 rows do not divide over 8 shards"):
            generate(LanguageModel(TINY), {}, batch, jnp.zeros(4, jnp.int32))
