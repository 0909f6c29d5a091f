"""Commands that measure: ``evaluate``, ``baseline``, ``results``, ``hard-modes``. Parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path

import click

from instructrec_jax.errors import UserError
from instructrec_jax.terminal import OVERRIDES, OVERRIDES_HELP, print_result, start


@click.command("evaluate", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("run_dir", type=click.Path(), required=False)
@click.option(
    "--auto",
    "auto_dir",
    type=click.Path(),
    help="Folder with interactions and items: prepare, train and evaluate in one go.",
)
@click.option(
    "--protocol",
    type=click.Choice(["full", "1+9", "1+99"]),
    help="Full ranking, or frozen sampled candidates. [default: full]",
)
@click.option("--split", type=click.Choice(["test", "valid"]), default="test", show_default=True)
@click.option(
    "--recommendations",
    type=click.Path(),
    help="Evaluate a file (user_id, item_id, score) on RUN_DIR's data instead of its model.",
)
@click.option("--set", "set_name", default="", help="Of a mixture: the one set to measure. [default: all of them]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line; a mixture's by set.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def evaluate(
    run_dir: str | None,
    auto_dir: str | None,
    protocol: str | None,
    split: str,
    recommendations: str | None,
    set_name: str,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Measure a run beside the classic recommenders and the tuned baselines of its data, with 95 % intervals."""
    from instructrec_jax.data.schema import SPLIT_NAMES
    from instructrec_jax.evaluate import evaluate as evaluate_run
    from instructrec_jax.evaluate import evaluate_sets, summary_json
    from instructrec_jax.training import hosts

    if auto_dir is not None and run_dir is not None and run_dir.startswith("--"):
        run_dir, overrides = None, (run_dir, *overrides)  # the first override took RUN_DIR's place
    if (run_dir is None) == (auto_dir is None):
        raise UserError("give either a RUN_DIR or --auto DIR")
    say = start("prepare, train and evaluate in one go" if auto_dir is not None else "")
    if auto_dir is not None:
        from instructrec_jax.auto import auto_run

        run_dir, overrides = str(auto_run(Path(auto_dir), overrides, click.echo)), ()
    assert run_dir is not None
    if recommendations:
        from instructrec_jax.evaluate import evaluate_file

        result = evaluate_file(run_dir, recommendations, split=SPLIT_NAMES.index(split), set_name=set_name)
        print_result(result.to_json())
        if as_json:
            click.echo(json.dumps(result.means()))
        return
    extra = ("--evaluate.protocol", protocol) if protocol else ()
    settings, number = (*overrides, *extra), SPLIT_NAMES.index(split)
    if set_name:
        payloads = [evaluate_run(run_dir, settings, split=number, set_name=set_name, say=say)]
    else:
        payloads = evaluate_sets(run_dir, settings, split=number, say=say)
    if not hosts.first():
        return
    for payload in payloads:
        for part in ("next_item", "search", "likelihood", "wordings"):
            if payload[part]:
                print_result(payload[part])
    if as_json:
        found = {payload["set"]: summary_json(payload) for payload in payloads}
        click.echo(json.dumps(found.get(None, found)))


@click.command("baseline", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("names", nargs=-1, required=True, metavar="NAME [NAME ...] CONFIG", type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def baseline(names: tuple[str, ...], as_json: bool) -> None:
    """Tune baselines on the validation split of CONFIG's prepared data, and measure them on the test split.

    NAME: popularity, itemknn, ease, ease_last, slit, ials, bpr, bm25, content, gmf, mlp, neumf, gru4rec, sasrec, or all. Each tries
    --baseline.trials settings. The same command goes on where a killed one stopped. `evaluate` has the results in its table.
    """
    first = next((place for place, word in enumerate(names) if word.startswith("--")), len(names))
    *chosen, config = names[:first] or ("",)
    if not chosen:
        raise UserError("give one NAME or more, and a CONFIG", remedy="instructrec baseline ease sasrec CONFIG")
    from instructrec_jax import config as configs

    settings = configs.load(config, names[first:])
    say = start("tune baselines")
    from instructrec_jax.baselines import baseline as measure

    found = measure(chosen, settings, say)
    print_result(found["next_item"])
    if as_json:
        from instructrec_jax.evaluation.table import EvaluationResult

        table = EvaluationResult.from_json(found["next_item"])
        about = {"protocol": table.protocol, "data": table.data, "options": found["options"]}
        click.echo(json.dumps({**table.means(), **about}))


@click.command("results")
@click.argument("run_dirs", type=click.Path(), nargs=-1, required=True)
@click.option("--preset", type=click.Path(), default="", help="The runs' config file; its commands are shown.")
@click.option("--protocol", default="full", show_default=True, help="Name of the file in evaluation/, or hard-modes.")
@click.option("--table", "tables", multiple=True, help="Protocol of a table to show; repeatable. [default: all]")
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(),
    help="A run of another config, same seeds; repeatable: the two side by side.",
)
@click.option("--into", type=click.Path(), help="Markdown document whose block is replaced. [default: print]")
@click.option("--block", default="", help="Name of the block. [default: the config's name]")
@click.option("--picture", type=click.Path(), help="PNG to draw the next-item table into.")
def results(
    run_dirs: tuple[str, ...],
    preset: str,
    protocol: str,
    tables: tuple[str, ...],
    beside: tuple[str, ...],
    into: str | None,
    block: str,
    picture: str | None,
) -> None:
    """The tables of one config's RUN_DIRS, a seed each: means over seeds, intervals, paired tests, training time.

    With --beside the model's rows of two configs instead.
    """
    import os

    from instructrec_jax.results import compared, draw, markdown, put_block, read_runs

    runs = read_runs(run_dirs, protocol)
    shown = ""
    if picture:
        draw(runs, Path(picture))
        shown = os.path.relpath(picture, Path(into).parent) if into else picture
    text = compared(runs, read_runs(beside, protocol)) if beside else markdown(runs, preset, shown, tables)
    if not into:
        click.echo(text)
        return
    put_block(Path(into), block or runs[0].config.name, text)
    click.echo(f"{into}: block {block or runs[0].config.name} of {len(runs)} run(s)")


@click.command("hard-modes", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("run_dir", type=click.Path())
@click.option("--split", type=click.Choice(["test", "valid"]), default="test", show_default=True)
@click.option("--set", "set_name", default="", help="Of a mixture: which set.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def hard_modes(run_dir: str, split: str, set_name: str, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Measure a run where recommending is hard: cold users and items, the long tail, strong rivals, other orders."""
    from instructrec_jax.data.schema import SPLIT_NAMES
    from instructrec_jax.hard_modes import hard_modes as measure

    say = start("measure the hard cases")
    found = measure(run_dir, overrides, split=SPLIT_NAMES.index(split), set_name=set_name, say=say)
    for table in found["tables"]:
        print_result(table)
    if as_json:
        click.echo(json.dumps(found))


COMMANDS = (evaluate, baseline, results, hard_modes)
