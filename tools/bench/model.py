"""The language model against transformers on PyTorch: same weights, same batch, same CPU, in one run.

    python tools/bench/model.py --json                    # random weights of SmolLM2-135M's shape
    python tools/bench/model.py --model DIR --rounds 7    # a model folder

Needs torch (a CPU build), transformers and peft in the same environment (``make parity`` makes one). Three kinds of work, float32,
B rows x S tokens: a forward pass with all logits; a full training step (all weights, AdamW); a LoRA step (rank 8 on all projections).
Each side runs in a process of its own, so that neither finds the other's threads spinning or its heap in pieces; they take turns, and
a figure is the median over rounds. Each ratio is tokens/s ours over theirs: above 1 is faster than PyTorch.
Run it on a quiet machine: beside other work the same pass takes up to twice as long.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sides import Side, Work, alternate, serve
from steps import matrix_multiply_rate, our_forward, our_steps, random_model, their_forward, their_steps, whole_rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; default: random weights of SmolLM2-135M's shape")
    parser.add_argument("--rows", type=int, default=1, help="B (default 1)")
    parser.add_argument("--length", type=int, default=512, help="S (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one warm-up (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (default: all cores)")
    parser.add_argument("--only", choices=("forward", "full_step", "lora_step"), help="one kind of work")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)  # name, model folder, tokens: be one side
    arguments = parser.parse_args()

    import numpy as np

    if arguments.side:
        name, folder, tokens = arguments.side
        return serve(work_of(name, arguments.only, Path(folder), np.load(tokens), arguments.threads))
    tokens = np.random.default_rng(0).integers(10, 40_000, (arguments.rows, arguments.length)).astype(np.int32)
    kinds = [arguments.only] if arguments.only else ["forward", "full_step", "lora_step"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or random_model(Path(scratch))
        ids = Path(scratch) / "tokens.npy"
        np.save(ids, tokens)
        for kind in kinds:
            also = ["--only", kind, "--threads", str(arguments.threads)]
            sides = {
                name: Side([__file__, "--side", name, str(folder), str(ids), *also]) for name in ("ours", "theirs")
            }
            seconds = alternate(sides, arguments.rounds)
            count = tokens.size
            row = {
                "work": kind,
                "ours_seconds": seconds["ours"],
                "torch_seconds": seconds["theirs"],
                "ours_tokens_per_second": count / seconds["ours"],
                "torch_tokens_per_second": count / seconds["theirs"],
            }
            rows.append(row)
            print(
                f"{kind:<10} ours {row['ours_tokens_per_second']:7.0f} tok/s, torch {row['torch_tokens_per_second']:7.0f} tok/s, "
                f"ratio {seconds['theirs'] / seconds['ours']:.2f}",
                flush=True,
            )
            for side in sides.values():
                side.close()
    rate = matrix_multiply_rate()
    print(f"matrix multiply of this CPU (numpy, 2048^3): {rate / 1e9:.0f} GFLOP/s")
    if arguments.json:
        ratios = {f"{r['work']}_vs_torch": r["torch_seconds"] / r["ours_seconds"] for r in rows}
        print(json.dumps({"rows": rows, "matmul_gflops": rate / 1e9, "ratios": ratios}))


def work_of(side: str, kind: str, folder: Path, tokens: Any, threads: int) -> Work:
    """One side's work; XLA takes all cores whatever ``threads`` says."""
    if side == "ours":
        if kind == "forward":
            return our_forward(folder, tokens)
        return our_steps(kind, folder, [whole_rows(tokens)], logits_chunk=tokens.shape[1])
    if kind == "forward":
        return their_forward(folder, tokens, threads)
    return their_steps(kind, folder, [{"input_ids": tokens, "labels": tokens}], threads)


if __name__ == "__main__":
    main()
