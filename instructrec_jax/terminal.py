"""What commands print: tables, results, progress. rich is imported when something is printed."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from instructrec_jax.files import write_atomic

if TYPE_CHECKING:
    from instructrec_jax.samples import PackedRow

OVERRIDES: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
OVERRIDES_HELP = "Any setting can be changed with a dotted option, e.g. --train.steps 400 --mesh.fsdp 8."


@contextmanager
def meter(label: str, expected: int) -> Iterator[Callable[[str], None]]:
    """A function to call after each piece of work with a remark (its cost so far): a bar with ETA, or a line every ten seconds."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(label, total=expected, note="")
            yield lambda note: bar.update(task, advance=1, note=note or bar.tasks[0].fields["note"])
        return
    begun = said = time.monotonic()
    done, cost = 0, ""

    def advance(note: str) -> None:
        nonlocal done, said, cost
        done, cost = done + 1, note or cost
        if (now := time.monotonic()) - said > 10:
            said = now
            left = (now - begun) / done * max(expected - done, 0)
            click.echo(f"{label}: {done:,} of {expected:,}, {left:.0f} s left{', ' + cost if cost else ''}")

    yield advance


def progress(label: str, expected: int, items: Iterator) -> Iterator:
    """Pass items on; a progress bar with ETA on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.progress import track

        yield from track(items, description=label, total=expected, transient=True)
        return
    begun = said = time.monotonic()
    for number, item in enumerate(items, start=1):
        if (now := time.monotonic()) - said > 10:
            said = now
            left = (now - begun) / number * max(expected - number, 0)
            click.echo(f"{label}: {number:,} of about {expected:,}, {left:.0f} s left")
        yield item


def print_statistics(statistics: dict[str, Any]) -> None:
    """The data's numbers as a table."""
    from rich.console import Console
    from rich.table import Table

    length = statistics["history_length"]
    table = Table("data", "", title=None)
    for name, value in (
        ("users", f"{statistics['users']:,}"),
        ("items", f"{statistics['items']:,} ({statistics['cold_items']:,} unseen in training)"),
        ("interactions", f"{statistics['interactions']:,} (density {100 * statistics['density']:.2f} %)"),
        ("events", ", ".join(f"{k} {v:,}" for k, v in statistics["events"].items())),
        ("history length", f"median {length['median']:.0f}, mean {length['mean']:.1f}, longest {length['max']:.0f}"),
        ("tied last timestamp", "no timestamps" if statistics["tied_last_timestamp"] is None
         else f"{100 * statistics['tied_last_timestamp']:.0f} % of the users"),
        ("popularity Gini", f"{statistics['popularity_gini']:.2f}"),
    ):  # fmt: skip
        table.add_row(name, value)
    Console().print(table)


def print_result(tree: dict[str, Any]) -> None:
    """One evaluation table: systems by metrics, means with 95 % intervals, and the paired test."""
    from rich.console import Console
    from rich.table import Table

    names = [n for n in ("ndcg@10", "hr@10", "mrr@10") if any(n in r["metrics"] for r in tree["rows"])]
    names = names or ["hr@1", "hr@3", "hr@5", "ndcg@5"]
    table = Table(
        title=f"{tree['data']}, {tree['split']}: {tree['protocol']} ({tree['cases']:,} cases)", title_justify="left"
    )
    table.add_column("system", min_width=12)
    for name in names:
        table.add_column(name, justify="right")
    best = {
        n: max((r["metrics"][n]["mean"] or 0.0 for r in tree["rows"] if n in r["metrics"]), default=0.0) for n in names
    }
    for row in tree["rows"]:
        cells = []
        for name in names:
            e = row["metrics"].get(name)
            if e is None or e["mean"] is None:
                cells.append("")
                continue
            interval = "" if e["low"] is None else f" [dim]{e['low']:.3f}–{e['high']:.3f}[/dim]"
            cells.append(
                (f"[bold]{e['mean']:.4f}[/bold]" if e["mean"] == best[name] else f"{e['mean']:.4f}") + interval
            )
        table.add_row(row["name"] if row["baseline"] else f"[bold]{row['name']}[/bold]", *cells)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for c in tree["comparisons"]:
        if c["metric"] == names[0]:
            console.print(
                f"{c['name']} − {c['baseline']}: {c['difference']:+.4f} {c['metric']}"
                + ("" if c["low"] is None else f" (95 % {c['low']:+.4f} to {c['high']:+.4f})")
                + f", paired p = {c['p']:.3f}",
                highlight=False,
            )


