"""The commands of ``instructrec templates``: check a team's files, show wordings with real items, count the grid."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.terminal import escape

if TYPE_CHECKING:
    from instructrec_jax.config import Config
    from instructrec_jax.instructions.build import Builder
    from instructrec_jax.instructions.example import InstructionExample
    from instructrec_jax.instructions.template import Template

_TRIES = 400  # events at which an example is looked for: not every item has words for a wish
_MOST_OF_ROW = 0.5  # share of a packed row that a wording may take, so that the history has room

_LANGUAGE = click.option("--language", type=click.Choice(["en", "zh"]), help="One language only.")
_FILES = click.option("--file", "files", multiple=True, type=click.Path(), help="A further template file; repeat.")
_PACKS = click.option("--pack", "packs", multiple=True, type=click.Path(), help="A further file of packs; repeat.")


@click.command("check")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--tokens-of",
    "where",
    metavar="CONFIG_OR_RUN",
    type=click.Path(),
    help="Also count tokens, with the tokeniser and the row length of this prepared config or run.",
)
def check(files: tuple[str, ...], where: str | None) -> None:
    """Check template FILES and files of domain packs: every problem with file, line and column. Status 1 if there is any."""
    from instructrec_jax.instructions.packs import domain_names
    from instructrec_jax.instructions.templates import load_templates

    length = _token_counter(where) if where else None
    templates, packs, bad = load_templates(), domain_names(), 0
    for name in files:
        made, problems = _check_one(name, templates, packs)
        if length and not problems:
            problems = _too_many_tokens(name, [t for t in made if not isinstance(t, str)], *length)
        for problem in problems:
            click.echo(problem)
        bad += len(problems)
        templates += [t for t in made if not isinstance(t, str)]
        packs += [p for p in made if isinstance(p, str)]
        if not problems:
            what = "domain pack" if any(isinstance(m, str) for m in made) else "template"
            click.echo(f"{name}: {len(made)} {what}{'s' if len(made) != 1 else ''}, nothing wrong")
    if bad:
        click.echo(f"{bad} problem{'s' if bad > 1 else ''}", err=True)
        sys.exit(1)


@click.command("list")
@_LANGUAGE
@_FILES
def list_templates(language: str | None, files: tuple[str, ...]) -> None:
    """Count the templates by preference, intention and task, and by family."""
    from rich.console import Console
    from rich.table import Table

    from instructrec_jax.instructions.aspects import INTENTIONS, LEVELS, PREFERENCES, TASKS, invalid_reason
    from instructrec_jax.instructions.packs import LANGUAGES
    from instructrec_jax.instructions.template import WIDENINGS
    from instructrec_jax.instructions.templates import load_templates

    console = Console(width=None if sys.stdout.isatty() else 110)
    for one in [language] if language else LANGUAGES:
        templates = load_templates([one], files)
        count = Counter((t.preference, t.intention, t.widening or t.task, t.held_out) for t in templates)

        def cell(*group: str, count: Counter = count) -> str:
            trained, held = count[*group, False], count[*group, True]
            return (f"{trained}" if trained else "") + (f" +{held}" if held else "")

        table = Table("", *TASKS, *WIDENINGS, title=f"{one}: {len(templates)} templates", title_justify="left")
        for p in PREFERENCES:
            for i in INTENTIONS:
                plain = ("–" if invalid_reason(p, i, task) else cell(p, i, task) or "0" for task in TASKS)
                table.add_row(f"{p}, {i}", *plain, *(cell(p, i, w) for w in WIDENINGS))
        console.print(table)
        by_family = Counter((".".join(t.id.split(".")[:2]), t.kind, t.held_out) for t in templates)
        table = Table("family", "kind", "trained", "held out")
        for family, kind in dict.fromkeys(name[:2] for name in by_family):
            table.add_row(escape(family), kind, *(str(by_family[family, kind, held] or "") for held in (False, True)))
        console.print(table)
    for levels in LEVELS.values():
        for level, meaning in levels.items():
            console.print(f"{level}  {meaning}", highlight=False)
    console.print("+n: held out, never trained on. –: not an instruction.", highlight=False)


@click.command(
    "show",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
    epilog="Any setting of CONFIG can be changed with a dotted option, e.g. --data.path DIR.",
)
@click.argument("config", required=False, type=click.Path())
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--id", "family", default="", help="An id, or the beginning of some: seq, search.p0, pair.p1.a.")
@_LANGUAGE
@click.option("--domain", help="Domain pack. [default: CONFIG's, else films]")
@_FILES
@_PACKS
@click.option("--example", is_flag=True, help="Rendered with real items: CONFIG's, or those of the embedded data.")
def show(
    config: str | None,
    overrides: tuple[str, ...],
    family: str,
    language: str | None,
    domain: str | None,
    files: tuple[str, ...],
    packs: tuple[str, ...],
    example: bool,
) -> None:
    """Show templates: what they say of themselves, their words, and with --example what a model would read and answer."""
    from instructrec_jax import config as configs
    from instructrec_jax.instructions.packs import load_domain
    from instructrec_jax.instructions.templates import families, load_templates

    settings = configs.load(config, overrides) if config else configs.Config()
    prepared = _prepared_data(settings)
    instructions = settings.instructions
    instructions = dataclasses.replace(
        instructions,
        languages=(language,) if language else instructions.languages if config else ("en", "zh"),
        templates=(*instructions.templates, *files),
        packs=(*instructions.packs, *packs),
    )
    settings = dataclasses.replace(
        settings,
        instructions=instructions,
        data=dataclasses.replace(settings.data, domain=domain or settings.data.domain),
    )
    templates = load_templates(instructions.languages, instructions.templates)
    chosen = [t for t in templates if not family or t.is_in(family)]
    if not chosen:
        raise ConfigError(
            f"no template is in {family!r}{did_you_mean(family, families(templates))}",
            remedy="`instructrec templates list` shows the families",
        )
    pack = load_domain(settings.data.domain, instructions.packs)
    builder, names = _builder(settings, prepared) if example else (None, [])
    for template in chosen:
        reads = ", ".join(sorted(template.reads)) or "nothing"
        click.secho(f"{template.id} [{template.language}]", bold=True, nl=False)
        click.echo(
            f"  {', '.join(template.aspects)}  {template.kind}  reads: {reads}  metric: {template.metric}"
            + ("  held out" if template.held_out else "")
        )
        if builder is None:
            click.echo(f"  {_said(template, template.prompt, pack)}")
            click.echo(f"  → {_said(template, template.answer, pack) or '(the item)'}")
            continue
        made = example_of(builder, template)
        if made is None:
            click.echo("  the data has no words for it")
            continue
        click.echo(f"  {_readable(made.prompt, made, names)}")
        click.echo(f"  → {made.answer or builder.titles[made.target]}")


def example_of(builder: Builder, template: Template) -> InstructionExample | None:
    """What a template becomes at the first of some training events that have words for it; None if none has."""
    import numpy as np

    from instructrec_jax.data.schema import TRAIN

    data = builder.data
    place = np.arange(len(data.item)) - data.offsets[data.user]
    events = np.flatnonzero((data.split == TRAIN) & (place >= min(8, place.max())))
    for end in events[np.linspace(0, len(events) - 1, min(_TRIES, len(events))).astype(int)].tolist():
        user, target = int(data.user[end]), int(data.item[end])
        features = builder.features(user) if builder.features else ()
        if "features" in template.reads and not features:
            continue
        candidates: tuple[int, ...] = ()
        if shown := builder.shown(template.task):
            candidates = builder.candidates(np.asarray([end]), [data.history(user)], shown)[0]
        slots = builder.slots(template, user, end, target, candidates=candidates, features=features)
        if slots is not None:
            return builder.example(template, slots, user=user, target=target)
    return None


def _prepared_data(settings: Config) -> Path | None:
    """The prepared data of a config, if it is there and not of other settings."""
    from instructrec_jax.files import read_json

    manifest = settings.prepared_dir / "manifest.json"
    if not manifest.is_file() or read_json(manifest, "prepare it again").get("config_hash") != settings.data_hash():
        return None
    return settings.prepared_dir / "data"


def _builder(settings: Config, prepared: Path | None) -> tuple[Builder, list[str]]:
    """Prompts in words over a config's data, prepared or not, and the names of its user features."""
    from instructrec_jax.data import sources, store
    from instructrec_jax.data.cleaning import clean
    from instructrec_jax.data.features import user_features
    from instructrec_jax.data.splits import split
    from instructrec_jax.instructions.build import Builder

    if prepared:
        data = store.load_split(prepared)
    else:
        data = split(clean(sources.read(settings.data, settings.name), settings.data.clean), settings.data.split)
    users = user_features(data)
    tokens = users.tokens if users.names else None
    return Builder(data, settings.instructions, settings.data.domain, tokens, items_as="title"), users.names


