"""Every method and layout against one candidate at a time, on published architectures, with one device and with eight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from instructrec_jax.config import MeshConfig
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import UserError
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.language_model import PLAIN, LanguageModel, Sizes, apply, word_logits
from instructrec_jax.models.sharding import padded
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.training.mesh import make_mesh
from tests.variants import some

GOLDEN = Path(__file__).parent / "golden"
END = 2
WORDS = 61
FAMILIES = ("gpt2", "llama3", "gemma2", "gemma3", "qwen3", "t5_v11")
PROMPTS = [[7, 31, 9, 44, 12, 23, 50], [15], [40, 8, 29], [7, 31, 9, 44, 60], [7, 31, 9, 44], [33, 21, 60, 5, 17] * 5]
CANDIDATES: list[list[list[int]]] = [
    [[3, 9, 2], [3, 9, 8, 2], [3, 9, 2], [5], [40, 41, 42, 43, 44, 45, 2]],
    [],
    [[6, 2], [6, 7, 2], [6, 7, 8, 2], [6, 7]],
    [[n, n + 1, 2] for n in range(5, 40)],
    [[3, 9, 2], []],
    [[50, 2]],
]


def plain_text() -> Text:
    """A tokeniser whose word "w7" is token 7."""
    vocabulary = {f"w{n}": n for n in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return Text(tokenizer, WORDS, before=(1,), end=(END,))


def titles(count: int = 150) -> list[str]:
    """Made of few words, so that they share beginnings, and two are the same."""
    r = np.random.default_rng(4)
    out = [" ".join(f"w{t}" for t in r.choice(12, r.integers(1, 7)) + 5) for _ in range(count)]
    return [*out, out[3], "w5", "w5 w6"]


def scorer(name: str, mesh: tuple[int, int, int] = (1, 1, 1), **options: Any) -> tuple[Any, Scorer]:
    """The mesh, to be entered, and a scorer of a golden model on it."""
    made = make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(made):
        arch = read_config(GOLDEN / name)
        sizes = Sizes(padded(arch.vocab))
        params = {"params": load_params(GOLDEN / name, arch, sizes=sizes)}
        content = jnp.zeros((0, 0), jnp.float32)
        options = {"row_tokens": 64, "rows": 1, **options}
        return made, Scorer(PLAIN, arch, sizes, params, content, len(titles()), plain_text(), titles(), **options)


@cache
def one_by_one(name: str) -> Callable[[list[int], list[int]], float]:
    """log P(candidate | prompt) from a row of the whole text, without cache, packing or tree."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        arch = read_config(GOLDEN / name)
        variables = {"params": load_params(GOLDEN / name, arch)}
    model = LanguageModel(arch)

    @jax.jit
    def log_probs(batch: dict[str, jax.Array]) -> jax.Array:
        out = apply(model, variables, batch)
        return jax.nn.log_softmax(word_logits(out.hidden, out, arch)[0])

    def score(prompt: list[int], candidate: list[int]) -> float:
        with jax.set_mesh(mesh):
            encodes = arch.kind == "encoder-decoder"
            text = [arch.decoder_start if encodes else None, *candidate] if encodes else [*prompt, *candidate]
            batch = {}
            for key, ids, width in (("", text, 96), ("source_", prompt, 32)):
                if key and not encodes:
                    continue
                row = np.zeros((1, width), np.int32)
                row[0, : len(ids)] = ids
                at = np.arange(width)[None]
                batch |= {
                    f"{key}tokens": row,
                    f"{key}segment_ids": (at < len(ids)).astype(np.int32),
                    f"{key}positions": at,
                }
            found = np.asarray(log_probs({k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}))
        first = 0 if encodes else len(prompt) - 1
        return float(sum(found[first + n, token] for n, token in enumerate(candidate)))

    return score


