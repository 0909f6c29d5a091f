"""``instructrec data inspect``: what is in a prepared data set, in numbers, pictures and rendered prompts.

Counts by aspect and the items' popularity cover everything. What needs the records themselves (lengths, truncations, repeats, templates)
is measured on a sample of evenly spaced records, and says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instructrec_jax.config import Config
from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import encode_example, task_of, truncate
from instructrec_jax.evaluation import figures
from instructrec_jax.files import write_atomic
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, TITLE_CLOSE, TITLE_OPEN, InstructionExample
from instructrec_jax.prepare import load

_BINS = 40


@dataclass(frozen=True)
class Shown:
    """One rendered prompt, with titles where the model sees item tokens."""

    template: str
    language: str
    aspects: str  # e.g. "P1, I0, T2"
    metric: str
    tokens: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found; plain values, JSON-ready but for the dataclasses."""

    name: str
    records: int
    sampled: int
    sequence_length: int  # tokens of a packed row, from the config
    by_aspect: dict[str, int]  # "P1,I0,T2" -> records, all of them
    by_task: dict[str, int]  # of the sample, as all that follow
    by_language: dict[str, int]
    by_template: dict[str, int]
    tokens: dict[str, float]  # quantiles of the length of an example before truncation
    tokens_by_task: dict[str, float]  # median
    lengths: np.ndarray  # [sampled]
    truncated: int  # examples longer than ``sequence_length``
    tokens_cut: int
    repeated: int  # examples whose prompt, items, answer and target an earlier one has
    popularity: np.ndarray  # [I], training events per item
    popularity_shares: dict[str, float]  # "1 %" -> share of training events on the most popular 1 % of items
    statistics: dict[str, Any]
    words: dict[str, int]  # who spoke, where a teacher is used
    prompts: list[Shown]


def inspect(config: Config, *, records: int = 20_000, prompts: int = 20) -> Inspection:
    """Look at the prepared data of a config.

    Args:
        records: most records to read.
        prompts: rendered prompts to show: of each template in turn.

    Raises:
        DataError: the data are not prepared with these settings, or damaged.
    """
    prepared = load(config)
    source = Records(prepared.records)
    sample = np.unique(np.linspace(0, len(source) - 1, min(records, len(source))).astype(np.int64)).tolist()
    by_task: Counter[str] = Counter()
    by_language: Counter[str] = Counter()
    by_template: Counter[str] = Counter()
    lengths: list[int] = []
    task_lengths: dict[str, list[int]] = {}
    first_of: dict[str, list[tuple[InstructionExample, int]]] = {}
    seen: set[int] = set()
    repeated = truncated = tokens_cut = 0
    for number in sample:
        example = source[number]
        length = len((arrays := encode_example(example, prepared.text))["tokens"])
        _, cut = truncate(arrays, config.train.sequence_length, len(prepared.text.before))
        truncated, tokens_cut = truncated + (cut > 0), tokens_cut + cut
        task = task_of(example)
        by_task[task] += 1
        by_language[example.language] += 1
        by_template[example.template] += 1
        lengths.append(length)
        task_lengths.setdefault(task, []).append(length)
        content = hash((example.prompt, example.prompt_items, example.answer, example.answer_items, example.target))
        repeated += content in seen
        seen.add(content)
        kept = first_of.setdefault(f"{example.template} {example.language}", [])
        if len(kept) < prompts:
            kept.append((example, length))
    popularity = prepared.data.train_popularity
    titles = prepared.data.catalogue.titles
    turns = [group[i] for i in range(prompts) for _, group in sorted(first_of.items()) if i < len(group)][:prompts]
    found = np.asarray(lengths)
    return Inspection(
        name=config.name,
        records=len(source),
        sampled=len(sample),
        sequence_length=config.train.sequence_length,
        by_aspect=dict(source.manifest["records_by_aspect"]),
        by_task=dict(by_task.most_common()),
        by_language=dict(by_language.most_common()),
        by_template=dict(sorted(by_template.items())),
        tokens={
            name: float(np.quantile(found, q)) for name, q in (("min", 0), ("median", 0.5), ("95 %", 0.95), ("max", 1))
        },
        tokens_by_task={task: float(np.median(n)) for task, n in task_lengths.items()},
        lengths=found,
        truncated=truncated,
        tokens_cut=tokens_cut,
        repeated=repeated,
        popularity=popularity,
        popularity_shares={f"{p} %": share_of_top(popularity, p / 100) for p in (1, 5, 20)},
        statistics=prepared.manifest["statistics"],
        words=prepared.manifest.get("words", {}),
        prompts=[_shown(example, length, titles) for example, length in turns],
    )


