"""Answers in words, for many prompts or for one: preferences, explanations, intentions, or whatever a prompt asks.

``Generator`` goes from prompts to texts with a model that is on the mesh; ``generate`` does so with a run or a published model on disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from instructrec_jax.config import MeshConfig
from instructrec_jax.data.tokenise import encode_prompt, pad_to, truncate
from instructrec_jax.errors import UserError
from instructrec_jax.files import path_of
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models.generate import GREEDY, Decoding
from instructrec_jax.models.generate import generate as decode
from instructrec_jax.models.sharding import BATCH, RULES
from instructrec_jax.scoring.buckets import bucket, groups_by_length

if TYPE_CHECKING:
    from instructrec_jax.data.tokenizer import Text
    from instructrec_jax.models.language_model import LanguageModel

Prompt = InstructionExample | str


class Answer(NamedTuple):
    """What a model says to one prompt."""

    text: str
    tokens: tuple[int, ...]  # without the stop token
    log_prob: float  # of the tokens and the stop token, in nats


class Generator:
    """Answers prompts with given parameters. Build it, and call it, inside ``jax.set_mesh``.

    Args:
        model, variables: a decoder or an encoder-decoder, and {"params": ..., "lora": ...}, on the mesh.
        text: the tokeniser. What it puts around a prompt (``<bos>``, a chat template) goes around every prompt.
        content: item features ``[I, Fc]`` on the mesh, for a model with items.
        batch_size: most prompts in one device batch.
        max_prompt: prompts longer than this many tokens keep their head (``text.before``) and their newest tokens. A model with a
            longest context lowers it, so that the answer fits too.
    """

    def __init__(
        self,
        model: LanguageModel,
        variables: Any,
        text: Text,
        *,
        content: jax.Array | None = None,
        batch_size: int = 16,
        max_prompt: int = 1024,
    ):
        self._model, self._variables, self._text, self._content = model, variables, text, content
        self._max_prompt = max_prompt
        self._has_items = bool(model.sizes and model.sizes.items)
        self._mesh = jax.sharding.get_mesh()
        self._shards = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // self._shards) * self._shards

    def texts(self, prompts: Sequence[Prompt], decoding: Decoding = GREEDY, *, seed: int = 0) -> list[str]:
        """The answer to every prompt, as text. See ``answers``."""
        return [answer.text for answer in self.answers(prompts, decoding, seed=seed)]

    def answers(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding = GREEDY,
        *,
        seed: int = 0,
    ) -> list[Answer]:
        """The answer to every prompt, in the order given.

        Args:
            prompts: instruction examples, or plain texts.
            decoding: how; without ``stop``, answers end where the tokeniser says that an answer ends.
            seed: of the sampling. A prompt's sample depends on the seed and on its place in the list, not on how prompts are batched.

        Raises:
            UserError: an empty prompt, item tokens for a model that has none, or an answer longer than the model's context.
        """
        decoding = replace(decoding, stop=decoding.stop or self.stop)
        longest = self._longest_prompt(decoding)
        encoded = [self._encode(number, prompt, longest) for number, prompt in enumerate(prompts)]
        out = [Answer("", (), 0.0)] * len(encoded)
        for group in groups_by_length([len(p["tokens"]) for p in encoded], self._batch_size):
            found = self._decode([encoded[i] for i in group], group, decoding, seed)
            for i, tokens, length, log_prob in zip(group, *map(np.asarray, found)):
                kept = tuple(tokens[:length].tolist())
                out[i] = Answer(self._text.decode(kept), kept, float(log_prob))
        return out

    def length(self, prompt: Prompt) -> int:
        """Tokens of a prompt as the model reads it."""
        return len(self._encode(0, prompt, self._max_prompt)["tokens"])

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end an answer: the first of what a template puts behind it, and the tokeniser's end of text."""
        return tuple(dict.fromkeys((*self._text.end[:1], self._text.eos)))

    def _longest_prompt(self, decoding: Decoding) -> int:
        arch = self._model.arch
        if not arch.max_positions or arch.kind != "decoder":
            return self._max_prompt
        # The last new token is not read, so it needs no position.
        room = arch.max_positions - decoding.max_new + 1
        if room <= len(self._text.before):
            raise UserError(
                f"max_new = {decoding.max_new} leaves no room for a prompt in the model's {arch.max_positions} positions",
                remedy="lower max_new",
            )
        return min(self._max_prompt, room)

    def _encode(self, number: int, prompt: Prompt, longest: int) -> dict[str, np.ndarray]:
        example = _plain(prompt) if isinstance(prompt, str) else prompt
        part, _ = truncate(encode_prompt(example, self._text), longest, len(self._text.before))
        if not len(part["tokens"]):
            raise UserError(
                f"prompt {number} has no tokens", remedy="say something: this tokeniser adds nothing of its own"
            )
        if part["item"].any() and not self._has_items:
            raise UserError(
                f"prompt {number} ({example.template}) holds item tokens, and the model has none",
                remedy="instructions.items_as: title",
            )
        return part

    def _decode(self, prompts: list[dict[str, np.ndarray]], group: np.ndarray, decoding: Decoding, seed: int) -> Any:
        # Either a full batch or the next power of two: two row counts per length at most.
        wanted = self._batch_size if len(prompts) > self._batch_size // 2 else bucket(len(prompts), 1, steps=1)
        rows = -(-wanted // self._shards) * self._shards
        width = bucket(max(len(p["tokens"]) for p in prompts), 16)
        lengths = np.zeros(rows, np.int32)
        lengths[: len(prompts)] = [len(p["tokens"]) for p in prompts]
        batch = pad_to(prompts, rows, width)
        if not self._has_items:
            batch = {"tokens": batch["tokens"]}
        place = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
        real = place < np.maximum(lengths, 1)[:, None]
        batch["segment_ids"] = real.astype(np.int32)
        # Padding stands at position 0: a row padded beyond a table of positions must not read outside it.
        batch["positions"] = np.where(real, place, 0)
        on_mesh = {k: jax.device_put(v, jax.NamedSharding(self._mesh, RULES.ids_bs)) for k, v in batch.items()}
        last = jax.device_put(lengths - 1, jax.NamedSharding(self._mesh, jax.P(BATCH)))
        numbers = np.zeros(rows, np.uint32)
        numbers[: len(group)] = group
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)
        return decode(self._model, self._variables, on_mesh, last, decoding, keys, self._content)


