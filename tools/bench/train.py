"""Training against transformers and peft on PyTorch: same weights, same examples, same CPU, in one run; and the loader.

    python tools/bench/train.py --json
    python tools/bench/train.py --only packed --rounds 5    # one of full_step, lora_step, packed, loader

Needs torch (a CPU build), transformers and peft in the same environment (``make parity`` makes one), and SmolLM2-135M
(``instructrec model fetch smollm2-135m``). float32, or with ``--precision bfloat16`` mixed precision on both sides: float32 weights that
learn, products in bfloat16 (PyTorch's autocast).

    full_step, lora_step    8 rows x 256 tokens, every token predicted; all weights, or rank 8 on all projections; AdamW
    packed                  real instructions of the embedded data, 40 to 300 tokens, with LoRA. Ours packs them into rows of 512, 4 to a
                            step; theirs has 8 to a step, padded to the longest of them. Both train on the same examples
    loader                  examples a second and core of the loader on the same instructions, read and tokenised for the first time
                            and from its cache, over those that our step takes

Sides are processes of their own that take turns (``sides.py``); figures are medians over rounds. Ratios are seconds theirs over ours (the
loader's: its rate over the step's, for records that are not cached). Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import Side, Work, alternate, serve
from steps import matrix_multiply_rate, our_steps, their_steps, whole_rows

from instructrec_jax.host_memory import with_large_pages
from instructrec_jax.training import xla_flags

KINDS = ("full_step", "lora_step", "packed", "loader")
ROWS, LENGTH = 8, 256
PACKED_ROWS, PACKED_LENGTH, CHUNK, LOOK_AHEAD = 4, 512, 32, 8
SHORTEST, LONGEST = 40, 300
BATCHES = 200  # that the loader makes
PRESET = Path(__file__).parents[2] / "configs" / "smollm2_135m_lora_movielens.yaml"
MIX = ("--instructions.describe", "1", "--instructions.rerank", "0.25", "--instructions.pointwise", "0.1")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="known name or folder (default smollm2-135m)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds after the warm-up (default 3)")
    parser.add_argument("--runs", type=int, default=3, help="runs of a turn (default 3)")
    parser.add_argument("--batches", type=int, default=3, help="packed: steps of ours in a run (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (default: all cores)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="both sides' (default float32)"
    )
    parser.add_argument(
        "--our-python", default=sys.executable, help="that runs our side, with another jax (default: this one)"
    )
    parser.add_argument("--only", choices=KINDS, help="one kind of work")
    parser.add_argument("--prepared", help="folder to keep the prepared instructions in (default: made anew, a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # name, file: be one side
    arguments = parser.parse_args()
    if arguments.side:
        return serve(side(*arguments.side), warm_ups=1)

    from instructrec_jax.models.hf.fetch import resolve

    folder = str(resolve(arguments.model))
    kinds = [arguments.only] if arguments.only else list(KINDS)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for kind in kinds:
            if kind in ("full_step", "lora_step"):
                row = compare(kind, whole(kind, folder), work, arguments)
                ratios[f"{kind}_vs_torch"] = row["torch_seconds"] / row["ours_seconds"]
            elif kind == "packed":
                row = compare(kind, instructions(folder, arguments, work), work, arguments)
                ratios["packed_useful_vs_padded_torch"] = row["torch_seconds"] / row["ours_seconds"]
            else:
                packed = next((r for r in rows if r["work"] == "packed"), None)
                row = loader(instructions(folder, arguments, work), packed, work, arguments)
                ratios["loader_vs_step"] = row["first_time_per_core"] / row["step_examples_per_second"]
            rows.append(row)
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    rate = matrix_multiply_rate()
    print(f"matrix multiply of this CPU (numpy, 2048^3): {rate / 1e9:.0f} GFLOP/s")
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    if arguments.json:
        print(json.dumps({"rows": rows, "matmul_gflops": rate / 1e9, "ratios": ratios}))


def compare(kind: str, case: dict[str, Any], scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides for the same examples."""
    sides = open_sides(case, ("ours", "theirs"), scratch, arguments)
    seconds = alternate(sides, arguments.rounds)
    for one in sides.values():
        one.close()
    tokens = case["useful_tokens"]
    return {
        "work": kind,
        **case["about"],
        "ours_seconds": seconds["ours"],
        "torch_seconds": seconds["theirs"],
        "ours_useful_tokens_per_second": tokens / seconds["ours"],
        "torch_useful_tokens_per_second": tokens / seconds["theirs"],
    }


def open_sides(
    case: dict[str, Any], names: tuple[str, ...], scratch: Path, arguments: argparse.Namespace
) -> dict[str, Side]:
    """Processes that do the work of a case."""
    file = scratch / "case.pickle"
    file.write_bytes(pickle.dumps({**case, "threads": arguments.threads, "precision": arguments.precision}))
    pythons = {"ours": arguments.our_python}
    return {
        name: Side([__file__, "--side", name, str(file)], runs=arguments.runs, python=pythons.get(name, sys.executable))
        for name in names
    }