def _readable(text: str, example: InstructionExample, names: list[str]) -> str:
    from instructrec_jax.instructions.example import FEATURE_SLOT

    for feature in example.features:
        value = "" if feature.value == 1 else f" {feature.value:+.1f}"
        text = text.replace(FEATURE_SLOT, f"[{names[feature.index]}{value}]", 1)
    return text


def _said(template: Template, text: str, pack: Any) -> str:
    """A text with the pack's words, its other slots as they are."""
    from instructrec_jax.instructions.packs import word_slots

    for slot, word in word_slots(pack, template.language).items():
        text = text.replace(f"{{{slot}}}", word)
    return text


def _check_one(name: str, templates: list[Template], packs: list[str]) -> tuple[list[Any], list[str]]:
    """The templates, or the names of the packs, of a file, and what is wrong in it."""
    from instructrec_jax.instructions.packs import check_pack_file
    from instructrec_jax.instructions.template_file import check_template_file
    from instructrec_jax.instructions.yaml_file import YamlFile

    file = YamlFile(name)
    keys = file.keys()
    made: list[Any]
    if keys & {"templates", "language"} or not keys:
        made = list(check_template_file(file, templates))
    else:
        made = list(check_pack_file(file, packs))
    return made, [str(p) for p in sorted(file.problems, key=lambda p: (p.line, p.column))]


