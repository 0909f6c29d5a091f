"""Tiny tokenisers that cut text as the published ones do, their chat templates, and where the assistant's words are in these."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).with_name("templates")
SENTENCES = [
    "You are a helpful assistant.\n\nRecommend the next film for somebody who watched The Matrix (1999) and Heat (1995).",
    "system\nuser\nassistant\nmodel\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nthink",
    "I'd watch it again; it's what we've seen!\n\n  - one\n  - two\n\n\n看过的电影，喜欢的电影。",
    "The end of the turn. im_end eot_id start header end_of_turn <|im_ <| |> < > |",
] * 4
LLAMA_SPLIT = (  # the pattern of Llama 3's tokenizer.json; Qwen's differs in \p{N} alone
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained(pre: pre_tokenizers.PreTokenizer, special: list[str] = [], **model) -> Tokenizer:  # noqa: B006
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def smollm2() -> PreTrainedTokenizerFast:
    """Single digits, GPT-2's words; the control tokens are the first words of the vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    pre = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = _trained(pre_tokenizers.Sequence(pre), special)
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def llama3() -> PreTrainedTokenizerFast:
    """Llama's words, whole words before merges, offsets without leading spaces, a beginning-of-text by post-processing."""
    pre = [
        pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = _trained(pre_tokenizers.Sequence(pre), ignore_merges=True)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag"]
    special = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[4])


def qwen() -> PreTrainedTokenizerFast:
    """NFC, Qwen's words with single digits, and added tokens that are not special."""
    pre = [
        pre_tokenizers.Split(Regex(LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = _trained(pre_tokenizers.Sequence(pre))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in [*tags, "<|fim_prefix|>"]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gemma() -> PreTrainedTokenizerFast:
    """A SentencePiece vocabulary with bytes for unknown characters; runs of newlines are added tokens that are not special."""
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False)
    draft.train_from_iterator(SENTENCES, trainer)
    trained = json.loads(draft.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    model = models.BPE(trained["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    plain = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<h1>", "<unused0>", "<start_of_image>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@dataclass(frozen=True)
class Family:
    """A published template. ``spans`` turns its text into one with ``{% generation %}`` around what the assistant says."""

    name: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    spans: tuple[tuple[str, str], ...]  # (text of the template, its replacement), each found exactly once
    trims: bool = False
    system: bool = True

    @property
    def template(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_bytes().decode()

    @property
    def with_spans(self) -> str:
        text = self.template
        for old, new in self.spans:
            assert text.count(old) == 1, (self.name, old, text.count(old))
            text = text.replace(old, new)
        return text


def _either(mine: str, other: str) -> str:
    return "{%- if message['role'] == 'assistant' -%}" + mine + "{%- else -%}" + other + "{%- endif -%}"


_SMOLLM2 = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_LLAMA31 = "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}"
_LLAMA_SPANS = (
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% generation %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
)
_QWEN25 = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
_GEMMA = "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"

FAMILIES = (
    Family(
        "smollm2",
        smollm2,
        (
            (
                _SMOLLM2,
                _either(
                    "{{'<|im_start|>assistant\n'}}{% generation %}{{ message['content'] + '<|im_end|>' }}"
                    "{% endgeneration %}{{'\n'}}",
                    _SMOLLM2,
                ),
            ),
        ),
    ),
    Family("llama3", llama3, (("{{ content }}", _either(_LLAMA_SPANS, "{{ content }}")),), trims=True),
    Family("llama3_1", llama3, ((_LLAMA31, _either(_LLAMA_SPANS, _LLAMA31)),), trims=True),
    Family("llama3_2", llama3, ((_LLAMA31, _either(_LLAMA_SPANS, _LLAMA31)),), trims=True),
    Family(
        "qwen2_5",
        qwen,
        (
            (
                _QWEN25,
                _either(
                    "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}"
                    "{% endgeneration %}{{- '\\n' }}",
                    _QWEN25,
                ),
            ),
        ),
    ),
    Family(
        "qwen3",
        qwen,
        (
            (
                "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' "
                "+ content.lstrip('\\n') }}\n            {%- else %}\n"
                "                {{- '<|im_start|>' + message.role + '\\n' + content }}\n            {%- endif %}\n"
                "        {%- else %}\n            {{- '<|im_start|>' + message.role + '\\n' + content }}\n        {%- endif %}",
                "{%- set said = '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}\n"
                "            {%- else %}\n                {%- set said = content %}\n            {%- endif %}\n"
                "        {%- else %}\n            {%- set said = content %}\n        {%- endif %}\n"
                "        {{- '<|im_start|>assistant\\n' }}{%- generation %}{{- said }}",
            ),
            (
                "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
                "        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n    {%- elif message.role == \"tool\" %}",
            ),
        ),
    ),
    Family(
        "gemma",
        gemma,
        (
            (
                _GEMMA,
                _either(
                    "{{ '<start_of_turn>model\n' }}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}"
                    "{% endgeneration %}{{ '\n' }}",
                    _GEMMA,
                ),
            ),
        ),
        trims=True,
        system=False,
    ),
    Family(
        "gemma3",
        gemma,
        (
            (
                "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n",
                "    {%- if role == 'model' -%}\n        {%- generation -%}{{ message['content'] | trim + '<end_of_turn>' }}"
                "{%- endgeneration -%}\n    {%- elif message['content'] is string -%}\n        {{ message['content'] | trim }}\n",
            ),
            (
                "{{ '<end_of_turn>\n' }}",
                "{{ '' if role == 'model' else '<end_of_turn>' }}{{ '\n' }}",
            ),
        ),
        trims=True,
    ),
)
