"""Forward passes and training steps of a language model, ours and PyTorch's, for the benchmarks to time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

from sides import Work

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SHAPE = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 100000.0,
}  # fmt: skip
RATE = 1e-4
Precision = Literal["float32", "bfloat16"]


def random_model(scratch: Path) -> Path:
    """A folder with random weights of SmolLM2-135M's shape."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "model_type"})
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(scratch / "model")
    return scratch / "model"


def whole_rows(tokens: Any) -> dict[str, Any]:
    """Rows ``[B, S]`` that are one text each, every token of which is predicted, as a batch of ours."""
    import numpy as np

    zeros = np.zeros_like(tokens)
    target = np.roll(tokens, -1, axis=1) + 1
    target[:, -1] = 0
    return {
        "tokens": tokens, "text_target": target, "item_target": zeros, "task": zeros + 1, "segment_ids": zeros + 1,
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
    }  # fmt: skip


def our_forward(folder: Path, tokens: Any) -> Work:
    """A forward pass of this project's model with all logits."""
    import jax

    from instructrec_jax.models.hf.load import load_params, read_config
    from instructrec_jax.models.language_model import LanguageModel, apply, plain_batch

    mesh = _mesh()
    with jax.set_mesh(mesh):
        arch = read_config(folder)
        params, model, batch = load_params(folder, arch), LanguageModel(arch), plain_batch(tokens)
        forward = jax.jit(lambda p, b: model.word_logits(apply(model, {"params": p}, b)))

    def run() -> None:
        with jax.set_mesh(mesh):
            forward(params, batch).block_until_ready()

    return run


def our_steps(
    kind: str, folder: Path, batches: list[dict[str, Any]], logits_chunk: int, precision: Precision = "float32"
) -> Work:
    """This project's training step (``full_step`` or ``lora_step``) on every batch of ``[B, S]``.

    ``precision``: of the products. What is trained is float32 either way, and LoRA's frozen weights are stored in it.
    """
    import jax
    import jax.numpy as jnp

    from instructrec_jax.config import AdapterConfig, Config, ModelConfig, TrainConfig
    from instructrec_jax.models.hf.load import load_params, read_config
    from instructrec_jax.models.language_model import Sizes
    from instructrec_jax.models.sharding import padded
    from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch

    mesh = _mesh()
    with jax.set_mesh(mesh):
        arch = read_config(folder)
        lora = kind == "lora_step"
        options = ModelConfig(
            pretrained="x", dropout=0.0, item_dropout=0.0, dtype=precision, param_dtype=precision if lora else "float32",
            adapter=AdapterConfig(rank=8 if lora else 0), trainable=("adapter",) if lora else ("all",),
        )  # fmt: skip
        rows, length = batches[0]["tokens"].shape
        train = TrainConfig(
            batch_size=rows, sequence_length=length, logits_chunk=logits_chunk, learning_rate=RATE, text_loss_weight=1.0,
            warmup_steps=1, weight_decay=0.01,
        )  # fmt: skip
        config = Config(model=options, train=train)
        sizes = Sizes(padded(arch.vocab))
        content = jnp.zeros((0, 0), jnp.float32)
        trained, frozen = init_model(config, arch, sizes, content, 0, load_params(folder, arch, options.param_dtype))
        state = [init_state(trained, train)]
        step = make_train_step(config, arch, sizes, 0)
        put = [put_batch(batch, 1) for batch in batches]

    def run() -> None:
        with jax.set_mesh(mesh):
            for batch in put:
                state[0], metrics = step(state[0], frozen, batch, content)
            jax.block_until_ready((state[0], metrics))

    return run


def _mesh() -> Any:
    import jax

    from instructrec_jax.config import MeshConfig
    from instructrec_jax.training.mesh import make_mesh

    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def _their_model(folder: Path, threads: int, precision: Precision = "float32") -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.set_num_threads(threads)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, precision), attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def their_forward(folder: Path, tokens: Any, threads: int) -> Work:
    """The same by transformers on PyTorch, with sdpa attention."""
    import torch  # pyright: ignore[reportMissingImports]

    model, ids = _their_model(folder, threads).eval(), torch.from_numpy(tokens.astype("int64"))

    def run() -> None:
        with torch.inference_mode():
            model(ids)

    return run


def their_steps(
    kind: str, folder: Path, batches: list[dict[str, Any]], threads: int, precision: Precision = "float32"
) -> Work:
    """The same step by transformers on PyTorch: sdpa attention, fused AdamW, peft's LoRA. ``batches`` are arguments of the model.

    ``bfloat16`` is PyTorch's autocast over float32 weights, and LoRA's over frozen weights that are bfloat16 already.
    """
    import torch  # pyright: ignore[reportMissingImports]

    lora = kind == "lora_step"
    model = _their_model(folder, threads, precision if lora else "float32")
    if lora:
        import peft  # pyright: ignore[reportMissingImports]

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    model.train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.01, fused=True)
    put = [{k: torch.from_numpy(v.astype("int64")) for k, v in batch.items()} for batch in batches]

    def run() -> None:
        for batch in put:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()

    return run


def matrix_multiply_rate() -> float:
    """FLOP/s of the best of ten numpy products of 2048 x 2048."""
    import numpy as np

    a = np.ones((2048, 2048), np.float32)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        np.matmul(a, a)
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048**3 / best