def _token_counter(where: str) -> tuple[Any, int, Any]:
    """The tokeniser of a prepared config or run, its row length and its domain pack."""
    from instructrec_jax import config as configs
    from instructrec_jax.data import tokenizer
    from instructrec_jax.instructions.packs import load_domain

    path = Path(where)
    settings = configs.load(path / "config.yaml" if path.is_dir() else path)
    folder = settings.prepared_dir / "tokenizer"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there", remedy="run `instructrec data prepare CONFIG` first")
    load = tokenizer.load_pretrained if settings.model.pretrained else tokenizer.load
    return load(folder), settings.train.sequence_length, load_domain(settings.data.domain, settings.instructions.packs)


def _too_many_tokens(name: str, templates: list[Template], text: Any, row: int, pack: Any) -> list[str]:
    from instructrec_jax.instructions.template import SLOT
    from instructrec_jax.instructions.yaml_file import Problem

    out, most = [], int(row * _MOST_OF_ROW)
    for template in templates:
        words = SLOT.sub("", _said(template, f"{template.prompt} {template.answer}", pack))
        if (tokens := len(text.encode(words))) > most:
            what = (
                f"template {template.id!r} is over-long: {tokens} tokens without what fills its slots, at most "
                f"{most} of a row of {row} (train.sequence_length)"
            )
            out.append(str(Problem(name, *template.place, what)))
    return out


COMMANDS = (check, show, list_templates)
