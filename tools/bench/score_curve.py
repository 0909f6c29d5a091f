"""Time of the whole catalogue by its trie, for catalogues of growing size; ``score.py`` runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = 5_000  # items from which a run takes minutes


def measure_curve(titles: list[str], sizes: list[int], folder: Path, start: Callable[..., Any]) -> list[dict[str, Any]]:
    """Seconds per request for catalogues of ``sizes`` items; draws ``trie_cost.png`` into ``folder``.

    Args:
        titles: real ones, whose words the catalogues are made of.
        sizes: numbers of items.
        folder: made if it is not there.
        start: starts our side on a case: (the side, the file with its answer).
    """
    import numpy as np

    rows = []
    for size in sizes:
        prompt = np.random.default_rng(0).integers(10, 40_000, 256).tolist()
        case = {"prompt": prompt, "titles": composed(titles, size), "sample": [0]}
        one, answer = start(case, runs=1 if size >= LONG else 3)
        seconds = one.seconds()
        one.close()
        rows.append({"seconds": seconds, "runs": len(one.times), **json.loads(answer.read_text())["trie"]})
        row = rows[-1]
        print(
            f"curve: {row['items']:,} items, {row['tokens']:,} tokens (items x length), {row['nodes']:,} nodes in {row['blocks']:,} "
            f"blocks: {seconds:.1f} s a request, {1e3 * seconds / row['nodes']:.2f} ms a node",
            flush=True,
        )
    folder.mkdir(parents=True, exist_ok=True)
    draw(rows, folder / "trie_cost.png")
    print(f"curve: drawn in {folder / 'trie_cost.png'}")
    return rows


def composed(titles: list[str], count: int, seed: int = 0) -> list[str]:
    """``count`` distinct titles of real words: a word at its place comes from that place of a real title, and the year from one too.

    So they begin like real ones ("The ..."), and are as long.
    """
    import numpy as np

    r = np.random.default_rng(seed)
    parts = [re.match(r"(.*?)\s*(\(\d{4}\))?$", title) for title in titles]
    words = [m[1].split() for m in parts if m]
    years = [m[2] for m in parts if m and m[2]]
    at = [[w[k] for w in words if len(w) > k] for k in range(max(map(len, words)))]
    out: dict[str, None] = {}
    while len(out) < count:
        length = len(words[r.integers(len(words))])
        some = [at[k][r.integers(len(at[k]))] for k in range(length)]
        out[" ".join([*some, years[r.integers(len(years))]])] = None
    return list(out)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against trie nodes and against items x length, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    seconds = [row["seconds"] for row in rows]
    for name, label, mark in (
        ("nodes", "nodes of the trie", "o"),
        ("tokens", "items x length (tokens of all titles)", "s"),
    ):
        axes.plot([row[name] for row in rows], seconds, marker=mark, label=label)
    for row in rows:
        axes.annotate(
            f"{row['items']:,} items", (row["nodes"], row["seconds"]), (-6, 4), textcoords="offset points", ha="right"
        )
    axes.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="seconds per request", title="Whole catalogue by its trie"
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.margins(0.25, 0.15)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