@pytest.mark.parametrize("layout", ["packed", "batched"])
@pytest.mark.parametrize("name", some(FAMILIES, "llama3", "gemma3"))
def test_likelihood_is_exact(name: str, layout: str) -> None:
    mesh, made = scorer(name, layout=layout)
    with jax.set_mesh(mesh):
        found = made.score([Request(p, c) for p, c in zip(PROMPTS, CANDIDATES)], "likelihood")
    for prompt, candidates, scores in zip(PROMPTS, CANDIDATES, found):
        expected = [one_by_one(name)(prompt, c) for c in candidates]
        np.testing.assert_allclose(scores, np.asarray(expected, np.float32), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("llama3", (1, 1, 1), marks=pytest.mark.slow),
        ("llama3", (2, 2, 2)),
        ("t5_v11", (1, 1, 1)),
        pytest.param("llama3", (1, 8, 1), marks=pytest.mark.slow),
        pytest.param(
            "t5_v11", (2, 4, 1), marks=pytest.mark.slow
        ),  # its width does not divide by eight, nor its heads by two
        pytest.param("t5_v11", (2, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_the_whole_catalogue_is_exact(name: str, mesh: tuple[int, int, int]) -> None:
    shape, made = scorer(name, mesh)
    with jax.set_mesh(shape):
        few = made.score([Request(PROMPTS[0]), Request(PROMPTS[2], "all")], "trie")
        many = made.score([Request(p) for p in PROMPTS * 2], "likelihood")
        best, items = made.top_k(PROMPTS[:1], 5)
        assert made.trie.blocks.computed > 256, "the catalogue takes more than one block"
    names = titles()
    for prompt, scores in zip([PROMPTS[0], PROMPTS[2]], few):
        assert len(scores) == len(names)
        for item in [*range(0, 150, 29), 150, 151, 152]:
            words = [int(w[1:]) for w in names[item].split()]
            assert scores[item] == pytest.approx(one_by_one(name)(prompt, [*words, END]), abs=1e-4)
    np.testing.assert_allclose(many[0], few[0], atol=1e-4)
    np.testing.assert_allclose(many[8], few[1], atol=1e-4)
    assert few[0][150] == few[0][3], "identical titles have the same score"
    np.testing.assert_allclose(best[0], np.sort(few[0])[::-1][:5], atol=1e-5)
    np.testing.assert_allclose(few[0][items[0]], best[0], atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "batched"])
@pytest.mark.parametrize("mesh", some([(1, 8, 1), (2, 2, 2), (8, 1, 1)], (2, 2, 2)))
def test_scores_are_the_same_on_eight_devices(mesh: tuple[int, int, int], layout: str) -> None:
    requests = [Request(p, c) for p, c in zip(PROMPTS, CANDIDATES)]
    found = []
    for shape in ((1, 1, 1), mesh):
        made_mesh, made = scorer("llama3", shape, layout=layout)
        with jax.set_mesh(made_mesh):
            found.append(made.score(requests, "likelihood") + made.score(requests[3:4], "likelihood"))
    for one, eight in zip(*found):
        np.testing.assert_allclose(one, eight, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "batched"])
@pytest.mark.parametrize("name", ["qwen3", "t5_v11"])
def test_yesno_is_the_two_labels_softmax(name: str, layout: str) -> None:
    """A decoder reads the question behind the prompt; an encoder reads both, and the decoder answers."""
    mesh, made = scorer(name, layout=layout)
    ask = [[20, 5, 21], [20, 6, 21], [20, 5, 5, 21]]
    made.reader.asked = lambda ready: ask[: len(ready)]  # type: ignore[method-assign]
    made.reader.verdicts = lambda: (30, 31)  # type: ignore[method-assign]
    with jax.set_mesh(mesh):
        found = made.score([Request(PROMPTS[0], [0, 1, 2]), Request(PROMPTS[1], []), Request(PROMPTS[2], [4])], "yesno")
    assert [len(f) for f in found] == [3, 0, 1]
    score = one_by_one(name)
    for prompt, values in ((PROMPTS[0], found[0]), (PROMPTS[2], found[2])):
        for words, value in zip(ask, values):
            yes, no = (score([*prompt, *words], [label]) for label in (30, 31))
            assert value == pytest.approx(yes - np.logaddexp(yes, no), abs=1e-4)


@pytest.mark.parametrize("layout", ["packed", "auto"])
def test_a_system_prefix_is_computed_once_per_row(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two system prompts in turns: rows grow so that several requests stand behind theirs, and scores stay."""
    mesh, made = scorer("llama3", layout=layout)
    r = np.random.default_rng(1)
    systems = [r.integers(3, WORDS, 60).tolist() for _ in range(2)]
    requests = [
        Request([1, *systems[n % 2], *r.integers(3, WORDS, 6).tolist()], [r.integers(3, WORDS, 3).tolist()] * 2)
        for n in range(16)
    ]
    computed: list[int] = []
    with jax.set_mesh(mesh):
        plain = made.runner.kernel.packed

        def counted(params: Any, batch: Any, *args: Any, **options: Any) -> Any:
            computed.append(int(np.sum(np.asarray(batch["segment_ids"]))))
            return plain(params, batch, *args, **options)

        monkeypatch.setattr(made.runner.kernel, "packed", counted)
        found = made.score(requests, "likelihood")
    alone = sum(len(q.prompt) + 2 for q in requests)
    assert 0 < sum(computed) < 0.5 * alone, (computed, alone)
    for request, scores in zip(requests, found):
        words: Any = request.candidates[0]
        expected = one_by_one("llama3")(list(request.prompt), words)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_normalisations() -> None:
    mesh, made = scorer("llama3")
    score = one_by_one("llama3")
    request = Request(PROMPTS[0], CANDIDATES[0])
    with jax.set_mesh(mesh):
        total, mean, prior = (made.score([request], "likelihood", normalise=n)[0] for n in ("sum", "mean", "prior"))
        whole = made.score([Request(PROMPTS[0])], "trie", normalise="prior")[0]
    np.testing.assert_allclose(mean, total / [len(c) for c in CANDIDATES[0]], rtol=1e-5)
    np.testing.assert_allclose(prior, total - [score([1], c) for c in CANDIDATES[0]], atol=1e-4)
    words = [int(w[1:]) for w in titles()[0].split()] + [END]
    assert whole[0] == pytest.approx(score(PROMPTS[0], words) - score([1], words), abs=1e-4)


def test_odd_requests() -> None:
    mesh, made = scorer("llama3", max_candidate=4)
    with jax.set_mesh(mesh):
        assert made.score([], "likelihood") == []
        empty = made.score([Request([5, 6], []), Request([5, 6], [[]])], "likelihood")
        assert empty[0].shape == (0,) and empty[1].tolist() == [0]
        cut = made.score([Request([5], ["w5 w6 w7 w8 w9"])], "likelihood")[0]
        assert made.reader.cut == 1
        assert cut[0] == pytest.approx(one_by_one("llama3")([5], [5, 6, 7, END]), abs=1e-4)
        text, ids = made.score([Request([5], ["w5 w6"]), Request([5], [[5, 6, END]])], "likelihood")
        np.testing.assert_allclose(text, ids, atol=1e-6)
        with pytest.raises(UserError, match="request 1: the prompt has no tokens"):
            made.score([Request([5], [1]), Request([], [1])], "likelihood")
        with pytest.raises(UserError, match="unknown normalisation 'sums'"):
            made.score([], "likelihood", normalise="sums")  # type: ignore[arg-type]
        with pytest.raises(UserError, match="candidates cannot be listed behind token ids"):
            made.score([Request([5], [1, 2])], "labels")
        with pytest.raises(UserError, match="request 0: candidates of type float"):
            made.score([Request([5], [1.5])], "likelihood")  # type: ignore[list-item]
    with pytest.raises(UserError, match="unknown layout"):
        scorer("llama3", layout="wide")


def test_items_come_and_go_without_compiling() -> None:
    mesh, made = scorer("llama3")
    with jax.set_mesh(mesh):
        before = made.score([Request(PROMPTS[0])], "trie")[0]
        count = made.compilations()
        made.trie.update({0: [], 7: [9, 9, END], len(titles()): [6, 5, END]})
        scores, items = made.top_k(PROMPTS[:1], 150)
        every = made.runner.kernel.compilations()["every"]
        after = made.score([Request(PROMPTS[0])], "trie")[0]
        assert made.compilations() == count + every - 1, "only the ranking itself was new"
    assert after[0] == -np.inf and 0 not in items[0]
    assert after[7] == pytest.approx(one_by_one("llama3")(PROMPTS[0], [9, 9, END]), abs=1e-4)
    kept = [i for i in range(len(before)) if i not in (0, 7)]
    np.testing.assert_allclose(after[kept], before[kept], atol=1e-5)
    assert np.isfinite(scores).all()


def test_only_allowed_items_are_ranked() -> None:
    mesh, made = scorer("llama3")
    allowed = np.zeros((2, len(titles())), bool)
    allowed[0, [4, 9, 30]] = True
    allowed[1, 100:] = True
    with jax.set_mesh(mesh):
        scores, items = made.top_k(PROMPTS[:2], 5, allowed=allowed)
    assert sorted(items[0, :3].tolist()) == [4, 9, 30] and (scores[0, 3:] == -np.inf).all()
    assert (items[1] >= 100).all()


@pytest.mark.parametrize("hundreds", some([2, 10], 2))
def test_a_thousand_mixed_requests_compile_little(hundreds: int) -> None:
    """Prompts of 16 to 600 tokens, up to 100 candidates of up to 30: the mix of ``tools/bench/score.py``."""
    mesh, made = scorer("llama3", row_tokens=512)
    r = np.random.default_rng(0)
    draw = lambda n: r.integers(3, WORDS, n).tolist()  # noqa: E731
    with jax.set_mesh(mesh):
        for _ in range(hundreds):
            requests = [
                Request(draw(r.integers(16, 601)), [draw(n) for n in r.integers(1, 31, r.integers(0, 101))])
                for _ in range(100)
            ]
            made.score(requests, "likelihood")
        assert made.compilations() <= 12, made.runner.kernel.compilations()
