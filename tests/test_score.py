"""``instructrec score``: the scorer's own scores, in order, whole after a kill, with every bad line named."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import config as configs
from instructrec_jax import prepare, run, score_input
from instructrec_jax import score as module
from instructrec_jax.cli import cli
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluation.metrics import top_lists
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.score import Scored, score
from instructrec_jax.score_input import Asked, Bad, Parser, lines, plain_prompt
from instructrec_jax.score_parts import Parts
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.scoring.requests import Ready
from instructrec_jax.training.checkpoint import Checkpoints
from instructrec_jax.training.step import init_model
from tests.tiny import tiny_config, write_slice

Setup = tuple[Path, run.Session, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """A run with a checkpoint of random parameters, which is quicker than training."""
    tmp = tmp_path_factory.mktemp("score")
    write_slice(tmp / "data")
    config = tiny_config(tmp)
    prepare.prepare(config, lambda _: None)
    folder = tmp / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    with run.session(config) as s:
        params = init_model(config, s.arch, s.sizes, s.content, 3)[0]
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(2, {"params": params}, iter(grain.MapDataset.range(4).to_iter_dataset()), {}, None)
        checkpoints.close()
    with run.trained(folder) as (s, params, _):
        yield folder, s, params


@pytest.fixture
def one_scorer(trained: Setup, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    """All commands of a test share one scorer, and what it has compiled."""
    _, s, params = trained
    scorer = _SCORERS.setdefault(id(params), s.scorer(params))
    monkeypatch.setattr(run.Session, "scorer", lambda *_: scorer)
    return scorer


_SCORERS: dict[int, Scorer] = {}


def asked(s: run.Session, count: int = 11) -> list[dict[str, Any]]:
    """Requests of several kinds whose ids are texts."""
    items = s.prepared.data.catalogue.item_ids
    titles = s.prepared.data.catalogue.titles
    out: list[dict[str, Any]] = []
    for n in range(count):
        row: dict[str, Any] = {
            "id": f"request {n}",
            "candidates": [items[(7 * n + k * k) % len(items)] for k in range(n % 5)],
        }
        if n % 3 == 0:
            row |= {"user": s.prepared.data.user_ids[n], "wish": "a slow film"}
        elif n % 3 == 1:
            row |= {"history": [items[n], titles[n + 3]], "preference": "likes “old” films"}
        else:
            row |= {"prompt": f"Name film {n}, bitte: 电影"}
        out.append(row)
    return out


def write(path: Path, rows: list[dict[str, Any]] | list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
        return path
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def requests_of(s: run.Session, rows: list[dict[str, Any]]) -> list[Request]:
    """The same requests, put together by hand."""
    data, out = s.prepared.data, []
    for row in rows:
        if "prompt" in row:
            prompt = plain_prompt(row["prompt"])
        else:
            history: list[int] = []
            features = ()
            if "user" in row:
                user = data.user_ids.index(row["user"])
                history = data.history(user, int(data.offsets[user + 1])).tolist()
                features = s.prepared.users.tokens(user)
            for name in row.get("history", ()):
                history.append(data.catalogue.index.get(name, -1))
                if history[-1] < 0:
                    history[-1] = data.catalogue.titles.index(name)
            prompt = s.builder.recommend_prompt(history, row.get("wish"), row.get("preference"), features=features)
        given = row.get("texts", [data.catalogue.index[c] for c in row.get("candidates", ())])
        out.append(Request(prompt, given))
    return out


# ---------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "how",
    [
        {"method": "items"},
        pytest.param({"method": "likelihood", "normalise": "mean"}, marks=pytest.mark.slow),
        {"method": "likelihood", "normalise": "prior"},
        {"method": "yesno"},
    ],
    ids=lambda how: "-".join(how.values()),
)
def test_scores_are_the_scorers_own(trained: Setup, one_scorer: Scorer, tmp_path: Path, how: dict[str, Any]) -> None:
    folder, s, _ = trained
    rows = asked(s)
    out = tmp_path / "scores.jsonl"
    done = score(folder, write(tmp_path / "requests.jsonl", rows), out, **how, shard_size=4)
    found = read(out)
    assert (done.lines, done.errors, done.requests) == (11, 0, 11)
    assert [(f["id"], f["candidates"]) for f in found] == [(r["id"], r["candidates"]) for r in rows]
    wanted = one_scorer.score(requests_of(s, rows), how["method"], **{k: v for k, v in how.items() if k != "method"})
    # A difference of two log probabilities near 100 is exact to a few of their own last places.
    atol = 5e-5 if how.get("normalise") == "prior" else 1e-5
    for f, w in zip(found, wanted):
        np.testing.assert_allclose(f["scores"], w, rtol=1e-5, atol=atol)
    assert not (tmp_path / ".scores.jsonl.parts").exists() and not (tmp_path / "scores.jsonl.errors.jsonl").exists()


def test_texts(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    folder, s, _ = trained
    rows = [{"texts": ["a film", "another film", "a film"], "wish": "a film"}, {"texts": []}]
    out = tmp_path / "scores.jsonl"
    score(folder, write(tmp_path / "requests.jsonl", rows), out, method="likelihood")
    found = read(out)
    assert [f["id"] for f in found] == [1, 2] and [f["candidates"] for f in found] == [r["texts"] for r in rows]
    wanted = one_scorer.score(requests_of(s, rows), "likelihood")
    np.testing.assert_allclose(found[0]["scores"], wanted[0], rtol=1e-5)
    assert found[0]["scores"][0] == found[0]["scores"][2] != found[0]["scores"][1]


@pytest.mark.parametrize("keep_seen", [False, True])
def test_the_best_of_the_catalogue(trained: Setup, one_scorer: Scorer, tmp_path: Path, keep_seen: bool) -> None:
    folder, s, _ = trained
    data = s.prepared.data
    rows = [
        {"user": data.user_ids[3]},
        {"history": data.catalogue.item_ids[:150], "candidates": "all"},
        {"wish": "horror"},
    ]
    out = tmp_path / "scores.jsonl"
    score(folder, write(tmp_path / "requests.jsonl", rows), out, count=7, keep_seen=keep_seen)
    seen = [data.history(3, int(data.offsets[4])), np.arange(150), np.zeros(0, np.int64)]
    scores = one_scorer.score_all([r.prompt for r in requests_of(s, [{**r, "candidates": []} for r in rows])])  # pyright: ignore
    for found, row, top in zip(read(out), scores, top_lists(scores, 7, None if keep_seen else seen)):
        assert found["candidates"] == [data.catalogue.item_ids[i] for i in top]
        np.testing.assert_allclose(found["scores"], row[top], rtol=1e-5)
        assert found["scores"] == sorted(found["scores"], reverse=True)
    if not keep_seen:
        assert not set(read(out)[1]["candidates"]) & set(data.catalogue.item_ids[:150])


def test_parquet_is_the_same(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    folder, s, _ = trained
    rows = [{k: r.get(k) for k in score_input.FIELDS} for r in asked(s)]
    results = []
    for source, out in (("jsonl", "jsonl"), ("jsonl", "parquet"), ("parquet", "jsonl"), ("parquet", "parquet")):
        file = write(tmp_path / f"requests.{source}", rows)
        score(folder, file, tmp_path / f"{source}.{out}", shard_size=4)
        results.append(read(tmp_path / f"{source}.{out}"))
    assert results[0] == results[1] == results[2] == results[3]
    # Without ids the numbers of the rows stand, as numbers.
    score(folder, write(tmp_path / "r.parquet", [{"wish": "a film"}] * 3), tmp_path / "numbers.parquet", count=2)
    table = pq.read_table(tmp_path / "numbers.parquet")
    assert table.schema.field("id").type == pa.int64() and table["id"].to_pylist() == [1, 2, 3]


def test_batches_within_a_shard(
    trained: Setup, one_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More batches than fit into the queues, some of them cut by the end of a shard."""
    folder, _, _ = trained
    monkeypatch.setattr(module, "BATCH", 3)
    sizes: list[int] = []
    plain = one_scorer.run
    monkeypatch.setattr(one_scorer, "run", lambda p: (sizes.append(len(p.ready)), plain(p))[1])
    rows = [{"id": n, "candidates": []} for n in range(23)]
    told: list[tuple[int, int]] = []

    def progress(_: str, expected: int, items: Iterator) -> Iterator:
        told.append((expected, count := len([*items])))
        return iter(range(count))

    score(folder, write(tmp_path / "r.jsonl", rows), tmp_path / "out.jsonl", shard_size=8, progress=progress)
    assert [f["id"] for f in read(tmp_path / "out.jsonl")] == list(range(23))
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 3, 1] and told == [(23, 23)]


