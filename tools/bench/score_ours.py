"""This project's side of ``score.py``: a scorer on one device, and its work on one request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch


def our_work(folder: Path, case: dict[str, Any], layout: str) -> tuple[Callable[[], list[float]], dict[str, int]]:
    """(One call of the scorer that returns the case's scores, numbers of the catalogue's trie)."""
    import jax

    from instructrec_jax.scoring import Request

    titles = case.get("titles", [])
    mesh, scorer = make_scorer(folder, titles, layout)
    request = Request(case["prompt"]) if titles else Request(case["prompt"], case["candidates"])

    def run() -> list[float]:
        with jax.set_mesh(mesh):
            scores = scorer.score([request], "trie" if titles else "likelihood")[0]
        return (scores[case["sample"]] if titles else scores).tolist()

    if not titles:
        return run, {}
    with jax.set_mesh(mesh):
        compile_trie(scorer, request)
        return run, trie_facts(scorer)


def make_scorer(folder: Path, titles: list[str], layout: Any) -> tuple[Any, Any]:
    """(Mesh of one device, to be entered; scorer on it)."""
    import jax
    import jax.numpy as jnp
    from tokenizers import Tokenizer, models

    from instructrec_jax.config import MeshConfig
    from instructrec_jax.data.tokenizer import Text, load_pretrained
    from instructrec_jax.models.hf.load import load_params, read_config
    from instructrec_jax.models.language_model import PLAIN, Sizes
    from instructrec_jax.models.sharding import padded
    from instructrec_jax.scoring import Scorer
    from instructrec_jax.training.mesh import make_mesh

    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        arch = read_config(folder)
        sizes = Sizes(padded(arch.vocab))
        params = {"params": load_params(folder, arch, sizes=sizes)}
        # Token ids pass the tokeniser by, so a model without one takes an empty one.
        known = (folder / "tokenizer.json").is_file()
        text = load_pretrained(folder, "none") if known else Text(Tokenizer(models.WordLevel()), arch.vocab)
        none = jnp.zeros((0, 0), jnp.float32)
        return mesh, Scorer(PLAIN, arch, sizes, params, none, len(titles), text, titles, layout=layout)


def trie_facts(scorer: Any) -> dict[str, int]:
    """Sizes of a scorer's trie: items, their tokens (items x length), nodes and blocks."""
    trie = scorer.trie
    tokens = sum(map(len, scorer.reader.all_titles()))
    facts = {"items": len(trie), "tokens": tokens, "nodes": len(trie.forest), "leaves": len(trie.forest.leaf_token)}
    return facts | {"blocks": len(trie.blocks), "computed_nodes": trie.blocks.computed}


def compile_trie(scorer: Any, request: Any) -> None:
    """Compile what the request needs by running the first blocks alone: their number is an argument, not a shape.

    A run over a large catalogue takes too long to be a warm-up.
    """
    import jax
    import numpy as np

    trie, mesh = scorer.trie, jax.sharding.get_mesh()
    blocks, slots, number = trie.on(mesh)
    few = jax.device_put(np.int32(min(int(number), trie.group)), number.sharding)
    with patch.object(trie, "on", return_value=(blocks, slots, few)):
        scorer.score([request], "trie")
