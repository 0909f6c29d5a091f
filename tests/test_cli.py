"""The commands, walked once on a slice of real data, and what they say when something is wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from instructrec_jax import config as configs
from instructrec_jax.cli import cli
from instructrec_jax.errors import UserError
from tests.tiny import tiny_config, write_slice


def call(*words: str) -> str:
    """Run a command in this process; its output."""
    result = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the tiny config, made by the commands."""
    tmp = tmp_path_factory.mktemp("cli")
    write_slice(tmp / "data")
    file = tmp / "tiny.yaml"
    file.write_text(configs.dump(tiny_config(tmp)), encoding="utf-8")
    prepared = call("data", "prepare", str(file))
    assert "5-core" in prepared and "instruction examples" in prepared and "history length" in prepared
    trained = call("train", str(file), "--train.steps", "10")
    assert "step     10/10 100%" in trained and "ETA" in trained
    return Path(trained.split("next: instructrec evaluate ")[1].strip())


def test_the_main_job(run_dir: Path) -> None:
    output = call("evaluate", str(run_dir), "--json")
    last = json.loads(output.strip().splitlines()[-1])
    for system in ("model", "popularity", "itemknn", "ease", "ease_last10", "bm25"):
        assert 0 <= last[system]["ndcg@10"] <= last[system]["hr@10"] <= 1
        assert last[system]["duplicate@10"] == 0
    assert {"model, wish", "bm25"} <= set(last["search"]) and "model, likelihood of the title" in last["likelihood"]
    saved = json.loads((run_dir / "evaluation/full.json").read_text(encoding="utf-8"))
    estimate = next(r for r in saved["next_item"]["rows"] if r["name"] == "model")["metrics"]["ndcg@10"]
    assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    assert len(saved["users"]) == 10 and {p["task"] for p in saved["prompts"]} >= {"sequential", "search", "describe"}

    sampled = json.loads(call("evaluate", str(run_dir), "--protocol", "1+9", "--json").strip().splitlines()[-1])
    assert sampled["protocol"] == "1+9 uniform seed 0"
    assert sampled["popularity"]["hr@10"] == 1  # ten candidates, ten places

    report = call("report", str(run_dir)).strip().removeprefix("report: ")
    assert "<html" in Path(report).read_text(encoding="utf-8")


def test_a_file_of_lists_gives_the_metrics_of_its_maker(run_dir: Path) -> None:
    """The model's own lists, evaluated as a file, agree with the model's row."""
    call("evaluate", str(run_dir))
    lists = run_dir / "evaluation/full_model.csv.gz"
    with gzip.open(lists, "rt") as file:
        assert file.readline().replace('"', "").startswith("user_id,item_id,score")
    from_file = json.loads(
        call("evaluate", str(run_dir), "--recommendations", str(lists), "--json").strip().splitlines()[-1]
    )
    saved = json.loads((run_dir / "evaluation/full.json").read_text(encoding="utf-8"))
    model = next(r for r in saved["next_item"]["rows"] if r["name"] == "model")["metrics"]
    for name in ("ndcg@10", "hr@20", "mrr@5"):
        assert next(iter(from_file.values()))[name] == pytest.approx(model[name]["mean"], abs=1e-9)


def test_recommend(run_dir: Path) -> None:
    known = json.loads(call("recommend", str(run_dir), "--user", "3", "--wish", "horror", "-k", "4", "--json"))
    assert len(known["items"]) == 4 and known["history"]
    assert not {row["title"] for row in known["items"]} & set(known["history"])
    title = known["items"][0]["title"]
    newcomer = json.loads(call("recommend", str(run_dir), "--item", title, "-k", "3", "--json"))
    assert newcomer["history"] == [title] and title not in {row["title"] for row in newcomer["items"]}
    assert len(json.loads(call("recommend", str(run_dir), "--json"))["items"]) == 10
    # A wish that names an item asks for what the item's history asks for.
    like = json.loads(
        call("recommend", str(run_dir), "--wish", f"something like {title}, for tonight", "-k", "3", "--json")
    )
    assert like["like"] == [title] and like["history"] == [] and like["items"] == newcomer["items"]
    chinese = call("recommend", str(run_dir), "--wish", "一部悲伤的电影", "--language", "zh", "-k", "2")
    assert "a new user" in chinese


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recommend", "RUN", "--user", "nobody"), "no user 'nobody' among the"),
        (("recommend", "RUN", "--item", "Heat (199)"), "no item with id or title"),
        (("recommend", "missing"), "is not a run"),
        (("evaluate",), "either a RUN_DIR or --auto DIR"),
        (("evaluate", "RUN", "--evaluate.bootstrp", "3"), "did you mean 'bootstrap'"),
        (("evaluate", "--auto", "missing"), "no such folder"),
        (("train", "missing.yaml"), "no config file"),
    ],
)
def test_mistakes_are_named(run_dir: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(cli, [w.replace("RUN", str(run_dir)) for w in words], catch_exceptions=False)


def test_another_setting_is_another_run(run_dir: Path) -> None:
    file = run_dir.parent.parent / "tiny.yaml"
    with pytest.raises(UserError, match=r"train.learning_rate: 0.002 → 0.5"):
        words = ["train", str(file), "--run", str(run_dir), "--train.steps", "10", "--train.learning_rate", "0.5"]
        CliRunner().invoke(cli, words, catch_exceptions=False)


def test_a_misspelt_command_is_corrected() -> None:
    result = CliRunner().invoke(cli, ["recomend"])
    assert result.exit_code == 2 and "did you mean 'recommend'" in result.output


def test_user_errors_have_no_traceback() -> None:
    command = [sys.executable, "-m", "instructrec_jax.cli", "report", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.startswith("error: ")


@pytest.mark.parametrize("words", [["--beam.runner", "FlinkRunner"], ["--beam.runner=FlinkRunner"]])
def test_options_of_beam_need_beam(words: list[str]) -> None:
    result = CliRunner().invoke(cli, ["data", "prepare", "configs/ml_latest_small.yaml", *words])
    assert result.exit_code and isinstance(result.exception, UserError)
    assert str(result.exception) == "--beam.runner is an option of --engine beam"


def test_help_imports_nothing_slow() -> None:
    """``instructrec --help`` must answer at once: no array library is loaded for it."""
    code = (
        "import sys; from instructrec_jax.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'jax', 'numpy', 'pyarrow', 'flax', 'transformers', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_doctor(run_dir: Path) -> None:
    output = call("doctor", str(run_dir / "config.yaml"))
    assert "devices: 8" in output and "everything needed is here" in output
    broken = CliRunner().invoke(cli, ["doctor", "nowhere.yaml"])
    assert broken.exit_code == 1 and "FIX: no config file nowhere.yaml" in broken.output


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "instructrec_jax", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("instructrec, version")
