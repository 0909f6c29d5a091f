"""The command line: parse, call one function, print. Nothing slow is imported before a command runs."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from instructrec_jax import __version__, data_commands, evaluation_commands, model_commands, template_commands
from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.host_memory import with_large_pages
from instructrec_jax.terminal import OVERRIDES, OVERRIDES_HELP, escape, progress, start


class Commands(click.Group):
    """A group that suggests the nearest command for a misspelt one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click, with a suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            error.message += did_you_mean(args[0], self.list_commands(ctx))
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="instructrec")
def cli() -> None:
    """Recommendation as instruction tuning of a language model, on JAX.

    \b
    instructrec doctor                                  what is installed, and what to fix
    instructrec data prepare configs/ml_latest_small.yaml
    instructrec plan         configs/ml_latest_small.yaml --chips v5e-16
    instructrec train        configs/ml_latest_small.yaml --train.steps 400
    instructrec evaluate     RUN_DIR --protocol full
    instructrec baseline     sasrec ease_last configs/ml_latest_small.yaml
    instructrec hard-modes   RUN_DIR                    cold users and items, the long tail, strong rivals
    instructrec refit        RUN_DIR                    once more, on validation events too
    instructrec results      RUN_DIR... --into FILE     several seeds as tables and a picture
    instructrec recommend    RUN_DIR --user 42 --wish "a slow, sad film" -k 10
    instructrec score        RUN_DIR requests.jsonl --out scores.jsonl
    instructrec report       RUN_DIR
    instructrec model fetch  smollm2-135m               a pretrained model, into the cache
    instructrec export       RUN_DIR OUT --to hf        weights for transformers, vLLM or PEFT
    """


@cli.group(cls=Commands)
def data() -> None:
    """Prepare logs and a catalogue for training."""


for _command in data_commands.COMMANDS:
    data.add_command(_command)


for _command in evaluation_commands.COMMANDS:
    cli.add_command(_command)


