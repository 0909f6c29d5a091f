"""Scores of every layout against PyTorch, one candidate at a time from the full text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from instructrec_jax.data.tokenizer import Text, load_pretrained
from instructrec_jax.models.hf.fetch import resolve
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.language_model import PLAIN, Sizes
from instructrec_jax.models.sharding import padded
from instructrec_jax.scoring import Request, Scorer
from tests.parity import cases, reference
from tests.parity.ours import one_device
from tests.test_scorer_methods import plain_text

TITLES = [
    "Heat (1995)", "Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)", "Shichinin no samurai 七人の侍 (1954)", "Heat (1995)",
    "Heat and Dust (1983)", "¡Átame! 🎬", "A",
]  # fmt: skip


def theirs(model: Any, prompt: list[int], candidate: list[int], start: int | None) -> float:
    """log P(candidate | prompt) by transformers."""
    with torch.inference_mode():
        if start is None:
            ids = torch.tensor([[*prompt, *candidate]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        else:
            inputs = torch.tensor([[start, *candidate[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=inputs).logits[0]
        log = torch.log_softmax(logits.double(), dim=-1)
        return float(log[torch.arange(len(candidate)), torch.tensor(candidate)].sum())


def ours(folder: Path, text: Text, titles: list[str], requests: list[Request], method: str, layout: Any) -> list:
    with jax.set_mesh(one_device()):
        arch = read_config(folder)
        sizes = Sizes(padded(arch.vocab))
        params = {"params": load_params(folder, arch, sizes=sizes)}
        content = jnp.zeros((0, 0), jnp.float32)
        scorer = Scorer(PLAIN, arch, sizes, params, content, len(titles), text, titles, layout=layout)
        return scorer.score(requests, method)


@pytest.mark.parametrize("name", ["t5_v11", "llama3", "gemma3"])
def test_random_models(name: str) -> None:
    case = cases.CASES[name]
    r = np.random.default_rng(0)
    draw = lambda n: r.integers(3, cases.VOCAB, n).tolist()  # noqa: E731
    requests = [Request(draw(n), [draw(m) for m in r.integers(1, 9, 12)]) for n in (1, 7, 23)]
    with tempfile.TemporaryDirectory() as folder:
        model = reference.write_model(case.config, Path(folder), seed=3, untied_head=case.untied_head)
        start = model.config.decoder_start_token_id if case.kind == "encoder-decoder" else None
        expected = [[theirs(model, list(q.prompt), c, start) for c in q.candidates] for q in requests]  # type: ignore[arg-type]
        for layout in ("packed", "batched"):
            found = ours(Path(folder), plain_text(), [], requests, "likelihood", layout)
            for a, b in zip(found, expected):
                np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_smollm2() -> None:
    """Real weights: titles with accents, other scripts and the same twice, behind a real prompt."""
    import transformers

    folder = resolve("smollm2-135m")
    text = load_pretrained(folder, "none")
    prompt = text.encode(
        "Watched so far, oldest first: Casino (1995); Goodfellas (1990); Ronin (1998). The next film is:"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    candidates = [[*text.encode(t), *text.end] for t in TITLES]
    expected = [theirs(model, prompt, c, None) for c in candidates]
    for method, layout in (("likelihood", "packed"), ("likelihood", "batched"), ("trie", "auto")):
        asked = "all" if method == "trie" else TITLES
        found = ours(folder, text, TITLES, [Request(prompt, asked)], method, layout)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
