"""More kinds of instructions, better on a kind that was never trained? (InstructRec, arXiv 2305.07001, Figure 3.)

    .venv/bin/python tools/ablation.py --out runs/ablation [--into docs/results.md]

Trains the demo's preset on 1, 5, 15 and all families of templates, three seeds each, for the same number of steps, and measures HR@1
among 1+9 frozen candidates on a scenario that no arm has seen: personalised search with a vague intention (P1, I1). All templates of
(P1, I1), whatever their task, are left out of every arm, also of "all". Arms are nested: each has the families of the one before it.
Weights of the tasks are the same in all arms; a task without a template in an arm has no examples there.

One JSON file for each run is written when it is measured, so a killed command goes on; the table (Markdown) and a picture come last,
``--into`` a document as its block ``families``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import mean, stdev

import click
import numpy as np

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.cases import frozen_negatives, rank_first, with_target
from instructrec_jax.config import Config
from instructrec_jax.data.schema import TEST, Cases
from instructrec_jax.evaluation.metrics import metrics_at
from instructrec_jax.files import write_json
from instructrec_jax.instructions.prompts import NothingToSay
from instructrec_jax.instructions.template import Template
from instructrec_jax.instructions.templates import load_templates
from instructrec_jax.results import put_block
from instructrec_jax.run import train_run, trained
from instructrec_jax.scoring import Request

KIND = "personal-search-vague"
# Families in the order in which arms take them up: the paper's preference, intention and combined ones first.
ORDER = (
    "seq.p1", "search.p0", "describe.p1", "rerank.p1", "search.p1",
    "taste.p2", "cold.p0", "point.p1", "rerank.p0", "describe.p0", "rerank.p2", "describe.p2", "search.p2", "pair.p1", "turn.p1",
)  # fmt: skip
ARMS = (1, 5, 15)
WEIGHTS = {
    "search": 2.0, "rerank": 0.25, "pointwise": 0.1, "describe": 0.5, "profile": 0.1, "rerank_more": 0.25, "pointwise_more": 0.1,
    "describe_more": 0.25, "pairwise": 0.1, "turn_around": 0.1, "relatedness": 0.1, "reasoning": 0.1,
}  # fmt: skip


def arms() -> dict[str, tuple[str, ...]]:
    """Template ids of each arm, by its name."""
    usable = [t for t in load_templates(("en",)) if not t.held_out and (t.preference, t.intention) != ("P1", "I1")]

    def of(families: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(t.id for t in usable if family(t) in families)

    every = tuple(sorted({family(t) for t in usable}))
    return {str(n): of(ORDER[:n]) for n in ARMS} | {f"all {len(every)}": of(every)}


def family(template: Template) -> str:
    """``seq.p1`` of ``seq.p1.next.a``."""
    return ".".join(template.id.split(".")[:2])


def arm_config(base: Config, name: str, templates: tuple[str, ...], seed: int, steps: int) -> Config:
    """The base preset on some templates."""
    return dataclasses.replace(
        base,
        name=f"{base.name}-families-{name.replace(' ', '-')}",
        instructions=dataclasses.replace(base.instructions, families=templates, **WEIGHTS),
        model=dataclasses.replace(
            base.model, item_memory=configs.ItemMemoryConfig(), wish_words=configs.WishWordsConfig()
        ),
        train=dataclasses.replace(base.train, steps=steps, seed=seed, eval_every=steps, checkpoint_every=steps),
    )


def measured(run_dir: Path) -> dict[str, float]:
    """HR@1 and NDCG@5 among 1+9 candidates on the scenario that was left out."""
    with trained(run_dir) as (s, params, step):
        cases = s.prepared.data.cases(TEST)
        prompts, kept = [], []
        for number, (user, end) in enumerate(zip(cases.user, cases.end)):
            try:
                prompts.append(s.builder.evaluation_prompt(KIND, int(user), int(end), language=s.language))
            except NothingToSay:
                continue
            kept.append(number)
        some = Cases(cases.user[kept], cases.end[kept], cases.target[kept])
        _, negatives = frozen_negatives(s, some, s.prepared.data.histories(some), 9)
        lists = with_target(some, negatives)
        # The model alone: words that are looked up beside it know every wish, whatever was trained.
        scorer = s.scorer(params, words=False)
        scores = np.stack(scorer.score([Request(p, c) for p, c in zip(prompts, lists)], "items"))
        found = metrics_at(rank_first(scores), (1, 5))
        return {
            "cases": len(some),
            "step": step,
            "hr@1": float(found["hr@1"].mean()),
            "ndcg@5": float(found["ndcg@5"].mean()),
        }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--preset", type=click.Path(), default="configs/ml_latest_small.yaml", show_default=True)
@click.option("--steps", type=int, default=600, show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option(
    "--into", type=click.Path(path_type=Path), help="Document whose block is replaced; the picture goes to images/."
)
def main(out: Path, preset: str, steps: int, seeds: int, into: Path | None) -> None:
    """Train and measure every arm and seed, then print the table and draw the picture."""
    base = configs.load(preset, ("--prepared", str(out / "prepared"), "--runs", str(out)))
    names = arms()
    for seed in range(seeds):  # seed by seed: a command that is stopped early has whole columns
        for name, templates in names.items():
            file = out / f"{name.replace(' ', '-')}-{seed}.json"
            if file.is_file():
                continue
            config = arm_config(base, name, templates, seed, steps)
            try:
                prepare.load(config)
            except prepare.DataError:
                prepare.prepare(config, click.echo)
            run_dir = configs.run_dir(config)
            train_run(config, run_dir, click.echo)
            found = {"arm": name, "seed": seed, "templates": len(templates), "steps": steps, **measured(run_dir)}
            write_json(file, found)
            click.echo(f"{name} families, seed {seed}: {found}")
    results = {
        name: [json.loads((out / f"{name.replace(' ', '-')}-{s}.json").read_text()) for s in range(seeds)]
        for name in names
    }
    click.echo(table(results))
    draw(results, out / "families.png")
    if into:
        picture = into.parent / "images" / "families.png"
        draw(results, picture)
        shown = f"![HR@1 by the number of families of templates](images/{picture.name})"
        put_block(
            into,
            "families",
            f"    python tools/ablation.py --steps {steps} --seeds {seeds}\n\n{table(results)}\n\n{shown}",
        )


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: one line for each arm."""
    first = next(iter(results.values()))[0]
    lines = [
        f"{first['cases']:,} cases, {first['steps']:,} steps",
        "",
        "| families | templates | hr@1 | ndcg@5 |",
        "|---|---|---|---|",
    ]
    for name, runs in results.items():
        cells = []
        for metric in ("hr@1", "ndcg@5"):
            values = [run[metric] for run in runs]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"**{mean(values):.4f}**{spread} [{', '.join(f'{v:.4f}' for v in values)}]")
        lines.append(f"| {name} | {runs[0]['templates']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], file: Path) -> None:
    """HR@1 by the number of families: a dot for each seed, a line through the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for x, runs in enumerate(results.values()):
        axes.plot([x] * len(runs), [run["hr@1"] for run in runs], "o", color="#8a8f98", ms=5)
    axes.plot(
        range(len(results)), [mean(run["hr@1"] for run in runs) for runs in results.values()], color="#1f6feb", lw=2
    )
    axes.set_xticks(range(len(results)), list(results))
    axes.set_xlabel("families of templates that were trained")
    axes.set_ylabel("HR@1, 1+9, personalised search, vague")
    axes.grid(axis="y", color="#dddddd")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