def side(name: str, file: str) -> Work:
    """In a side's process: its work."""
    if name == "ours":
        with_large_pages()  # as every command of ours begins
        xla_flags.apply()
    case = pickle.loads(Path(file).read_bytes())
    folder = Path(case["folder"])
    if name == "ours":
        return our_steps(case["kind"], folder, case["ours"], case["chunk"], case["precision"])
    return their_steps(case["kind"], folder, case["theirs"], case["threads"], case["precision"])


def whole(kind: str, folder: str) -> dict[str, Any]:
    """Rows of random tokens, all of which are predicted."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(10, 40_000, (ROWS, LENGTH)).astype(np.int32)
    return {
        "kind": kind, "folder": folder, "ours": [whole_rows(tokens)], "theirs": [{"input_ids": tokens, "labels": tokens}],
        "chunk": LENGTH, "useful_tokens": tokens.size, "about": {"rows": ROWS, "length": LENGTH},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- real instructions


def instructions(folder: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The same real instructions packed for us and padded for PyTorch."""
    import numpy as np

    from instructrec_jax.data.loader import TokenisedRecords
    from instructrec_jax.data.packing import packed
    from instructrec_jax.data.records import Records
    from instructrec_jax.data.tokenise import FIELDS

    prepared = prepare_mix(arguments, scratch)
    source = TokenisedRecords(Records(prepared.records), prepared.text, 4096)
    order = np.random.default_rng(0).permutation(len(source))[:2000]
    examples = [e for e in (source[int(i)] for i in order) if SHORTEST <= len(e) <= LONGEST]
    ours, place, held = [], 0, {}
    for _ in range(arguments.batches):
        batch, place, held = packed(examples.__getitem__, place, held, PACKED_ROWS, PACKED_LENGTH, LOOK_AHEAD)
        ours.append(batch)
    taken = [examples[at] for at in range(place) if at not in held]
    word, target = list(FIELDS).index("tokens"), list(FIELDS).index("text_target")
    theirs = [
        padded_rows([(e[:, word], e[:, target]) for e in taken[at : at + ROWS]]) for at in range(0, len(taken), ROWS)
    ]
    sizes = np.array([len(e) for e in taken])
    places = {"ours": ours[0]["tokens"].size * len(ours), "theirs": sum(b["input_ids"].size for b in theirs)}
    about = {
        "examples": len(taken), "mean_length": float(sizes.mean()), "shortest": int(sizes.min()), "longest": int(sizes.max()),
        "ours_steps": len(ours), "torch_steps": len(theirs),
        "ours_useful_share": float(sizes.sum() / places["ours"]), "torch_useful_share": float(sizes.sum() / places["theirs"]),
    }  # fmt: skip
    return {
        "kind": "lora_step", "folder": folder, "ours": ours, "theirs": theirs, "chunk": CHUNK,
        "useful_tokens": int(sizes.sum()), "about": about,
    }  # fmt: skip


def prepare_mix(arguments: argparse.Namespace, scratch: Path) -> Any:
    """The preset's data with all kinds of instructions that are answered in words."""
    from instructrec_jax import config as configs
    from instructrec_jax import prepare

    where = ("--prepared", arguments.prepared or str(scratch / "prepared"), "--model.pretrained", arguments.model)
    config = configs.load(PRESET, (*MIX, *where, "--name", "bench-mix"))
    if not (config.prepared_dir / "manifest.json").is_file():
        prepare.prepare(config, lambda _: None)
    return prepare.load(config)


def padded_rows(examples: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Examples as the usual collator gives them to transformers: padded to the longest, the loss on the answer alone."""
    import numpy as np

    # A row of ours leaves out the last token, which is only predicted; theirs has it, and shifts the labels itself.
    whole = [(np.append(tokens, max(target[-1] - 1, 0)), np.append(0, target)) for tokens, target in examples]
    longest = max(len(tokens) for tokens, _ in whole)
    out = {
        k: np.full((len(whole), longest), fill)
        for k, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
    }
    for row, (tokens, target) in enumerate(whole):
        out["input_ids"][row, : len(tokens)] = tokens
        out["labels"][row, : len(tokens)] = np.where(target > 0, target - 1, -100)
        out["attention_mask"][row, : len(tokens)] = 1
    return out


def loader(
    case: dict[str, Any], packed: dict[str, Any] | None, scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Examples a second and core of the loader, first read and tokenised and then cached; and what our step takes."""
    from itertools import islice

    from instructrec_jax.data.loader import training_iterator
    from instructrec_jax.data.packing import Position, Remaining

    if packed is None:
        sides = open_sides(case, ("ours",), scratch, arguments)
        seconds = alternate(sides, arguments.rounds)["ours"]
        sides["ours"].close()
    else:
        seconds = packed["ours_seconds"]
    prepared = prepare_mix(arguments, scratch)
    made = training_iterator(
        prepared.records,
        prepared.text,
        batch_size=PACKED_ROWS,
        sequence_length=PACKED_LENGTH,
        seed=0,
        look_ahead=LOOK_AHEAD,
    )
    made.close()  # the thread; its work is timed here, in this one
    rates = {}
    for name in ("first_time_per_core", "cached_per_core"):
        begun = time.process_time()
        *_, (_, reached) = islice(made._make(Remaining(), Position()), BATCHES)
        rates[name] = reached.count / (time.process_time() - begun)
    return {"work": "loader", **rates, "step_examples_per_second": case["about"]["examples"] / seconds}


if __name__ == "__main__":
    main()