# ------------------------------------------------------------------------------------------------------------- bad lines

BAD: list[tuple[str, str]] = [
    ("nonsense", "not JSON: Expecting value"),
    ("[1]", "a list; a JSON object is needed"),
    ('{"user": "nobody"}', "no user 'nobody' among the"),
    ('{"user": 3}', "user is the number 3; a text is needed"),
    ('{"history": ["1", "Heat (199)"]}', "history: no item with id or title 'Heat (199)'"),
    ('{"candidates": ["nothing"]}', "candidates: no item with id 'nothing'"),
    ('{"candidates": 3}', 'candidates is the number 3; a list of texts is needed, or "all"'),
    ('{"candidates": [true]}', 'candidates holds true; a list of texts is needed, or "all"'),
    ('{"candidates": "some"}', "candidates is the text 'some'; a list"),
    ('{"candidates": [], "texts": []}', "candidates and texts: give one or the other"),
    ('{"candidats": []}', "unknown field 'candidats' (did you mean 'candidates'?)"),
    ('{"prompt": "a", "wish": "b"}', "prompt and wish: a prompt is used as it is"),
    ('{"prompt": " "}', "prompt is empty"),
    ('{"prompt": "\\ufffc"}', "prompt holds the character U+FFFC"),
    ('{"wish": "\\ud800"}', "wish holds half a surrogate pair at character 1"),
    ('{"id": 1.5}', "id is the number 1.5; a text or a whole number is needed"),
    ('{"id": "\\ud800"}', "id holds half a surrogate pair"),
    ('{"texts": ["a"]}', "the item heads score catalogue items, not texts"),
]


