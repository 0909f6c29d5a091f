"""The scorer against transformers on PyTorch: same weights, same candidates, same CPU, in one run.

    python tools/bench/score.py --json                # SmolLM2-135M: 20 and 100 candidates, the catalogue, compilations
    python tools/bench/score.py --only c20 --rounds 7
    python tools/bench/score.py --only curve --curve-items 1000,10000

Needs torch (a CPU build) and transformers in the same environment (``make parity`` makes one). A prompt of 256 tokens, candidates of 12,
float32. Theirs is written in the ways of ``score_torch.py``; before anything is timed, the scores of all sides are compared. Each side
runs in a process of its own and they take turns (``sides.py``); a figure is the median over turns. Each ratio is their seconds over ours.
Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model import matrix_multiply_rate, random_model
from score_ours import make_scorer, our_work
from sides import Side, alternate, serve

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
GOLDEN = ROOT / "tests" / "golden" / "llama3"  # the smallest model at hand: 61 words, 2 layers
CASES = ("c20", "c100", "trie", "curve", "compilations")
WAYS = ("naive", "naive_needed_logits", "prefix_cache", "packed_torch")
SLOW = {"naive": 1, "naive_needed_logits": 1}  # runs per turn of what takes tens of seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a model folder or name, or random (default {MODEL}, or random without it)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (default 256)")
    parser.add_argument("--length", type=int, default=12, help="tokens of a candidate (default 12)")
    parser.add_argument(
        "--sample", type=int, default=40, help="films that PyTorch scores of the catalogue (default 40)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="most that a candidate's log probability may differ (default 1e-4)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--runs", type=int, default=6, help="runs of a fast side's turn (default 6)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (default: all cores)")
    parser.add_argument("--layout", choices=("auto", "packed", "batched"), default="auto", help="of our candidates")
    parser.add_argument("--only", choices=CASES, help="one kind of work")
    parser.add_argument(
        "--curve", type=Path, nargs="?", const=ROOT / "docs" / "images", help="measure it, draw it into this folder"
    )
    parser.add_argument("--curve-items", default="1000,10000,100000", help="catalogues of the curve")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)  # name, model folder, case, answer: be one side
    arguments = parser.parse_args()
    if arguments.side:
        return side(arguments)

    cases = [arguments.only] if arguments.only else [c for c in CASES if c != "curve" or arguments.curve]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        folder, name = model_folder(arguments.model, scratch)
        print(f"model: {name}", flush=True)
        for case in cases:
            if case in ("trie", "curve") and not (folder / "tokenizer.json").is_file():
                print(f"{case}: left out, the model has no tokeniser")
            elif case == "trie":
                rows[case] = measure_trie(arguments, folder, scratch)
            elif case == "curve":
                from score_curve import measure_curve

                to = arguments.curve or ROOT / "docs" / "images"
                sizes = [int(n) for n in arguments.curve_items.split(",")]
                rows[case] = measure_curve(
                    catalogue_titles(), sizes, to, lambda c, **o: start("curve", c, arguments, folder, scratch, **o)
                )
            elif case == "compilations":
                rows[case] = count_compilations(arguments.layout)
            else:
                rows[case] = measure_candidates(case, arguments, folder, scratch)
    if arguments.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "side"}
        packages = [p for p in ("jax", "torch", "transformers", "instructrec_jax") if importlib.util.find_spec(p)]
        versions = {p: importlib.metadata.version(p) for p in packages}
        about = {"python": platform.python_version(), **versions, "cpus": os.cpu_count(), "settings": settings}
        print(json.dumps({"benchmark": "score", "model": name, **rows, **about, "ratios": ratios(rows)}))


def model_folder(given: str | None, scratch: Path) -> tuple[Path, str]:
    """(folder, name) of the model: the published weights, or random ones of the same shape where they cannot be had."""
    from instructrec_jax.errors import UserError
    from instructrec_jax.models.hf.fetch import resolve

    if given != "random":
        try:
            return resolve(given or MODEL), given or MODEL
        except UserError as error:
            if given:
                raise SystemExit(f"error: {error}") from None
            print(f"{MODEL} cannot be had: {error}")
    return random_model(scratch), f"random weights of the shape of {MODEL}"


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """Their seconds over ours, by case and side; for the limit of the arithmetic its seconds over ours."""
    out = {}
    for case in ("c20", "c100", "trie"):
        for side_name, times in rows.get(case, {}).get("sides", {}).items():
            if side_name in WAYS:
                out[f"{case}_vs_{side_name}"] = times["seconds"] / rows[case]["sides"]["ours"]["seconds"]
        if "flop_limit_seconds" in rows.get(case, {}):
            out[f"{case}_of_flop_limit"] = rows[case]["flop_limit_seconds"] / rows[case]["sides"]["ours"]["seconds"]
    return out


# ---------------------------------------------------------------------------------------------------------------- cases


def measure_candidates(case: str, arguments: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """20 or 100 candidates of one prompt: ours, PyTorch's ways, and the limit of the arithmetic."""
    import numpy as np

    from instructrec_jax.models.hf.load import read_config

    count = int(case[1:])
    if (folder / "tokenizer.json").is_file():
        what = real_request(folder, arguments.prompt, count, arguments.length)
    else:
        r = np.random.default_rng(0)
        draw = lambda n: r.integers(10, 40_000, n).tolist()  # noqa: E731
        what = {"prompt": draw(arguments.prompt), "candidates": [draw(arguments.length) for _ in range(count)]}
    options: dict[str, dict[str, Any]] = {name: {"runs": arguments.runs} for name in ("ours", *WAYS)}
    options |= {name: {"runs": runs} for name, runs in SLOW.items()}
    options["rate"] = {"runs": 1}
    if count > 20:
        del options["naive_needed_logits"]  # says nothing that 20 candidates do not, in minutes
        options["naive"]["turns"] = 2
    found = compared(case, what, options, arguments, folder, scratch)
    rate = found["rate"]["rate"]
    operations = shared_prefix_operations(read_config(folder), arguments.prompt, count, arguments.length)
    limit = operations / rate
    ours = found["sides"]["ours"]["seconds"]
    print(
        f"{case}: the arithmetic, {operations / 1e9:.1f} GFLOP, takes {limit:.3f} s at {rate / 1e9:.0f} GFLOP/s, "
        f"the best matrix product of this run: ours is at {limit / ours:.0%} of that",
        flush=True,
    )
    return {
        "sides": found["sides"],
        "gflop": operations / 1e9,
        "matmul_gflops": rate / 1e9,
        "flop_limit_seconds": limit,
    }