@cli.command("plan", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option("--chips", default="", help="Like v5e-16. [default: mesh.chips of CONFIG, else this machine's devices]")
@click.option("--items", type=click.IntRange(0), default=0, help="Of a catalogue that is not prepared yet.")
@click.option("--users", type=click.IntRange(0), default=0, help="Values of user features, likewise.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def plan_step(config: str, chips: str, items: int, users: int, overrides: tuple[str, ...]) -> None:
    """Say what a training step of CONFIG takes on each chip, and whether it fits; by arithmetic, in seconds."""
    from instructrec_jax import config as configs
    from instructrec_jax.plan import plan
    from instructrec_jax.terminal import print_plan

    settings = configs.load(config, overrides)
    found = plan(settings, chips, items=items, users=users)
    print_plan(found, f"{settings.name} on {chips or settings.mesh.chips or 'this machine'}")
    if found.fits is False:
        sys.exit(1)


@cli.command(context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("config", type=click.Path())
@click.option(
    "--run", "run_dir", type=click.Path(), help="Run folder. [default: RUNS/NAME-HASH, the same for the same settings]"
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def train(config: str, run_dir: str | None, overrides: tuple[str, ...]) -> None:
    """Train CONFIG on its prepared data. The same command resumes a run that was stopped or killed.

    MFU (model FLOP utilisation) is analytic: operations of the weights and of causal attention (half of all pairs) over time and the
    chips' published bf16 peak. "useful" leaves padding out, "raw" counts it.
    """
    from instructrec_jax import config as configs
    from instructrec_jax.files import path_of

    settings = configs.load(config, overrides)
    say = start(preemption=True)
    from instructrec_jax import run

    folder = path_of(run_dir) if run_dir else configs.run_dir(settings)
    configs.check_same_run(settings, folder)
    say(f"run: {folder}")
    finished = run.train_run(settings, folder, say)
    if finished.best_step is not None and finished.best:
        say(f"best step {finished.best_step}: " + ", ".join(f"{k} {v:.4f}" for k, v in finished.best.items()))
    if finished.stopped:
        sys.exit(143)
    say(f"next: instructrec evaluate {folder}")


@cli.command(context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("run_dir", type=click.Path())
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def refit(run_dir: str, overrides: tuple[str, ...]) -> None:
    """Train RUN_DIR's settings once more, on training and validation events, for the steps that validation chose.

    The new run is NAME-refit-HASH beside the first. The same command resumes it.
    """
    say = start(preemption=True)
    from instructrec_jax import config as configs
    from instructrec_jax import run
    from instructrec_jax.refit import prepared_for, refit_config

    settings = refit_config(run_dir, overrides)
    prepared_for(settings, say, progress)
    folder = configs.run_dir(settings)
    say(f"run: {folder}; {settings.train.steps} steps")
    if run.train_run(settings, folder, say).stopped:
        sys.exit(143)
    say(f"next: instructrec evaluate {folder}")


@cli.command()
@click.argument("run_dir", type=click.Path())
@click.option("--user", help="User id of the data. Without it: a new user with no history.")
@click.option(
    "--item", "items", multiple=True, help="An item that a new user liked, by id or exact title; repeat, newest last."
)
@click.option("--wish", help='What is wanted, in words: "an animated film", "something like Heat but funny".')
@click.option("--preference", help="The user's taste, in words.")
@click.option(
    "--language", type=click.Choice(["en", "zh"]), help="Language of the instruction. [default: the run's first]"
)
@click.option("-k", "count", type=click.IntRange(1), default=10, show_default=True)
@click.option("--set", "set_name", default="", help="Of a mixture: which set.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def recommend(
    run_dir: str,
    user: str | None,
    items: tuple[str, ...],
    wish: str | None,
    preference: str | None,
    language: str | None,
    count: int,
    set_name: str,
    as_json: bool,
) -> None:
    """Recommend for a user, known or new, with or without a wish."""
    start("recommend")
    from instructrec_jax.recommend import recommend as recommend_for

    answer = recommend_for(
        run_dir,
        user=user,
        items=items,
        wish=wish,
        preference=preference,
        language=language,
        count=count,
        set_name=set_name,
    )
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    who = f"user {user}" if user else "a new user"
    console.print(
        f"[bold]{who}[/bold]"
        + (f", wish: {wish!r}" if wish else "")
        + (f", taste: {preference!r}" if preference else "")
    )
    if answer["history"]:
        console.print("last seen: " + "; ".join(answer["history"][-5:]), markup=False)
    if answer["like"]:
        console.print("like: " + "; ".join(answer["like"]), markup=False)
    table = Table("", "title", "score", "item_id")
    for place, row in enumerate(answer["items"], start=1):
        about = f"  [dim]{', '.join(row['about'])}[/dim]" if row["about"] else ""
        table.add_row(str(place), escape(row["title"]) + about, f"{row['score']:.2f}", row["item_id"])
    console.print(table)


@cli.command(context_settings={**OVERRIDES, "show_default": True}, epilog=OVERRIDES_HELP)
@click.argument("run_dir", type=click.Path())
@click.argument("requests", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="File of scores: .jsonl or .parquet.")
@click.option(
    "--method",
    type=click.Choice(["items", "rerank", "likelihood", "trie", "labels", "yesno"]),
    help="How a candidate is scored. [default: items if the run has an item head, else likelihood]",
)
@click.option(
    "--normalise",
    type=click.Choice(["sum", "mean", "prior"]),
    default="sum",
    help="Likelihood and trie: sum over a candidate's tokens, their mean, or the sum less what no prompt gives.",
)
@click.option("--shifts", type=click.IntRange(1), default=1, help="Labels: cyclic shifts of the list.")
@click.option("-k", "count", type=click.IntRange(1), default=20, help="Best items of a whole catalogue.")
@click.option("--keep-seen", is_flag=True, help="Whole catalogue: rank items of the history too.")
@click.option("--shard-size", type=click.IntRange(1), default=1000, help="Requests between points to go on from.")
@click.option("--set", "set_name", default="", help="Of a mixture: which set.")
@click.option("--restart", is_flag=True, help="Throw away the parts of an earlier command.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def score(run_dir: str, requests: str, out: str, **options: Any) -> None:
    """Score a file of REQUESTS, one JSON object or Parquet row each, and go on where a killed command stopped.

    \b
    {"user": "42", "wish": "a slow film", "candidates": ["12", "7"]}    item ids; absent or "all": the catalogue
    {"id": "a", "history": ["Heat (1995)"], "preference": "crime"}      somebody new; item ids or exact titles
    {"prompt": "Name a film.", "texts": ["Heat", "Alien"]}              an instruction as it is, and texts

    A line of the output is {"id", "candidates", "scores"}. Bad lines are reported, and written to OUT.errors.jsonl.
    """
    start("score a file")
    from instructrec_jax.score import score as score_file

    done = score_file(
        run_dir,
        requests,
        out,
        say=click.echo,
        warn=lambda text: click.echo(text, err=True),
        progress=progress,
        **options,
    )
    click.echo(str(done))
    if not done.lines:
        click.echo("no line has scores: no output is written", err=True)
        sys.exit(1)
    click.echo(f"scores of {done.lines:,} requests: {out}")


@cli.command()
@click.argument("where", metavar="MODEL_OR_RUN", type=click.Path())
@click.argument("prompt")
@click.option("--max-new", type=int, default=64, show_default=True, help="Most tokens of the answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token, no sampling.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Sample among the fewest tokens of this mass."
)
@click.option("--beams", type=int, default=1, show_default=True, help="Beam search with this many hypotheses.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--system", help="A system message, for a model with a chat template.")
def generate(where: str, prompt: str, seed: int, system: str | None, **how: Any) -> None:
    """Let a run or a published model answer PROMPT in words."""
    start("answer one prompt")
    from instructrec_jax.generate import generate as answer
    from instructrec_jax.models.generate import Decoding

    click.echo(answer(where, [prompt], Decoding(**how), seed=seed, system=system)[0].text)


@cli.command()
@click.argument("run_dir", type=click.Path())
def report(run_dir: str) -> None:
    """Write one self-contained HTML file about a run: curves, tables, pictures, users."""
    from instructrec_jax.evaluation.report import write_report

    click.echo(f"report: {write_report(run_dir)}")


@cli.command("export", context_settings=OVERRIDES, epilog=OVERRIDES_HELP)
@click.argument("run_dir", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--to", type=click.Choice(["hf"]), default="hf", show_default=True, help="Hugging Face's layout.")
@click.option("--adapter", is_flag=True, help="Write the adapter alone, for PEFT. [default: merge it]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the tensors. [default: bfloat16; of an adapter float32]",
)
@click.option("--max-shard", default="5GB", show_default=True, help="Largest size of a file.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def export_run(run_dir: str, out: str, to: str, **options: Any) -> None:
    """Write the best step of RUN_DIR to the folder OUT, for transformers, vLLM or PEFT."""
    start("export")
    from instructrec_jax.export import export_hf

    folder = export_hf(run_dir, out, say=click.echo, **options)
    click.echo(f"exported: {folder}")


@cli.group(cls=Commands)
def model() -> None:
    """Pretrained models: fetch them into the cache, list them, show their size."""


for _command in model_commands.COMMANDS:
    model.add_command(_command)


@cli.group(cls=Commands)
def templates() -> None:
    """Instruction templates and domain packs: check your own files, show wordings, count the grid."""


for _command in template_commands.COMMANDS:
    templates.add_command(_command)


@cli.command()
@click.argument("config", type=click.Path(), required=False)
def doctor(config: str | None) -> None:
    """Check versions, devices, mesh, memory, cache folders and data paths; say what to fix."""
    from instructrec_jax.doctor import examine

    problems = examine(config, click.echo)
    if problems:
        sys.exit(1)


def _where() -> str:
    """``" (process 3 of 4)"`` where there are several."""
    from instructrec_jax.training import hosts

    return f" ({name})" if (name := hosts.name()) else ""


def main() -> None:
    """Entry point: user errors are printed without a traceback and exit with status 2."""
    with_large_pages()
    try:
        cli(standalone_mode=True)
    except SystemExit as end:
        if end.code in (None, 0, 143) and _where():  # on all processes alike
            from instructrec_jax.training import hosts

            hosts.meet("at the end")
        raise
    except UserError as error:
        click.echo(f"error{_where()}: {error}", err=True)
        sys.exit(2)
    except Exception:
        if _where():
            click.echo(f"error{_where()}:", err=True)
        raise


if __name__ == "__main__":
    main()
