"""Models from the Hugging Face hub: configuration, tokenizer and safetensors, no code and no pickled weights."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from instructrec_jax.errors import UserError

TIMEOUT = 5.0  # s, for the hub's first answer
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_WANTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentence_bert_config.json",
    "modules.json",
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
)


class HubError(UserError):
    """The hub did not give the model: no network, switched off, no such model, or no access. The message says which."""


@dataclass(frozen=True)
class Found:
    """A model that the hub has."""

    name: str  # owner/name
    revision: str  # commit
    files: tuple[str, ...]  # those that are wanted
    licence: str  # its tag, or an empty string


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def find(name: str, revision: str | None) -> Found:
    """Ask the hub for a model.

    Args:
        name: ``owner/name``.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        HubError: the hub does not answer within seconds, or refuses.
        UserError: the model has no weights in safetensors.
    """
    if offline():
        raise HubError("HF_HUB_OFFLINE is set", remedy="unset it, or give a local folder")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi(endpoint=_endpoint()).model_info(name, revision=revision, timeout=TIMEOUT)
    except GatedRepoError as error:
        raise _gated(name) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no public model {name}", remedy="check the name; for a private model: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"the hub has no revision {revision!r} of {name}", remedy="check --revision") from error
    except Exception as error:  # the HTTP library behind it, and with it its errors, has changed between versions
        raise HubError(f"the hub cannot be reached ({_reason(error)})", remedy="check the network") from error
    names = [s.rfilename for s in info.siblings or ()]
    wanted = tuple(
        n for n in names if n == "1_Pooling/config.json" or any(fnmatch(n, w) and "/" not in n for w in _WANTED)
    )
    if "config.json" not in wanted or not any(n.endswith(".safetensors") for n in wanted):
        raise UserError(
            f"{name} holds no config.json with weights in safetensors",
            remedy="download its .gguf file and give its path"
            if any(n.endswith(".gguf") for n in names)
            else "choose a release in safetensors; pickled weights are not read",
        )
    tags = [t.removeprefix("license:") for t in info.tags or () if t.startswith("license:")]
    return Found(name, info.sha or revision or "main", wanted, tags[0] if tags else "")


def download(found: Found, folder: Path) -> None:
    """Bring the wanted files into a folder. What an interrupted call left there is continued.

    Raises:
        HubError: the hub stopped answering, or the files need an acceptance on its site.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        snapshot_download(
            found.name,
            revision=found.revision,
            local_dir=folder,
            allow_patterns=list(found.files),
            etag_timeout=TIMEOUT,
            endpoint=_endpoint(),
        )
    except GatedRepoError as error:
        raise _gated(found.name) from error
    except Exception as error:  # as above
        raise HubError(
            f"the download of {found.name} failed ({_reason(error)})", remedy="run the command again: it goes on"
        ) from error
    # Its notes on what it had downloaded, and files of an earlier attempt at another revision.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in found.files]:
        path.unlink()
    missing = [n for n in found.files if not (folder / n).is_file()]
    if missing:
        raise HubError(f"the download of {found.name} lacks {missing[0]}", remedy="run the command again: it goes on")


def _gated(name: str) -> HubError:
    return HubError(
        f"{name} asks for an acceptance of its terms on the hub",
        remedy=f"accept them at https://huggingface.co/{name}, then: hf auth login",
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