def real_request(folder: Path, prompt: int, count: int, length: int) -> dict[str, Any]:
    """A history of films as the prompt, and titles as candidates, cut to the number of tokens that is asked for.

    No two candidates begin with the same token, so that ours has no prefix of theirs to share.
    """
    import numpy as np

    from instructrec_jax.data.tokenizer import load_pretrained

    titles = catalogue_titles()
    text = load_pretrained(folder, "none")
    order = np.random.default_rng(0).permutation(len(titles)).tolist()
    history = "Watched so far, oldest first: " + "; ".join(titles[i] for i in order[: 20 + prompt])
    first: dict[int, list[int]] = {}
    for at in range(len(order)):
        # A short title is followed by the next ones, as in a list.
        ids = text.encode("; ".join(titles[i] for i in order[at : at + 1 + length]))[:length]
        first.setdefault(ids[0], ids)
    return {"prompt": text.encode(history)[:prompt], "candidates": list(first.values())[:count]}


def measure_trie(arguments: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """The whole catalogue for one prompt: ours, and the naive way on a random sample of films, scaled to all."""
    import numpy as np

    from instructrec_jax.data.tokenizer import load_pretrained

    titles = catalogue_titles()
    text = load_pretrained(folder, "none")
    r = np.random.default_rng(0)
    sample = sorted(r.choice(len(titles), min(arguments.sample, len(titles)), replace=False).tolist())
    what = {
        "prompt": real_request(folder, arguments.prompt, 1, arguments.length)["prompt"],
        "candidates": [[*ids, *text.end] for ids in text.encode_batch([titles[i] for i in sample])],
        "titles": titles,
        "sample": sample,
    }
    options: dict[str, dict[str, Any]] = {"ours": {"runs": 1}, "naive": {"runs": 1, "turns": 2}}
    scale = len(titles) / len(sample)
    found = compared("trie", what, options, arguments, folder, scratch, {"naive": scale})
    times = found["sides"]["naive"]
    times["sampled_items"] = len(sample)
    trie = found["ours"]["trie"]
    print(
        f"trie: {trie['items']:,} items of {trie['tokens']:,} tokens (items x length) in {trie['nodes']:,} nodes, "
        f"{trie['blocks']} blocks; naive was timed on {len(sample)} random items and multiplied by {scale:.1f}: "
        f"{times['seconds']:.0f} s, ours {found['sides']['ours']['seconds']:.1f} s",
        flush=True,
    )
    return {"sides": found["sides"], "trie": trie}


def compared(
    case: str,
    what: dict[str, Any],
    options: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
    folder: Path,
    scratch: Path,
    scales: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Seconds of the sides in ``options`` on one request, after a check that their scores agree.

    ``scales``: what a side's seconds are multiplied by, where it was given a sample of the work.

    Returns:
        ``sides``: seconds by side (median over turns; the fastest and slowest run); beside it what each side answered.

    Raises:
        SystemExit: the scores of two sides differ.
    """
    import numpy as np

    running, answers = {}, {}
    for name, more in {"exact": {}, **options}.items():
        running[name], answers[name] = start(name, what, arguments, folder, scratch, **more)
        if name == "exact":
            running.pop(name).close()
    scores = {name: np.asarray(json.loads(a.read_text())["scores"]) for name, a in answers.items() if name != "rate"}
    exact = scores.pop("exact")
    worst = {name: float(np.abs(s - exact).max()) for name, s in scores.items()}
    print(
        f"{case}: largest difference in log probability from float64: "
        + ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    )
    if not max(worst.values()) <= arguments.tolerance:  # not ">", which NaN would pass
        raise SystemExit(f"error: {case}: scores are off by more than {arguments.tolerance:g}; see --tolerance")
    seconds = alternate(running, arguments.rounds)
    out: dict[str, Any] = {name: json.loads(a.read_text()) for name, a in answers.items()} | {"sides": {}}
    answers.pop("exact")
    for name, one in running.items():
        one.close()
        if name == "rate":
            continue
        scale = (scales or {}).get(name, 1.0)
        seconds[name] *= scale
        times = {"fastest": scale * min(one.times), "slowest": scale * max(one.times), "runs": len(one.times)}
        note = out[name]["note"] + (f", a sample's time x {scale:.1f}" if scale != 1 else "")
        out["sides"][name] = {"seconds": seconds[name], **times, "note": note, "largest_difference": worst.get(name)}
        print(
            f"{case:<5} {name:<20} {seconds[name]:8.3f} s ({times['fastest']:.3f} to {times['slowest']:.3f}, {times['runs']} runs), "
            f"ratio {seconds[name] / seconds['ours']:6.2f}  {note}",
            flush=True,
        )
    return out


def shared_prefix_operations(arch: Any, prompt: int, candidates: int, length: int) -> float:
    """Floating-point operations without which C candidates of L tokens behind one prompt of P cannot be scored exactly.

    Inputs are N = P + C (L - 1) tokens: the last token of a candidate is only predicted. Two operations per multiplication:

    * products of the layers: 2 N x weights of all layers (width x (2 query + 2 key heads x head size) + 3 width x MLP width, each);
    * attention: 4 x heads x head size per layer and pair of a token and what it may read: P (P + 1) / 2 pairs of the prompt, and
      (L - 1) P + (L - 1) L / 2 of a candidate, itself included;
    * the head: 2 x width x vocabulary for the prompt's last position and L - 1 of every candidate.

    Norms, activations, rotations and softmaxes are not counted. This is a lower limit for any implementation that shares the prompt
    and nothing else; no two candidates of the benchmark begin with the same token.
    """
    from instructrec_jax.scoring.layout import Cost

    cost = Cost.of(arch)
    inputs = prompt + candidates * (length - 1)
    pairs = prompt * (prompt + 1) / 2 + candidates * ((length - 1) * prompt + (length - 1) * length / 2)
    read = 1 + candidates * (length - 1)
    return inputs * cost.per_token + pairs * cost.per_pair + 2.0 * read * arch.width * arch.vocab


def catalogue_titles() -> list[str]:
    """Titles of ml-latest-small after its preset's cleaning: the films of the 5-core."""
    from instructrec_jax import config
    from instructrec_jax.data import sources
    from instructrec_jax.data.cleaning import clean

    preset = config.load(ROOT / "configs" / "ml_latest_small.yaml")
    return clean(sources.read(preset.data, preset.name), preset.data.clean).items["title"].to_pylist()


def count_compilations(layout: str) -> dict[str, int]:
    """Compilations of a thousand requests of all sizes in calls of a hundred, by function; on a tiny model."""
    import jax
    import numpy as np

    from instructrec_jax.scoring import Request

    mesh, scorer = make_scorer(GOLDEN, [], layout)
    r = np.random.default_rng(0)
    draw = lambda n: r.integers(3, 61, n).tolist()  # noqa: E731
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        for _ in range(10):
            requests = [
                Request(draw(r.integers(16, 601)), [draw(r.integers(1, 31)) for _ in range(r.integers(0, 101))])
                for _ in range(100)
            ]
            scorer.score(requests, "likelihood")
    counts = {name: n for name, n in scorer.runner.kernel.compilations().items() if n}
    assert sum(counts.values()) == scorer.compilations()
    by_name = ", ".join(f"{name} {n}" for name, n in counts.items())
    print(
        f"compilations of 1,000 mixed requests: {scorer.compilations()} ({by_name}), {time.perf_counter() - begun:.0f} s"
    )
    return {"total": scorer.compilations(), **counts}


# ---------------------------------------------------------------------------------------------------------------- sides


def start(
    name: str, what: dict[str, Any], arguments: argparse.Namespace, folder: Path, scratch: Path, **options: Any
) -> tuple[Side, Path]:
    """A side's process on the request ``what``, and the file with its answer."""
    case, answer = scratch / "case.json", scratch / f"{name}.json"
    case.write_text(json.dumps(what))
    also = ["--threads", str(arguments.threads), "--layout", arguments.layout]
    return Side([__file__, "--side", name, str(folder), str(case), str(answer), *also], **options), answer


def side(arguments: argparse.Namespace) -> None:
    """Be one side: score once, write the answer, then run when told to."""
    name, folder, case, answer = arguments.side
    what, answer = json.loads(Path(case).read_text()), Path(answer)
    if name == "rate":
        return serve(rate_work(answer), 1)
    facts: dict[str, Any] = {"note": ""}
    if name in (*WAYS, "exact"):
        import torch  # pyright: ignore[reportMissingImports]  # noqa: F401  (before anything that starts threads of its own)
        from score_torch import their_work

        run, facts["note"] = their_work(name, Path(folder), what, arguments.threads)
    elif name == "curve":
        run, facts["trie"] = our_work(Path(folder), what, arguments.layout)
        answer.write_text(json.dumps(facts))
        return serve(run, 0)
    else:
        run, facts["trie"] = our_work(Path(folder), what, arguments.layout)
        facts["note"] = f"layout {arguments.layout}" if "titles" not in what else ""
    facts["scores"] = list(run())
    answer.write_text(json.dumps(facts))
    serve(run, 0 if name in SLOW or "titles" in what else 2)


def rate_work(answer: Path) -> Callable[[], None]:
    """A run that multiplies 2048 x 2048 by numpy and by XLA, and keeps the best FLOP/s of all runs so far in ``answer``."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    a = jnp.ones((2048, 2048), jnp.float32)
    product(a, a).block_until_ready()
    best = [0.0]

    def run() -> None:
        best[0] = max(best[0], matrix_multiply_rate())
        for _ in range(10):
            begun = time.perf_counter()
            product(a, a).block_until_ready()
            best[0] = max(best[0], 2 * 2048**3 / (time.perf_counter() - begun))
        answer.write_text(json.dumps({"rate": best[0]}))

    return run


if __name__ == "__main__":
    main()
