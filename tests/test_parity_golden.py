"""The models against stored outputs of transformers (PyTorch): ``tests/golden/``, written by ``tools/goldens.py``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from instructrec_jax.config import MeshConfig
from instructrec_jax.models.hf.configs import from_hf
from instructrec_jax.training.mesh import make_mesh
from tests.parity import inputs
from tests.parity.cases import CASES
from tests.parity.ours import Ours, assert_gradients, assert_logits, one_device
from tests.variants import some

GOLDEN = Path(__file__).parent / "golden"
DECODERS, SEQ2SEQ, ENCODERS = (
    [name for name, case in CASES.items() if case.kind == kind] for kind in ("decoder", "encoder-decoder", "encoder")
)

# All of them in test_packed_sequences_do_not_see_each_other
USUAL = some(DECODERS, "gpt2", "llama3", "qwen3", "gemma3")


@pytest.fixture(scope="module", autouse=True)
def _mesh() -> Iterator[None]:
    with jax.set_mesh(one_device()):
        yield


_loaded: dict[str, tuple[Ours, dict[str, np.ndarray]]] = {}


def golden(name: str) -> tuple[Ours, dict[str, np.ndarray]]:
    """The model of a case, loaded once, and its stored inputs and outputs."""
    if name not in _loaded:
        with np.load(GOLDEN / name / "io.npz") as io:
            _loaded[name] = Ours(GOLDEN / name), dict(io)
    return _loaded[name]


def stored_gradients(io: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    return float(io["loss"]), {key.removeprefix("grad:"): g for key, g in io.items() if key.startswith("grad:")}


def test_every_case_has_its_folder() -> None:
    assert sorted(CASES) == sorted(path.name for path in GOLDEN.iterdir())
    assert all(
        json.loads((GOLDEN / n / "config.json").read_text(encoding="utf-8")) == c.config for n, c in CASES.items()
    )


# transformers 5 saves T5 1.1 and mT5 as tied, though the file has an output matrix: test_output_matrix_that_the_config_denies.
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.untied_head])
def test_both_spellings_of_a_config_are_one_architecture(name: str) -> None:
    """As published, and as the newest transformers saves it (nested ``rope_parameters``, ``layer_types``, ``dtype``)."""
    published, saved = (
        json.loads((GOLDEN / name / f).read_text("utf-8")) for f in ("config.json", "config_saved.json")
    )
    assert from_hf(published) == from_hf(saved)


@pytest.mark.parametrize("name", USUAL)
def test_padding_on_the_right(name: str) -> None:
    ours, io = golden(name)
    mask = inputs.right_mask(io["lengths"], io["right_tokens"].shape[1])
    assert_logits(ours.logits(io["right_tokens"], mask), io["right_logits"])


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_the_left(name: str) -> None:
    ours, io = golden(name)
    assert_logits(ours.logits(io["left_tokens"], io["left_mask"], io["left_positions"]), io["left_logits"])


@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    ours, io = golden(name)
    logits = ours.logits(io["packed_tokens"], io["packed_segments"], io["packed_positions"])
    assert_logits(logits, io["packed_logits"])


@pytest.mark.parametrize("name", USUAL)
def test_long_sequence(name: str) -> None:
    """Beyond the window of local layers and the original context of a scaled RoPE."""
    ours, io = golden(name)
    assert_logits(ours.logits(io["long_tokens"])[0, io["long_at"]], io["long_logits"])


@pytest.mark.parametrize("name", DECODERS)
def test_positions_to_the_end_of_the_context(name: str) -> None:
    ours, io = golden(name)
    assert_logits(ours.logits(io["far_tokens"], None, io["far_positions"]), io["far_logits"])


@pytest.mark.parametrize("name", USUAL)
def test_continuing_with_a_cache(name: str) -> None:
    ours, io = golden(name)
    assert_logits(ours.cached_logits(io["right_tokens"][:1], int(io["cache_prefix"])), io["cache_logits"])


@pytest.mark.parametrize("name", USUAL)
def test_gradients(name: str) -> None:
    ours, io = golden(name)
    mask = inputs.right_mask(io["lengths"], io["right_tokens"].shape[1])
    assert_gradients(ours.arch, ours.gradients(io["right_tokens"], mask), stored_gradients(io))


@pytest.mark.parametrize("name", ["llama3", "gemma3_layers"])
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_over_eight_devices(name: str) -> None:
    """The same logits with rows, tables and (where key/value heads divide) heads spread over a mesh."""
    io, sharded = golden(name)[1], Ours(GOLDEN / name)
    tensor = 2 if sharded.arch.kv_heads % 2 == 0 else 1
    rows = [np.tile(array, (8, 1))[:8] for array in (io["left_tokens"], io["left_mask"], io["left_positions"])]
    with jax.set_mesh(make_mesh(MeshConfig(2, 4 // tensor, tensor), jax.devices()[:8])):
        assert_logits(sharded.logits(*rows), np.tile(io["left_logits"], (8, 1, 1))[:8])


def seq2seq_batch(io: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    source_mask = inputs.right_mask(io["source_lengths"], io["source"].shape[1])
    return io["source"], source_mask, io["target"], inputs.right_mask(io["target_lengths"], io["target"].shape[1])


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder(name: str) -> None:
    ours, io = golden(name)
    assert_logits(ours.seq2seq_logits(*seq2seq_batch(io)), io["logits"])


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_reading_then_continuing(name: str) -> None:
    ours, io = golden(name)
    assert_logits(ours.seq2seq_read_logits(*seq2seq_batch(io)), io["logits"])


@pytest.mark.parametrize("name", [name for name in SEQ2SEQ if CASES[name].untied_head])
def test_output_matrix_that_the_config_denies(name: str, tmp_path: Path) -> None:
    """Saved again by transformers 5, the config says tied; like transformers, use the output matrix that the file has."""
    shutil.copyfile(GOLDEN / name / "model.safetensors", tmp_path / "model.safetensors")
    shutil.copyfile(GOLDEN / name / "config_saved.json", tmp_path / "config.json")
    io = golden(name)[1]
    assert_logits(Ours(tmp_path).seq2seq_logits(*seq2seq_batch(io)), io["logits"])


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_packed_pairs_do_not_see_each_other(name: str) -> None:
    ours, io = golden(name)
    source = (io["packed_source"], io["packed_source_segments"])
    target = (io["packed_target"], io["packed_target_segments"])
    assert_logits(ours.seq2seq_logits(*source, *target), io["packed_logits"])


@pytest.mark.parametrize("name", some(SEQ2SEQ, "t5_v11"))
def test_encoder_decoder_gradients(name: str) -> None:
    ours, io = golden(name)
    assert_gradients(ours.arch, ours.seq2seq_gradients(*seq2seq_batch(io)), stored_gradients(io))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str) -> None:
    ours, io = golden(name)
    mask = inputs.right_mask(io["lengths"], io["tokens"].shape[1])
    assert_logits(ours.hidden(io["tokens"], mask, io["token_types"]), io["hidden"])
    assert_logits(ours.embedding(io["tokens"], mask, io["token_types"]), io["embedding"])


@pytest.mark.parametrize("name", ENCODERS)
def test_packed_texts_do_not_see_each_other(name: str) -> None:
    ours, io = golden(name)
    batch = (io["packed_tokens"], io["packed_segments"], io["packed_token_types"], io["packed_positions"])
    assert_logits(ours.hidden(*batch), io["packed_hidden"])


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_gradients(name: str) -> None:
    ours, io = golden(name)
    mask = inputs.right_mask(io["lengths"], io["tokens"].shape[1])
    gradients = ours.encoder_gradients(io["tokens"], mask, io["token_types"], io["direction"])
    assert_gradients(ours.arch, gradients, stored_gradients(io))