def _plain(words: str) -> InstructionExample:
    return InstructionExample(
        template="prompt", language="", preference="P0", intention="I0", task="T2", metric="", user=-1,
        prompt=words, prompt_items=(), answer="",
    )  # fmt: skip


def generate(
    where: str | Path,
    prompts: Sequence[str],
    decoding: Decoding = GREEDY,
    *,
    seed: int = 0,
    system: str | None = None,
    dtype: str | None = None,
) -> list[Answer]:
    """What a run or a published model answers.

    Args:
        where: the folder of a run, or of a published model (a known name or a hub id will do).
        prompts: texts.
        decoding, seed: how; see ``Generator.answers``.
        system: a system message, for a model with a chat template.
        dtype: of a published model; None = float32 on a CPU, bfloat16 on an accelerator.

    Raises:
        UserError: an encoder; a system message without a chat template; see ``Generator.answers`` and ``run.trained``.
        DataError, ConfigError: the model cannot be loaded.
    """
    with loaded(where, system=system, dtype=dtype) as generator:
        return generator.answers(prompts, decoding, seed=seed)


@contextlib.contextmanager
def loaded(where: str | Path, *, system: str | None = None, dtype: str | None = None) -> Iterator[Generator]:
    """The generator of a run or a published model, on a mesh that is set inside the ``with`` block. See ``generate``."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from instructrec_jax.models.language_model import PLAIN, LanguageModel

    if (path_of(where) / "config.yaml").is_file():
        from instructrec_jax.run import trained

        with trained(where) as (s, variables, _):
            text = s.prepared.text
            if system is not None:
                text = _with_system(text, s.prepared.folder / "tokenizer", system)
            model = LanguageModel(s.arch, s.sizes, s.config.model)
            yield Generator(model, variables, text, content=s.content)
        return

    from instructrec_jax.data.tokenizer import load_pretrained
    from instructrec_jax.models.hf.fetch import resolve
    from instructrec_jax.models.hf.load import check_tokenizer, load_params, read_config
    from instructrec_jax.training.mesh import make_mesh

    folder = resolve(where)
    arch = read_config(folder)
    if arch.kind == "encoder":
        raise UserError(
            f"{folder} is an encoder: it reads texts, but answers nothing",
            remedy="name a decoder or an encoder-decoder",
        )
    text = load_pretrained(folder)
    check_tokenizer(text.vocab_size, arch, folder)
    if system is not None:
        text = _with_system(text, folder, system)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    # As many devices as the model's width divides over.
    devices = jax.devices()[: int(np.gcd(arch.width, len(jax.devices())))]
    with jax.set_mesh(make_mesh(MeshConfig(1, len(devices), 1), devices)):
        model = LanguageModel(arch, None, replace(PLAIN, dtype=dtype, param_dtype=dtype))
        yield Generator(model, {"params": load_params(folder, arch, dtype)}, text)


def _with_system(text: Text, folder: Path, system: str) -> Text:
    """The tokeniser with a system message in front of every prompt."""
    from instructrec_jax.data.chat import ChatFormat

    try:
        frame = ChatFormat.load(folder, {"enable_thinking": False}).frame(system)
    except UserError as error:
        raise UserError(
            f"a system message needs a chat template. {error.message}", remedy="say it in the prompt instead"
        ) from error
    return replace(text, before=tuple(frame.prefix.tolist()), after=tuple(frame.suffix.tolist()))
