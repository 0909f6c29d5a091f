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
import time
from pathlib import Path
from typing import Any

from sides import Side, Work, alternate, serve

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SHAPE = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 100000.0,
}  # fmt: skip
RATE = 1e-4


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
        make = our_work if name == "ours" else their_work
        return serve(make(arguments.only, Path(folder), np.load(tokens), arguments.threads))
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


def random_model(scratch: Path) -> Path:
    """A folder with random weights of SmolLM2-135M's shape."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "model_type"})
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(scratch / "model")
    return scratch / "model"


def our_work(kind: str, folder: Path, tokens: Any, threads: int) -> Work:
    """One call of this project's forward pass or training step; XLA takes all cores whatever ``threads`` says."""
    del threads
    import jax
    import jax.numpy as jnp
    import numpy as np

    from instructrec_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig, TrainConfig
    from instructrec_jax.models.hf.load import load_params, read_config
    from instructrec_jax.models.language_model import LanguageModel, Sizes, apply, plain_batch
    from instructrec_jax.models.sharding import padded
    from instructrec_jax.training.mesh import make_mesh
    from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch

    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        arch = read_config(folder)
        if kind == "forward":
            params = load_params(folder, arch)
            model = LanguageModel(arch)
            batch = plain_batch(tokens)
            forward = jax.jit(lambda p, b: model.word_logits(apply(model, {"params": p}, b)))

            def run_forward() -> None:
                with jax.set_mesh(mesh):
                    forward(params, batch).block_until_ready()

            return run_forward

        lora = kind == "lora_step"
        options = ModelConfig(
            pretrained="x", dropout=0.0, item_dropout=0.0,
            adapter=AdapterConfig(rank=8 if lora else 0), trainable=("adapter",) if lora else ("all",),
        )  # fmt: skip
        length = tokens.shape[1]
        train = TrainConfig(
            batch_size=tokens.shape[0], sequence_length=length, logits_chunk=length, learning_rate=RATE, text_loss_weight=1.0,
            warmup_steps=1, weight_decay=0.01,
        )  # fmt: skip
        config = Config(model=options, train=train)
        sizes = Sizes(padded(arch.vocab))
        content = jnp.zeros((0, 0), jnp.float32)
        trained, frozen = init_model(config, arch, sizes, content, 0, load_params(folder, arch))
        state = [init_state(trained, train)]
        step = make_train_step(config, arch, sizes, 0)
        zeros = np.zeros_like(tokens)
        target = np.roll(tokens, -1, axis=1) + 1
        target[:, -1] = 0
        batch = put_batch(
            {
                "tokens": tokens, "text_target": target, "item_target": zeros, "task": zeros + 1, "segment_ids": zeros + 1,
                "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
            },
            1,
        )  # fmt: skip

        def run_step() -> None:
            with jax.set_mesh(mesh):
                state[0], metrics = step(state[0], frozen, batch, content)
                jax.block_until_ready((state[0], metrics))

        return run_step


def their_work(kind: str, folder: Path, tokens: Any, threads: int) -> Work:
    """The same work by transformers on PyTorch: sdpa attention, fused AdamW, peft's LoRA."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    ids = torch.from_numpy(tokens.astype("int64"))
    if kind == "forward":
        model.eval()

        def forward() -> None:
            with torch.inference_mode():
                model(ids)

        return forward
    if kind == "lora_step":
        import peft  # pyright: ignore[reportMissingImports]

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    model.train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.01, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()

    return step


def matrix_multiply_rate() -> float:
    """FLOP/s of the best of ten numpy products of 2048 x 2048."""
    import numpy as np

    a = np.ones((2048, 2048), np.float32)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048**3 / best


if __name__ == "__main__":
    main()