def share_of_top(popularity: np.ndarray, part: float) -> float:
    """Share of all events on the most popular ``part`` of the items (at least one item); 0 without events."""
    events = np.sort(popularity)[::-1]
    return float(events[: max(1, round(part * len(events)))].sum() / max(1, events.sum()))


def _shown(example: InstructionExample, length: int, titles: list[str]) -> Shown:
    aspects = f"{example.preference}, {example.intention}, {example.task}"
    answer = _words(example.answer, example.answer_items, titles)
    if not answer and example.target >= 0:
        answer = f"⟨{titles[example.target]}⟩"
    return Shown(
        template=example.template,
        language=example.language,
        aspects=aspects,
        metric=example.metric,
        tokens=length,
        prompt=_words(example.prompt, example.prompt_items, titles),
        answer=answer,
    )


def _words(text: str, items: tuple[int, ...], titles: list[str]) -> str:
    """Text with ⟨title⟩ for each item token and ⟨feature⟩ for each feature token."""
    parts = text.translate(str.maketrans("", "", TITLE_OPEN + TITLE_CLOSE)).split(ITEM_SLOT)
    names = [f"⟨{titles[i]}⟩" for i in items]
    joined = parts[0] + "".join(name + part for name, part in zip(names, parts[1:], strict=True))
    return joined.replace(FEATURE_SLOT, "⟨feature⟩")


def to_json(found: Inspection) -> dict[str, Any]:
    """The numbers without the arrays, and the prompts."""
    numbers = {k: v for k, v in vars(found).items() if k not in ("lengths", "popularity")}
    return numbers | {"prompts": [vars(prompt) for prompt in found.prompts]}


def write_html(found: Inspection, file: str | Path) -> Path:
    """One page without network, script or other files: tables, two pictures, the prompts. The same data give the same bytes.

    Raises:
        UserError: Matplotlib is not installed.
    """
    from importlib import resources

    import jinja2
    from markupsafe import Markup

    counts, edges = np.histogram(found.lengths, bins=min(_BINS, max(1, int(np.ptp(found.lengths)))))
    pictures = {
        "Tokens of an example": figures.histogram(
            counts.tolist(), edges.tolist(), label="Histogram of tokens per example", x_label="tokens", y_label="examples",
            marked=found.sequence_length if found.sequence_length <= edges[-1] else None, name="lengths",
        ),
        "Popularity of items": figures.long_tail(found.popularity.tolist(), label="Training events per item, by rank", name="tail"),
    }  # fmt: skip
    source = resources.files("instructrec_jax").joinpath("data_inspect.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(
        found=found, tables=tables(found), pictures={k: Markup(v) for k, v in pictures.items()}
    )
    write_atomic(file, page)
    return Path(file)


def tables(found: Inspection) -> dict[str, list[tuple[str, str]]]:
    """Title -> rows of (name, value), for the terminal and the page."""
    s, n = found.statistics, max(found.sampled, 1)

    def part(count: int) -> str:
        return f"{count:,} ({100 * count / n:.1f} %)"

    tokens = ", ".join(f"{name} {value:.0f}" for name, value in found.tokens.items())
    top = ", ".join(f"top {name} of items: {100 * share:.0f} %" for name, share in found.popularity_shares.items())
    out = {
        "Records by aspect": [(name.replace(",", ", "), f"{count:,}") for name, count in found.by_aspect.items()],
        "By task": [(name, f"{part(c)}, median {found.tokens_by_task[name]:.0f} tokens") for name, c in found.by_task.items()],
        "By language": [(name, part(count)) for name, count in found.by_language.items()],
        "By template": [(name, part(count)) for name, count in found.by_template.items()],
        "Lengths and repeats": [
            ("tokens of an example", tokens),
            (f"longer than train.sequence_length = {found.sequence_length}", f"{part(found.truncated)}, {found.tokens_cut:,} tokens cut"),
            ("examples that repeat an earlier one", part(found.repeated)),
            ("titles that repeat an earlier one", f"{s['duplicate_titles']:,} of {s['items']:,}"),
            ("repeated user-item pairs", f"{s['repeated_pairs']:,} of {s['interactions']:,}"),
        ],
        "Popularity": [
            ("training events", top),
            ("Gini index", f"{s['popularity_gini']:.2f}"),
            ("items without a training event", f"{s['cold_items']:,} of {s['items']:,}"),
        ],
    }  # fmt: skip
    if found.words:
        out["Words by"] = [(name, f"{count:,}") for name, count in found.words.items()]
    return out
