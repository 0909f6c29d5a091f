"""Commands of ``instructrec data``: preparing, the teacher, forgetting, looking at what is there. Parse, call, print."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

import click

from instructrec_jax.terminal import OVERRIDES, OVERRIDES_HELP, escape, meter, print_batch, print_statistics, progress


@click.command("prepare", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option("--engine", type=click.Choice(["local", "beam"]), default="local", help="Who writes the instructions.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def prepare_data(config: str, engine: Literal["local", "beam"], overrides: tuple[str, ...]) -> None:
    """Read, check, clean and split the data of CONFIG, and write its instructions.

    With --engine beam, any option of an Apache Beam pipeline passes through: --beam.runner FlinkRunner,
    --beam.direct_num_workers 4. The records are the same.
    """
    from instructrec_jax import config as configs
    from instructrec_jax import prepare
    from instructrec_jax.dotted import split_options
    from instructrec_jax.errors import UserError

    ours, beam_options = split_options(overrides, "beam.")
    settings = configs.load(config, ours)
    if beam_options and engine != "beam":
        name = beam_options[0].partition("=")[0].removeprefix("--")
        raise UserError(f"--beam.{name} is an option of --engine beam")
    if engine == "beam":
        prepare.beam_engine()  # before anything is read
    begun = time.perf_counter()
    what = ", ".join(settings.mixture) or f"{settings.data.source} {settings.data.path}"
    click.echo(f"{settings.name}: {what}")
    prepared = prepare.prepare(settings, click.echo, progress, engine=engine, beam_options=beam_options)
    click.echo(f"prepared in {time.perf_counter() - begun:.1f} s: {prepared.folder}")
    print_statistics(prepared.manifest["statistics"])


@click.command("show-batch", context_settings={**OVERRIDES, "show_default": True}, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option("--rows", type=click.IntRange(1), default=4, help="Rows to show.")
@click.option("--step", type=click.IntRange(1), default=1, help="The batch of this training step.")
@click.option("--html", type=click.Path(), help="Write it as a page too.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def show_batch(config: str, rows: int, step: int, html: str | None, overrides: tuple[str, ...]) -> None:
    """Show a packed training batch of CONFIG: segments in colours, targets underlined, soft tokens in brackets."""
    from instructrec_jax import config as configs
    from instructrec_jax.samples import packed_batch

    print_batch(packed_batch(configs.load(config, overrides), step), rows, html)


@click.command("teach", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option(
    "--backend", type=click.Choice(["openai", "local", "rules"]), help="As teacher.backend. [default: the config's]"
)
@click.option("--kinds", default="preference,intention", show_default=True, help="What to write.")
@click.option("--limit", type=click.IntRange(1), help="Most texts to ask for. [default: all that training uses]")
@click.option("--out", type=click.Path(), help="Folder of the texts. [default: PREPARED/NAME-teacher]")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def teach(
    config: str, backend: str | None, kinds: str, limit: int | None, out: str | None, overrides: tuple[str, ...]
) -> None:
    """Let a model write tastes (P2) and vague wishes (I1) for CONFIG's data; gates check each text.

    A command that was stopped or killed goes on where it was: no answer is paid for twice. The texts are used by
    `data prepare` with --instructions.teacher FOLDER.
    """
    from instructrec_jax import config as configs
    from instructrec_jax.errors import ConfigError, UserError, did_you_mean
    from instructrec_jax.teach import KINDS, rejection_rows
    from instructrec_jax.teach import teach as run

    wanted = tuple(k.strip() for k in kinds.split(",") if k.strip())
    for kind in wanted or ("",):
        if kind not in KINDS:
            raise ConfigError(f"--kinds: {kind!r}{did_you_mean(kind, KINDS)}", remedy=f"of {', '.join(KINDS)}")
    settings = configs.load(config, (*overrides, *(("--teacher.backend", backend) if backend else ())))
    who = settings.teacher.backend + (f", {settings.teacher.model}" if settings.teacher.model else "")
    click.echo(f"{settings.name}: taught by {who}")
    outcome = run(settings, kinds=wanted, limit=limit, out=Path(out) if out else None, say=click.echo, meter=meter)
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "gate", "first answers refused", "refused for good")
    for kind, gate, first, last in rejection_rows(outcome):
        table.add_row(kind, gate, f"{first:,}", f"{last:,}")
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 110).print(table)
    kept = ", ".join(f"{n:,} {kind}s" for kind, n in outcome.kept.items()) or "none"
    click.echo(
        f"of {outcome.asked:,} texts: kept {kept}; refused {outcome.refused.total():,}; unanswered {outcome.unanswered:,}; "
        f"nothing to write from {outcome.without_evidence:,}. Spent on this folder: {outcome.spent}"
    )
    if outcome.trouble:
        click.echo(f"trouble: {outcome.trouble}", err=True)
    if outcome.earlier:
        more = ", ".join(f"{n:,} {kind}s" for kind, n in outcome.earlier.items())
        click.echo(f"kept beside them, of earlier commands under the same settings: {more}")
    if outcome.left_out:
        click.echo(
            f"left out: {outcome.left_out:,} texts of earlier commands; another model, other settings or other data wrote them, or a "
            "gate refuses them now",
            err=True,
        )
    texts = outcome.kept.total() + outcome.earlier.total()
    if not texts and outcome.stopped not in ("", "interrupted"):
        raise UserError(
            f"nothing was kept, and {outcome.folder} holds no texts: {outcome.stopped}",
            remedy="run the command again, later or with a larger budget (it counts all commands on the folder)",
        )
    if outcome.stopped:
        click.echo(f"stopped: {outcome.stopped}", err=True)
    if texts:
        click.echo(f"texts: {outcome.folder}; use them: --instructions.teacher {outcome.folder}")
    else:
        click.echo(f"nothing was kept: {outcome.folder} holds no texts")
    if outcome.stopped == "interrupted":
        sys.exit(130)


@click.command("teach-sample")
@click.argument("folder", type=click.Path())
@click.option("--n", "count", type=click.IntRange(1), default=100, show_default=True, help="Texts to grade.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--out", type=click.Path(), help="CSV file. [default: FOLDER/grades.csv]")
@click.option("--overwrite", is_flag=True, help="Replace a sheet, and the grades in it.")
def teach_sample(folder: str, count: int, seed: int, out: str | None, overwrite: bool) -> None:
    """Write a sheet of taught texts from FOLDER for a person to grade with y and n."""
    from instructrec_jax.errors import UserError
    from instructrec_jax.instructions.teacher.sheet import write_sheet
    from instructrec_jax.instructions.teacher.texts import read, verified

    file = Path(out) if out else Path(folder) / "grades.csv"
    if file.exists() and not overwrite:
        raise UserError(f"{file} is there, and may hold grades", remedy="another --out, or --overwrite")
    texts, _ = read(verified(folder))
    click.echo(f"{write_sheet(texts, file, n=count, seed=seed):,} texts to grade: {file}")
    click.echo(f"next: write y or n under the questions, save as CSV, then instructrec data teach-grades {file}")


@click.command("teach-grades")
@click.argument("file", type=click.Path())
def teach_grades(file: str) -> None:
    """Sum up the grades in FILE with 95 % Wilson intervals."""
    from rich.console import Console
    from rich.table import Table

    from instructrec_jax.instructions.teacher.sheet import QUESTIONS, read_grades

    table = Table("kind", "question", "yes", "95 % interval")
    for row in read_grades(file):
        share = f"{row['yes']} of {row['graded']}, {100 * row['share']:.0f} %"
        interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
        table.add_row(row["kind"], escape(QUESTIONS[row["question"]]), share, interval)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@click.command("forget", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option("--user-id", required=True, help="User id as in the log; with data.hash_ids also its hash.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def forget(config: str, user_id: str, overrides: tuple[str, ...]) -> None:
    """Rewrite CONFIG's prepared data without one user, and list the runs that have seen them.

    Everybody else's records stay what they are. The source is not touched: remove the user there too.
    """
    from instructrec_jax import config as configs
    from instructrec_jax.forget import forget as run

    settings = configs.load(config, overrides)
    gone = run(settings, user_id)
    click.echo(
        f"removed: {gone.events:,} events, {gone.tags:,} tags, {gone.records:,} records of the user, {gone.worded_by:,} records of "
        f"others in the user's words, {gone.texts:,} taught texts, {gone.answers:,} cached answers"
    )
    if gone.baselines:
        click.echo(f"removed: the tuned baselines {', '.join(gone.baselines)}; run `instructrec baseline` again")
    click.echo(
        "unchanged: item features and tokeniser (sums over all users), and the source: remove the user there too"
    )
    for folder in gone.folders:
        click.echo(
            f"holds the user, too: {folder}; forget them with its own config, or prepare it again once this is done (a mixture)"
        )
    for seen in gone.runs:
        steps = ", ".join(seen.checkpoints) or "none"
        click.echo(f"has seen the user: {seen.run} (checkpoints: {steps}); train it anew, or remove it")
    if not gone.runs:
        click.echo(f"no run under {settings.runs} was trained on this log")


@click.command("inspect", context_settings={**OVERRIDES, "show_default": True}, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option("--records", type=click.IntRange(1), default=20_000, help="Most records to read.")
@click.option("--prompts", type=click.IntRange(0), default=20, help="Rendered prompts to show.")
@click.option("--html", type=click.Path(), help="Write a page with pictures to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def inspect(
    config: str, records: int, prompts: int, html: str | None, as_json: bool, overrides: tuple[str, ...]
) -> None:
    """Show what CONFIG's prepared data hold: counts, lengths, truncations, popularity, repeats, prompts."""
    import json

    from instructrec_jax import config as configs
    from instructrec_jax import data_inspect

    found = data_inspect.inspect(configs.load(config, overrides), records=records, prompts=prompts)
    if html:
        click.echo(f"page: {data_inspect.write_html(found, html)}", err=as_json)
    if as_json:
        click.echo(json.dumps(data_inspect.to_json(found), ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    for title, rows in data_inspect.tables(found).items():
        table = Table(escape(title), "")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        console.print(table)
    for p in found.prompts:
        console.print(
            f"\n{p.template} ({p.aspects}, {p.language}, {p.metric}, {p.tokens} tokens)", style="bold", markup=False
        )
        console.print(p.prompt, markup=False, highlight=False)
        console.print(f"→ {p.answer or 'every item of the history is learnt'}", markup=False, highlight=False)


COMMANDS = (prepare_data, show_batch, teach, teach_sample, teach_grades, forget, inspect)