SEGMENT_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


def print_batch(rows: list[PackedRow], shown: int, html: str | None) -> None:
    """A packed batch: a colour for each segment, positions with a target underlined, soft tokens in brackets, padding dim."""
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 110, record=html is not None)
    for number, row in enumerate(rows[:shown], start=1):
        used = sum(len(tokens) for tokens in row.segments)
        line = Text(f"row {number}: {len(row.segments)} segments, {used} tokens, {row.padding} padding\n", "bold")
        for colour, tokens in zip(itertools.cycle(SEGMENT_COLOURS), row.segments):
            for token in tokens:
                soft = token["kind"] != "word"
                style = Style(color=colour, bold=soft, underline=bool(token["loss"]), italic="text" in token["loss"])
                line.append(f"⟦{token['text']}⟧" if soft else token["text"], style)
        if row.padding:
            line.append(f" ·{row.padding}· ", "dim")
        console.print(line, end="\n\n")
    places = sum(len(tokens) for row in rows for tokens in row.segments), sum(row.padding for row in rows)
    console.print(
        f"{len(rows)} rows, {100 * places[0] / sum(places):.1f} % useful. Each colour is one example; ⟦item or feature⟧; underlined: the "
        "position predicts an item, underlined italic: words",
        highlight=False,
    )
    if html is not None:
        write_atomic(html, console.export_html(inline_styles=True))


def print_plan(plan: Any, title: str) -> None:
    """Bytes on each chip, what moves between them, operations and time; a ``training.plan.Plan``."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    frozen = f", {plan.frozen:,} are frozen" if plan.frozen else ""
    console.print(f"[bold]{escape(title)}[/bold]: {plan.devices} devices, mesh {mesh}", highlight=False)
    console.print(f"{plan.trained:,} parameters learn{frozen}", highlight=False)
    table = Table("on each device", "", "GB")
    table.columns[2].justify = "right"
    for kind, sizes in (("stays", plan.stored), ("for a step", plan.working)):
        for name, size in sizes.items():
            table.add_row(name, kind, f"{size / 1e9:,.3f}")
        table.add_section()
    table.add_row("[bold]together[/bold]", "", f"[bold]{plan.total / 1e9:,.3f}[/bold]")
    console.print(table)
    if plan.moved:
        table = Table("collectives of a step", "", "axis", "times", "GB on each device")
        for column in table.columns[3:]:
            column.justify = "right"
        for m in plan.moved:
            table.add_row(m.what, m.kind, m.axis, f"{m.count:,}", f"{m.bytes / 1e9:,.3f}")
        console.print(table)
    epoch = "" if plan.steps_per_epoch is None else f", {plan.steps_per_epoch:,} steps an epoch"
    console.print(f"{plan.tokens:,} tokens and {plan.flops / 1e12:,.1f} TFLOP a step{epoch}", highlight=False)
    if plan.chip is None:
        console.print("memory and peak of these devices are not known", highlight=False)
        return
    seconds = f"{plan.seconds:.3g} s a step at 40 % of the peak, {plan.tokens / plan.seconds:,.0f} tokens/s"
    console.print(seconds, highlight=False)
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    console.print(f"{verdict}: {plan.total / 1e9:,.2f} of {plan.chip.memory / 1e9:,.2f} GB", highlight=False)


def escape(text: str) -> str:
    """Text as it stands, without rich's markup."""
    from rich import markup

    return markup.escape(text)


def start(what: str = "", **options: bool) -> Callable[[str], None]:
    """Join the other processes, if there are any, before JAX is used. ``what`` one process must do alone. Returns a voice for all."""
    from instructrec_jax.training import hosts

    hosts.start(**options)
    if what:
        hosts.alone(what)
    return hosts.voice(click.echo)
