"""The teacher: what is asked, what it may cost, what survives a kill, what passes the gates."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import Config, TeacherConfig
from instructrec_jax.data.records import Records
from instructrec_jax.errors import ConfigError, DataError, UserError
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.teacher import budget
from instructrec_jax.instructions.teacher.asks import Evidences, asks
from instructrec_jax.instructions.teacher.cache import Cache, Reply, Usage
from instructrec_jax.instructions.teacher.questions import request
from instructrec_jax.instructions.teacher.texts import read, save, verified
from instructrec_jax.teach import teach
from tests.fake_endpoint import endpoint
from tests.small_split import small_split
from tests.test_prepare import config_of, silent, write_folder

KEY = "sk-test-0123456789-secret"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("teacher")
    write_folder(tmp / "data")
    return tmp


@contextmanager
def meter(label: str, expected: int):
    yield lambda note: None


def settings(source: Path, tmp: Path, url: str = "", **teacher: Any) -> Config:
    section = {
        "backend": "openai", "model": "fake", "base_url": url, "api_key_env": "TEACHER_KEY", "backoff": 0.01, "near_duplicate": 0.0,
        "concurrency": 4, **teacher,
    }  # fmt: skip
    config = config_of(source, teacher=section)
    return dataclasses.replace(config, prepared=str(tmp / "prepared"))


def lesson(config: Config, limit: int | None = 12, **how: Any):
    return teach(config, limit=limit, say=silent, meter=meter, **how)


def prompts(server: Any) -> Counter[str]:
    return Counter(body["messages"][0]["content"] for body in server.bodies)


# ------------------------------------------------------------------------------------------------------------- evidence


def test_prompts_hold_no_ids_and_nothing_of_target_and_future():
    data = small_split()
    builder = Builder(data, config_of(Path("x")).instructions, "films")
    evidences = Evidences(data, builder.words.facets, builder.domain, 5)
    wanted = asks(data, builder, ("preference", "intention"))
    assert {a.kind for a in wanted} == {"preference", "intention"}
    for ask in wanted:
        evidence = evidences.of(ask)
        if evidence is None:
            assert ask.kind == "preference" and ask.end == data.offsets[ask.user]
            continue
        text = request(ask, evidence, builder.domain, TeacherConfig()).prompt
        assert not any(name in text for name in (*data.user_ids, *data.catalogue.item_ids))
        shown = {i for i, title in enumerate(data.catalogue.titles) if title in text}
        if ask.kind == "preference":
            assert data.split[ask.end] == 0
            before = data.item[data.offsets[ask.user] : ask.end]
            assert shown == set(before[-5:].tolist())
            assert not shown.intersection(evidences.future(ask))
        else:
            assert shown == {ask.item}


def test_places_are_those_of_the_instructions_each_once_and_the_builder_is_left_as_it_was():
    data = small_split()
    builder = Builder(data, config_of(Path("x")).instructions, "films")
    before = [e.prompt for e in builder.training_examples()]
    first, again = (asks(data, builder, ("preference",), seed=3) for _ in range(2))
    assert first == again and len(set(first)) == len(first)
    assert first != asks(data, builder, ("preference",), seed=4)
    assert before == [e.prompt for e in builder.training_examples()]
    examples = [e for e in builder.training_examples() if e.preference == "P2"]
    assert {a.user for a in first} == {e.user for e in examples}


# ------------------------------------------------------------------------------------------------------------- endpoint


def test_answers_become_texts_that_prepare_uses_with_counts(source, tmp_path):
    with endpoint() as server:
        config = settings(source, tmp_path, server.url)
        outcome = lesson(config, limit=None)
    assert not outcome.refused and not outcome.unanswered
    assert sum(outcome.kept.values()) + outcome.without_evidence == outcome.asked
    assert server.most_under_way <= 4
    assert max(prompts(server).values()) == 1
    file = verified(outcome.folder)
    texts, shown = read(file)
    assert shown == config.teacher.history_items
    said = {t.text for t in texts}

    used = dataclasses.replace(
        config, instructions=dataclasses.replace(config.instructions, teacher=str(outcome.folder))
    )
    prepared = prepare.prepare(used, silent)
    records = Records(prepared.records)
    p2 = [e for e in (records[i] for i in range(len(records))) if e.preference == "P2"]
    assert p2 and any(any(text in e.prompt for text in said) for e in p2)
    words = prepared.manifest["words"]
    assert words["preference: teacher"] > 0 and words["intention: teacher"] > 0
    # Nothing else has changed: the same examples, with other words.
    plain = prepare.prepare(dataclasses.replace(config, name="plain"), silent)
    rules = Records(plain.records)
    assert len(rules) == len(records)
    for i in range(len(rules)):
        assert (rules[i].template, rules[i].user, rules[i].target) == (
            records[i].template, records[i].user, records[i].target,
        )  # fmt: skip
        if rules[i].preference != "P2" and rules[i].intention != "I1":
            assert rules[i] == records[i]
    # The folder stands by itself, and a changed copy is named.
    for path in outcome.folder.iterdir():
        path.unlink()
    assert prepare.load(used).builder(used)
    (prepared.folder / "texts.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"texts\.parquet"):
        prepare.load(used)


def test_texts_of_other_histories_are_not_used(source, tmp_path):
    with endpoint() as server:
        config = settings(source, tmp_path, server.url)
        outcome = lesson(config, limit=None)
    texts, shown = read(outcome.folder / "texts.parquet")
    save([dataclasses.replace(t, content="0" * 32) for t in texts], outcome.folder / "texts.parquet", shown)
    with pytest.raises(DataError, match="sha256"):
        verified(outcome.folder)
    (manifest := outcome.folder / "manifest.json").write_text(
        json.dumps(
            {"texts_sha256": configs.hashlib.sha256((outcome.folder / "texts.parquet").read_bytes()).hexdigest()}
        )
    )
    assert manifest.exists()
    used = dataclasses.replace(
        config, instructions=dataclasses.replace(config.instructions, teacher=str(outcome.folder))
    )
    words = prepare.prepare(used, silent).manifest["words"]
    assert words.get("preference: teacher", 0) == 0 and words["preference: rules"] > 0


@pytest.mark.parametrize(
    "trouble",
    ["status:500 down", "status:429 busy", "limited:0.05", "cut", "not json", "html", "hang:3", "status:408 late"],
)
def test_trouble_is_tried_again(source, tmp_path, trouble):
    with endpoint(lambda number, body: trouble if number in (0, 3) else "good") as server:
        outcome = lesson(settings(source, tmp_path, server.url, timeout=1.0, concurrency=2), limit=6)
    assert sum(outcome.kept.values()) + outcome.without_evidence == 6
    assert len(server.bodies) == sum(outcome.kept.values()) + 2


def test_retry_after_holds_every_worker(source, tmp_path):
    with endpoint(lambda number, body: "limited:1" if number == 0 else "good") as server:
        lesson(settings(source, tmp_path, server.url, concurrency=1), limit=4)
    assert server.times[1] - server.times[0] >= 1.0


def test_a_long_retry_after_ends_the_command_cleanly(source, tmp_path):
    with endpoint(lambda number, body: "limited:7200" if number >= 3 else "good") as server:
        config = settings(source, tmp_path, server.url, concurrency=1)
        outcome = lesson(config)
        assert "7200 s" in outcome.stopped and sum(outcome.kept.values()) == 3
        server.script = lambda number, body: "good"
        again = lesson(config)
    assert sum(again.kept.values()) + again.without_evidence == 12
    assert max(prompts(server).values()) <= 2  # only the one that was turned away


def test_wrong_answers_are_asked_again_with_the_complaint_then_refused(source, tmp_path):
    def script(number: int, body: dict[str, Any]) -> str:
        prompt = body["messages"][0]["content"]
        if "Your last answer was" in prompt:
            return "good"
        return ("say:no idea", 'say:{"taste": "x"}', 'say:{"preference": 3}')[number % 3]

    with endpoint(script) as server:
        config = settings(source, tmp_path, server.url)
        outcome = lesson(config, kinds=("preference",))
        assert outcome.first_refused == {"preference: schema": outcome.asked - outcome.without_evidence}
        assert not outcome.refused and outcome.kept["preference"] == outcome.asked - outcome.without_evidence
        assert any("It cannot be used: it holds no JSON object" in p for p in prompts(server))
        server.script = lambda number, body: "say:still no idea"
        never = lesson(
            settings(source, tmp_path, server.url, repairs=2, seed=9), kinds=("preference",), out=tmp_path / "b"
        )
    assert never.refused == {"preference: schema": never.asked - never.without_evidence} and not never.kept
    rows = [json.loads(line) for line in (tmp_path / "b" / "rejected.jsonl").read_text().splitlines()]
    assert {r["gate"] for r in rows} == {"schema"} and rows[0]["complaint"] == "it holds no JSON object"


def test_an_endpoint_without_a_schema_or_max_tokens_is_asked_in_its_own_way(source, tmp_path):
    def script(number: int, body: dict[str, Any]) -> str:
        if body.get("response_format", {}).get("type") == "json_schema":
            return "status:400 response_format of type json_schema is unknown"
        if "max_tokens" in body:
            return "status:400 use max_completion_tokens instead of max_tokens"
        return "good"

    with endpoint(script) as server:
        outcome = lesson(settings(source, tmp_path, server.url, concurrency=1), limit=4)
    assert sum(outcome.kept.values()) + outcome.without_evidence == 4
    assert server.bodies[-1]["response_format"] == {"type": "json_object"}
    assert server.bodies[-1]["max_completion_tokens"] == 120


@pytest.mark.parametrize("concurrency", [2, 3, 8])
@pytest.mark.parametrize("knows", ["json_object", ""])
def test_workers_that_are_refused_at_one_time_give_up_no_more_than_one_would(source, tmp_path, knows, concurrency):
    def script(number: int, body: dict[str, Any]) -> str:
        if body.get("response_format", {"type": knows})["type"] != knows:
            return "status:400 response_format is not supported"
        return "good"

    with endpoint(script, delay=0.02) as server:  # the first requests are all under way before the first is refused
        outcome = lesson(settings(source, tmp_path, server.url, concurrency=concurrency, retries=0))
    assert sum(outcome.kept.values()) + outcome.without_evidence == 12
    formats = [body.get("response_format", {}).get("type", "") for body in server.bodies]
    assert formats.count("json_schema") == concurrency and formats[-1] == knows
    assert formats.count("json_object") == (sum(outcome.kept.values()) if knows else concurrency)
    assert outcome.spent == f"{120 * sum(outcome.kept.values()):,} tokens"  # being refused is free


def test_a_request_that_is_refused_for_itself_ends_the_command(source, tmp_path):
    with (
        endpoint(lambda number, body: "status:400 the prompt is too long", delay=0.02) as server,
        pytest.raises(UserError, match=r"status 400.*too long"),
    ):
        lesson(settings(source, tmp_path, server.url, concurrency=3))
    assert len(server.bodies) <= 3  # asking again would not help


def test_a_dead_endpoint_ends_the_command(source, tmp_path):
    with (
        endpoint(lambda number, body: "status:503 down") as server,
        pytest.raises(UserError, match=r"no answer to the last 20 requests.*503.*down"),
    ):
        lesson(settings(source, tmp_path, server.url, concurrency=2))
    assert len(server.bodies) <= 22


def test_an_endpoint_that_cannot_be_reached_costs_nothing_and_is_named(source, tmp_path):
    with endpoint() as server:
        url = server.url  # nobody listens there any more
    with pytest.raises(UserError, match="nothing was answered") as error:
        lesson(settings(source, tmp_path, url, retries=1), limit=3)
    assert url in error.value.message and "3 given up" in error.value.message
    assert "connection attempts failed" in error.value.message and "teacher.base_url" in error.value.remedy
    folder = tmp_path / "prepared" / "set-teacher"
    assert Cache(folder).spent() == Usage() and not (folder / "texts.parquet").exists()


def test_requests_that_are_given_up_are_told_beside_the_texts_of_the_others(source, tmp_path):
    with endpoint(lambda number, body: "good" if number < 3 else "status:500 boom") as server:
        outcome = lesson(settings(source, tmp_path, server.url, concurrency=1, retries=1), limit=6)
    lost = outcome.unanswered
    assert sum(outcome.kept.values()) == 3 and lost > 0
    assert f"{lost} requests sent again, {lost} given up; the last error: Error code: 500" in outcome.trouble


# --------------------------------------------------------------------------------------------------------------- secret


def _everything(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def test_the_key_is_sent_and_stands_nowhere(source, tmp_path, capsys, caplog):
    caplog.set_level("DEBUG")
    with endpoint(lambda number, body: f"status:401 Incorrect API key provided: {KEY}") as server:
        config = settings(source, tmp_path, server.url)
        with pytest.raises(UserError, match="401") as error:
            lesson(config)
        assert {k.lower(): v for k, v in server.headers_seen[0].items()}["authorization"] == f"Bearer {KEY}"
        server.script = lambda number, body: "good" if number % 2 else f"status:500 {KEY}"
        lesson(config)
    chain = "".join(map(repr, (error.value, error.value.message, error.value.remedy)))
    seen = chain + caplog.text + "".join(capsys.readouterr()) + configs.dump(config)
    assert KEY not in seen and KEY.encode() not in _everything(tmp_path)
    assert "***" in error.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"api_key_env": KEY}, "not the name of an environment variable"),
        ({"base_url": "http://me:word@localhost/v1"}, "user name or password"),
        ({"base_url": "notaurl"}, "does not begin with http:// or https://"),
        ({"model": ""}, "teacher.model is empty"),
        ({"base_url": "", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"max_money": 1.0}, "both prices are 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_showing_secrets(source, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        lesson(
            settings(
                source, tmp_path, **{"url": "http://localhost:1/v1", **change} if "base_url" not in change else change
            )
        )
    assert KEY not in str(error.value) and "word" not in str(error.value).replace("password", "")


# --------------------------------------------------------------------------------------------------- budget and resuming


def test_the_budget_in_tokens_is_never_exceeded_and_counts_earlier_commands(source, tmp_path):
    with endpoint(delay=0.01) as server:
        config = settings(source, tmp_path, server.url, max_tokens_total=1800)
        for _ in range(2):
            outcome = lesson(config, limit=None)
            assert "the budget is used up" in outcome.stopped and outcome.unanswered > 0
        assert 1800 - 1500 < 120 * len(server.bodies) <= 1800
        prompt = next(iter(prompts(server)))
        room = 120 * len(server.bodies) + budget.most(prompt, 120).total + 500
        more = lesson(settings(source, tmp_path, server.url, max_tokens_total=room), limit=None)
    assert 120 * len(server.bodies) <= room and max(prompts(server).values()) == 1
    assert sum(more.kept.values()) == len(server.bodies) > sum(outcome.kept.values())


def test_a_budget_that_lets_nothing_through_is_an_error_that_recommends_no_texts(source, tmp_path):
    from click.testing import CliRunner

    from instructrec_jax.cli import cli

    with endpoint() as server:
        (tmp_path / "c.yaml").write_text(configs.dump(settings(source, tmp_path, server.url, max_tokens_total=10)))
        done = CliRunner().invoke(cli, ["data", "teach", str(tmp_path / "c.yaml")])
    assert isinstance(done.exception, UserError)
    assert "nothing was kept" in done.exception.message and "the budget is used up" in done.exception.message
    assert "use them" not in done.output and not server.bodies


def test_the_budget_in_money(source, tmp_path):
    prices = {"price_per_million_in": 10.0, "price_per_million_out": 100.0}
    with endpoint() as server:
        outcome = lesson(settings(source, tmp_path, server.url, max_money=0.05, **prices), limit=None)
    spent = len(server.bodies) * (100 * 10 + 20 * 100) / 1e6
    assert 0 < spent <= 0.05 and "budget" in outcome.stopped
    assert json.loads((outcome.folder / "manifest.json").read_text())["money"] == pytest.approx(spent)


def test_a_reply_that_broke_off_is_charged_at_its_most_and_an_error_is_free(source, tmp_path):
    with endpoint(lambda number, body: ("cut", "status:500 x")[number] if number < 2 else "good") as server:
        lesson(settings(source, tmp_path, server.url, concurrency=1), limit=3, kinds=("preference",))
    cache = Cache(tmp_path / "prepared" / "set-teacher")
    lost = budget.most(server.bodies[0]["messages"][0]["content"], 120)
    good = len(server.bodies) - 2
    assert cache.spent() == Usage(100 * good + lost.prompt, 20 * good + lost.answer)


def test_without_usage_the_most_is_charged(source, tmp_path):
    with endpoint(lambda number, body: "no usage") as server:
        lesson(settings(source, tmp_path, server.url), limit=3)
    expected = sum(budget.most(p, 120).total for p in prompts(server))
    assert Cache(tmp_path / "prepared" / "set-teacher").spent().total == expected


def test_killed_and_run_again_pays_nothing_twice(source, tmp_path):
    with endpoint(delay=0.05) as server:
        config = settings(source, tmp_path, server.url, concurrency=2)
        (tmp_path / "c.yaml").write_text(configs.dump(config))
        command = [
            sys.executable,
            "-m",
            "instructrec_jax.cli",
            "data",
            "teach",
            str(tmp_path / "c.yaml"),
            "--limit",
            "40",
        ]
        environment = {**os.environ, "TEACHER_KEY": KEY}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(server.bodies) < 12 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        folder = tmp_path / "prepared" / "set-teacher"
        assert not (folder / "texts.parquet").exists()
        stored = sqlite3.connect(folder / "cache.sqlite").execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        assert stored >= 8
        first = len(server.bodies)
        outcome = lesson(config, limit=40)
        asked = sum(outcome.kept.values())
        assert len(server.bodies) - first == asked - stored
        repeated = [p for p, n in prompts(server).items() if n > 1]
        assert len(repeated) <= 2  # what was under way, and is charged
        before = (folder / "texts.parquet").read_bytes()
        lesson(config, limit=40)
        assert len(server.bodies) - first == asked - stored
    assert (folder / "texts.parquet").read_bytes() == before
    spent = Cache(folder).spent().total
    assert spent >= 120 * (asked + len(repeated))


def test_several_commands_write_together_what_one_would(source, tmp_path):
    def script(
        number: int, body: dict[str, Any]
    ) -> str:  # first answers about War are mended when they are asked for again
        prompt = body["messages"][0]["content"]
        return "good" if "War" not in prompt or "Your last answer was" in prompt else "say:no idea"

    with endpoint(script) as server:
        config = settings(source, tmp_path, server.url)
        both = lesson(config)
        assert both.kept["preference"] and both.kept["intention"] and both.first_refused
        names = ("texts.parquet", "rejected.jsonl")
        before = [(both.folder / name).read_bytes() for name in names]
        for how in ({"limit": 3}, {"limit": 1, "kinds": ("preference",)}, {"limit": 1, "kinds": ("intention",)}):
            again = lesson(config, **how)
            assert [(both.folder / name).read_bytes() for name in names] == before and not again.left_out
            assert again.kept + again.earlier == both.kept and again.kept.total() <= how["limit"]
        # Nor do they leave where the budget stops a larger command before anything is asked again.
        none_left = lesson(settings(source, tmp_path, server.url, max_tokens_total=1), limit=None)
        assert none_left.stopped and none_left.kept == both.kept
        assert (both.folder / "texts.parquet").read_bytes() == before[0]
        lesson(config, out=tmp_path / "b", kinds=("intention",), limit=None)
        lesson(config, out=tmp_path / "b", kinds=("preference",), limit=None)
        whole = lesson(config, limit=None)
        for name in names:
            assert (tmp_path / "b" / name).read_bytes() == (whole.folder / name).read_bytes()
        other = lesson(settings(source, tmp_path, server.url, model="other"), limit=2)
        assert other.left_out == whole.kept.total() - other.kept.total() and not other.earlier
        back = lesson(config, limit=1)
        assert back.kept + back.earlier == whole.kept


def test_two_commands_on_one_folder(source, tmp_path):
    from filelock import FileLock

    (tmp_path / "f").mkdir()
    with FileLock(tmp_path / "f" / ".lock"), pytest.raises(UserError, match="another command works"):
        lesson(settings(source, tmp_path, "http://localhost:1/v1"), out=tmp_path / "f")


def test_cache_forgets_a_user(tmp_path):
    cache = Cache(tmp_path)
    for owner in ("ann-unique-word", "bob", ""):
        cache.put(f"key {owner}", Reply(f"text of {owner or 'nobody'}", Usage(1, 2)), cache.begin(Usage(9, 9)), owner)
    assert cache.forget(["ann-unique-word"]) == 1
    assert cache.get("key ann-unique-word") is None and cache.get("key bob") is not None
    cache.close()
    assert b"ann-unique-word" not in _everything(tmp_path)


def test_rules_as_teacher_need_no_endpoint(source, tmp_path):
    outcome = lesson(settings(source, tmp_path, backend="rules", model=""), limit=None)
    assert outcome.kept["preference"] > 0 and outcome.kept["intention"] > 0 and outcome.spent == "0 tokens"


def test_the_commands_teach_sample_and_grade(source, tmp_path):
    from click.testing import CliRunner

    from instructrec_jax.cli import cli

    config = settings(source, tmp_path, backend="rules", model="")
    (tmp_path / "c.yaml").write_text(configs.dump(config))
    run = CliRunner().invoke
    done = run(cli, ["data", "teach", str(tmp_path / "c.yaml"), "--kinds", "preference", "--teacher.min_words", "5"])
    assert done.exit_code == 0 and "kept" in done.output and "intention" not in done.output
    folder = tmp_path / "prepared" / "set-teacher"
    assert run(cli, ["data", "teach-sample", str(folder), "--n", "3"]).exit_code == 0
    sheet = folder / "grades.csv"
    again = run(cli, ["data", "teach-sample", str(folder)])
    assert isinstance(again.exception, UserError) and "may hold grades" in again.exception.message
    none = run(cli, ["data", "teach-grades", str(sheet)])
    assert isinstance(none.exception, DataError) and "no cell is graded" in none.exception.message
    rows = list(csv.reader(sheet.open(encoding="utf-8-sig", newline="")))
    with sheet.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([*rows[:2], *([*row[:6], "y", "n", "", ""] for row in rows[2:])])
    graded = run(cli, ["data", "teach-grades", str(sheet)])
    assert graded.exit_code == 0 and f"{len(rows) - 2} of {len(rows) - 2}, 100 %" in graded.output
    bad = run(cli, ["data", "teach", str(tmp_path / "c.yaml"), "--kinds", "preferense"])
    assert isinstance(bad.exception, ConfigError) and "did you mean 'preference'" in bad.exception.message