def test_bad_lines_are_named_and_the_rest_goes_on(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    folder, s, _ = trained
    good = [{**row, "id": n} for n, row in enumerate(asked(s, len(BAD)))]
    lines_ = [x for (bad, _), row in zip(BAD, good) for x in (bad, "  ", json.dumps(row))]
    file = write(tmp_path / "requests.jsonl", lines_)
    file.write_bytes(file.read_bytes() + b'{"wish": "\xff"}\n' * 9)
    warned: list[str] = []
    done = score(folder, file, tmp_path / "out.jsonl", shard_size=7, warn=warned.append)
    assert (done.lines, done.errors) == (len(BAD), len(BAD) + 9)
    assert [f["id"] for f in read(tmp_path / "out.jsonl")] == list(range(len(BAD)))
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [e["line"] for e in errors] == [*range(1, 3 * len(BAD), 3), *range(3 * len(BAD) + 1, 3 * len(BAD) + 10)]
    for error, (_, message) in zip(errors, BAD):
        assert error["error"].startswith(message)
    assert errors[-1]["error"] == "not UTF-8: invalid start byte at byte 11"
    assert warned[:20] == [f"{file}, line {e['line']}: {e['error']}" for e in errors[:20]]
    assert len(warned) == 21 and warned[20].startswith(f"{file}: {done.errors - 20} more lines have no scores")
    # Where every line can be scored, nothing is left of the earlier errors.
    score(folder, write(file, good), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()


def test_one_refused_request_costs_only_itself(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    """More candidates than labels is known only to the scorer."""
    folder, s, _ = trained
    items = s.prepared.data.catalogue.item_ids
    rows = [{"candidates": items[: 60 if n == 3 else 3]} for n in range(6)]
    done = score(folder, write(tmp_path / "r.jsonl", rows), out := tmp_path / "out.jsonl", method="labels", shifts=2)
    assert (done.lines, done.errors) == (5, 1) and [f["id"] for f in read(out)] == [1, 2, 3, 5, 6]
    wanted = one_scorer.score(requests_of(s, rows[:1]), "labels", shifts=2)
    np.testing.assert_allclose(read(out)[0]["scores"], wanted[0], rtol=1e-5)
    assert read(tmp_path / "out.jsonl.errors.jsonl")[0]["error"].startswith("60 candidates, and ")


def test_scores_that_are_not_finite(
    trained: Setup, one_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_scorer, "run", lambda p: [np.full(5, np.nan, np.float32)] * len(p.ready))
    done = score(trained[0], write(tmp_path / "r.jsonl", [{}]), tmp_path / "out.jsonl")
    assert (done.lines, done.errors) == (0, 1) and not (tmp_path / "out.jsonl").exists()
    assert read(tmp_path / "out.jsonl.errors.jsonl") == [{"line": 1, "error": "a score is not finite"}]


# --------------------------------------------------------------------------------------------------------------- resuming


def killed(folder: Path, file: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """A command that ends while the second shard is written."""

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        plain = Parts.add

        def add(parts: Parts, scored: list[str], errors: list[str]) -> None:
            if len(parts):
                raise Killed
            plain(parts, scored, errors)

        patch.setattr(Parts, "add", add)
        with pytest.raises(Killed):
            score(folder, file, out, shard_size=4, **how)


def test_a_killed_command_goes_on(
    trained: Setup, one_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, s, _ = trained
    rows = [json.dumps(r) for r in asked(s)]
    rows[1:1] = ["", "bad", ""]
    file, out = write(tmp_path / "requests.jsonl", rows), tmp_path / "out.jsonl"
    score(folder, file, tmp_path / "whole.jsonl", shard_size=4)
    out.write_text("an earlier output")
    killed(folder, file, out, monkeypatch)
    assert out.read_text() == "an earlier output"
    out.unlink()
    killed(folder, file, out, monkeypatch, restart=True)
    assert not out.exists()
    assert {p.name for p in (tmp_path / ".out.jsonl.parts").iterdir()} == {
        "00000.jsonl", "00000.errors.jsonl", "manifest.json", "lock",
    }  # fmt: skip

    scored: list[Ready] = []
    plain = one_scorer.run
    monkeypatch.setattr(one_scorer, "run", lambda p: (scored.extend(p.ready), plain(p))[1])
    said: list[str] = []
    done = score(folder, file, out, shard_size=4, say=said.append)
    assert (done.lines, done.errors, done.requests) == (11, 1, 8) and len(scored) == 8
    assert "continuing after the last complete shard: 4 requests are done (1 shards)" in said
    for name in ("", ".errors.jsonl"):
        assert (tmp_path / f"out.jsonl{name}").read_bytes() == (tmp_path / f"whole.jsonl{name}").read_bytes()
    assert not (tmp_path / ".out.jsonl.parts").exists()


def test_parts_of_another_command_are_refused(
    trained: Setup, one_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, s, _ = trained
    file, out = write(tmp_path / "requests.jsonl", asked(s)), tmp_path / "out.jsonl"
    killed(folder, file, out, monkeypatch)
    with pytest.raises(
        UserError, match=r"k 20 → 3, keep_seen False → True.*\n.*remove .*\.out\.jsonl\.parts, or pass --restart"
    ):
        score(folder, file, out, shard_size=4, count=3, keep_seen=True)
    other = write(tmp_path / "other.jsonl", asked(s, 7))
    with pytest.raises(UserError, match="parts of another command: other requests"):
        score(folder, other, out, shard_size=4)
    manifest = tmp_path / ".out.jsonl.parts/manifest.json"
    kept = manifest.read_text()
    manifest.write_text(kept.replace('"step": 2', '"step": 1'))
    with pytest.raises(UserError, match="step 1 → 2"):
        score(folder, file, out, shard_size=4)
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"damaged.*\n.*--restart"):
        score(folder, file, out, shard_size=4)
    assert not out.exists()
    assert score(folder, other, out, shard_size=4, restart=True).requests == 7
    assert len(read(out)) == 7


def test_one_process_at_a_time(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    file, out = write(tmp_path / "r.jsonl", [{}]), tmp_path / "out.jsonl"
    with Parts.opened(out, {}, False), pytest.raises(UserError, match="another process is writing"):
        score(trained[0], file, out)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_sigkill(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    """A process that is killed while it scores leaves parts, no output, and no lock."""
    folder, s, _ = trained
    file, out = write(tmp_path / "requests.jsonl", asked(s)), tmp_path / "out.jsonl"
    code = (
        "import sys, time; from instructrec_jax import cli; from instructrec_jax.score_parts import Parts\n"
        "add = Parts.add\n"
        "Parts.add = lambda parts, *rows: time.sleep(600) if len(parts) == 2 else add(parts, *rows)\n"
        "cli.main()"
    )
    words = ["score", str(folder), str(file), "--out", str(out), "--shard-size", "3"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        second = tmp_path / ".out.jsonl.parts/00001.jsonl"
        for _ in range(600):
            if second.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None and second.exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0 and "6 requests are done (2 shards)" in result.output
    assert "5 requests in " in result.output and "the device waited for the host" in result.output
    score(folder, file, tmp_path / "whole.jsonl", shard_size=3)
    assert [f["id"] for f in read(out)] == [r["id"] for r in asked(s)]
    for found, whole in zip(read(out), read(tmp_path / "whole.jsonl")):
        np.testing.assert_allclose(found["scores"], whole["scores"], rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- commands


def test_exit_status(trained: Setup, one_scorer: Scorer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["score", str(trained[0]), str(write(tmp_path / "r.jsonl", ["{}", "bad"])), "--out", str(out)]
    result = CliRunner().invoke(cli, [*words, "-k", "2", "--evaluate.batch_size", "8"], catch_exceptions=False)
    assert result.exit_code == 0 and "r.jsonl, line 2: not JSON" in result.stderr
    assert len(read(out)[0]["candidates"]) == 2
    out.unlink()
    write(tmp_path / "r.jsonl", ["bad"])
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 1 and "no line has scores" in result.stderr and not out.exists()
    assert read(tmp_path / "out.jsonl.errors.jsonl")[0]["line"] == 1
    assert CliRunner().invoke(cli, [*words, "--method", "guess"]).exit_code == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"requests": "missing.jsonl"}, "no file of requests"),
        ({"requests": "r.csv"}, "unknown suffix '.csv'"),
        ({"out": "out.txt"}, "unknown suffix '.txt'"),
        ({"out": "r.jsonl"}, "holds the requests"),
        ({"requests": "bad.parquet"}, "not a Parquet file"),
        ({"normalise": "mean"}, "normalise = mean does nothing to items"),
        ({"shifts": 2, "method": "yesno"}, "shifts = 2 does nothing to yesno"),
        ({"method": "likelihod"}, "did you mean 'likelihood'"),
        ({"shard_size": 0}, "at least 1"),
        ({"run_dir": "nowhere"}, "is not a run"),
    ],
)
def test_mistakes_are_named(
    trained: Setup, one_scorer: Scorer, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    write(tmp_path / "r.jsonl", [{}])
    (tmp_path / "bad.parquet").write_text("no")
    given_ = {"run_dir": trained[0], "requests": "r.jsonl", "out": "out.jsonl"} | how
    files = {k: tmp_path / given_.pop(k) for k in ("requests", "out")}
    with pytest.raises(UserError, match=message):
        score(**given_, **files)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_said_at_the_end() -> None:
    text = str(Scored(3, 1, 2_000, 4.0, 0.123, 0.5))
    assert text.startswith("2,000 requests in 4.0 s, 500.0 requests/s; the device waited for the host 12 %")


# ---------------------------------------------------------------------------------------------------------------- reading

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def parse(trained: Setup) -> Callable[[int, Any], Asked | Bad]:
    return Parser(trained[1]).parse


@given(
    st.dictionaries(st.sampled_from(score_input.FIELDS), VALUES) | VALUES | st.dictionaries(st.text(max_size=3), VALUES)
)
def test_any_line_is_understood_or_bad(parse: Callable[[int, Any], Asked | Bad], value: Any) -> None:
    found = parse(5, json.dumps(value).encode())
    assert found.line == 5 and (isinstance(found, Asked) or found.error)


@given(st.binary(max_size=20))
def test_any_bytes_are_understood_or_bad(parse: Callable[[int, Any], Asked | Bad], line: bytes) -> None:
    assert parse(1, line).line == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lines_after_those_that_are_done(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"r.{suffix}", [{"id": f"{n}"} for n in range(2500)])
    whole = list(lines(file))
    assert [n for n, _ in whole] == list(range(1, 2501))
    for skip in (1, 1023, 1024, 1025, 2048, 2500, 2600):
        assert list(lines(file, skip)) == whole[skip:]


def test_a_byte_order_mark_is_no_error(parse: Callable[[int, Any], Asked | Bad]) -> None:
    found = parse(1, b'\xef\xbb\xbf{"id": "a", "wish": null}\r\n')
    assert isinstance(found, Asked) and found.id == "a" and dataclasses.is_dataclass(found.request)


def test_an_item_that_a_wish_names_joins_the_history(trained: Setup, parse: Callable[[int, Any], Asked | Bad]) -> None:
    data = trained[1].prepared.data
    title, user = data.catalogue.titles[5], data.user_ids[0]
    found = parse(1, {"wish": f"something like {title} but sad", "user": user})
    assert isinstance(found, Asked) and found.history[-1] == 5
    known = parse(1, {"user": user})
    assert isinstance(known, Asked) and found.history[:-1].tolist() == known.history.tolist()
    prompt = found.request.prompt
    assert isinstance(prompt, InstructionExample) and prompt.prompt_items[-1] == 5
    assert "sad" in prompt.prompt and title not in prompt.prompt
