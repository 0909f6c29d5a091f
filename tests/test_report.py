"""The HTML report: what it says, what it escapes, what it does with parts that are not there."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from instructrec_jax import config
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluation import figures, report_text, slices
from instructrec_jax.evaluation.report import write_report
from instructrec_jax.evaluation.table import EvaluationResult, Row

pytest.importorskip("matplotlib")

HOSTILE = """<script>alert(1)</script> & "x" 'y' $\\alpha_ 霸王别姬 #010101 id="k" {{ 7 * 7 }}"""
VOID = {"meta", "link", "br", "img", "input", "hr"}


def result(
    protocol: str = "full", names: tuple[str, ...] = ("model", "ease", "popularity"), gain: float = 0.3
) -> EvaluationResult:
    rng = np.random.default_rng(0)
    user = np.arange(80)
    rows = []
    for i, name in enumerate(names):
        base = rng.random(80) * 0.2 + (gain if i == 0 else 0.0)
        values = {f"{m}@{k}": base for m in ("hr", "ndcg", "mrr") for k in (5, 10)}
        rows.append(Row(name, user, values, lists=rng.integers(0, 30, (80, 10)), baseline=i > 0, seconds_fit=1.5))
    return EvaluationResult.build(rows, np.arange(30), protocol=protocol, data="films", resamples=50)


def evaluation(protocol: str = "full", **parts: object) -> dict[str, object]:
    heat = slices.heat_map(np.linspace(0, 1, 12), np.arange(12), np.arange(12) % 5, buckets=3)
    x, y = slices.lorenz(np.arange(30))
    title = "Brazil (1985)"
    tree: dict[str, object] = {
        "protocol": protocol,
        "split": "test",
        "run": "r",
        "best_step": 100,
        "next_item": result(protocol).to_json(),
        "search": None,
        "likelihood": None,
        "heat_map": {
            "rows": heat.rows,
            "columns": heat.columns,
            "ndcg": [[None if math.isnan(v) else float(v) for v in row] for row in heat.mean],
            "count": heat.count.tolist(),
        },
        "lorenz": {"model": {"x": x.tolist(), "y": y.tolist()}},
        "users": [
            {
                "user_id": "7",
                "history": [f"Film {i}" for i in range(12)],
                "list": [
                    {"title": "Alien", "score": -1.25},
                    {"title": title, "score": -2.0},
                    {"title": title, "score": -3},
                ],
                "truth": title,
                "rank": 3.0,
            }
        ],
        "prompts": [
            {
                "template": "seq.p1.a",
                "task": "sequential",
                "language": "en",
                "tokens": [
                    {"text": "Watched", "kind": "word", "loss": ""},
                    {"text": ":", "kind": "word", "loss": "item"},
                    {"text": "Alien", "kind": "item", "loss": "item"},
                    {"text": "age", "kind": "feature", "loss": ""},
                    {"text": " Yes", "kind": "word", "loss": "text"},
                ],
            }
        ],
        "statistics": {"name": "films", "users": 1234, "density": 0.0405, "first_time": 0, "surprise": 3},
        "steps": [
            {"name": "5-core", "interactions": [1000, 900], "users": [50, 50], "items": [40, 30], "detail": "rounds: 1"}
        ],
    }
    return tree | parts


def make_run(folder: Path, *evaluations: dict[str, object], log: bool = True) -> Path:
    run = folder / "films-1"
    (run / "evaluation").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(config.Config(name="films")), encoding="utf-8")
    for i, tree in enumerate(evaluations):
        (run / "evaluation" / f"{i}.json").write_text(json.dumps(tree), encoding="utf-8")
    if log:
        lines = [
            {"step": s, "loss": 9 - s / 100, "item_loss": 8 - s / 100, "item_loss/search": 7.5}
            for s in range(25, 201, 25)
        ]
        lines += [{"step": s, "valid_ndcg@10": v, "valid_hr@10": 2 * v} for s, v in ((100, 0.0731), (200, 0.06))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects ids and addresses, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(content: str) -> Checker:
    checker = Checker()
    checker.feed(content)
    checker.close()
    assert not checker.open
    return checker


def words(content: str) -> str:
    return " ".join("".join(parsed(content).text).split())


def test_page_is_whole_and_alone(tmp_path):
    search = result("search full", ("model, wish", "bm25"))
    run = make_run(
        tmp_path,
        evaluation(
            search=search.to_json(), likelihood=result("1+9").to_json(), wordings=result("wordings full").to_json()
        ),
        evaluation("1+99 uniform seed 0"),
    )
    content = page(run)
    found = parsed(content)
    assert len(found.ids) == len(set(found.ids))
    assert all(a.startswith("#") and a[1:] in found.ids for a in found.addresses)
    assert not re.search(r"https?:|url\((?!#)|@import", content)
    assert {"script", "iframe", "img", "link", "metadata"}.isdisjoint(found.tags)
    assert found.tags.count("svg") == 2 + 5 + 1  # curves, a dot plot per table, Lorenz
    used = re.findall(r"url\(#([^)]+)\)", content)
    assert used and set(used) <= set(found.ids)
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_page_says_what_was_found(tmp_path):
    content = page(make_run(tmp_path, evaluation()))
    said = words(content)
    table = result()
    found = next(c for c in table.comparisons if c.metric == "ndcg@10")
    assert f"model reaches NDCG@10 {table.row('model').metrics['ndcg@10'].mean:.4f}" in said
    assert (
        f"the best baseline, {found.baseline}, reaches {table.row(found.baseline).metrics['ndcg@10'].mean:.4f}" in said
    )
    assert f"better by +{found.difference:.4f}" in said and "p < 0.001" in said
    assert "1,234" in said and "4.05 %" in said and "1970-01-01" in said and "surprise" in said
    assert "−100" in said and "−10" in said and "rounds: 1" in said
    assert "0.0731 at step 100" in said and "best step 100" in said
    assert "No search table." in said and "--protocol 1+99" in said


@pytest.mark.parametrize(("gain", "phrase"), [(-0.1, "worse by −"), (0.0, "within what chance explains")])
def test_headline_admits_defeat(tmp_path, gain, phrase):
    assert phrase in words(page(make_run(tmp_path, evaluation(next_item=result(gain=gain).to_json()))))


def test_headline_without_a_baseline(tmp_path):
    said = words(page(make_run(tmp_path, evaluation(next_item=result(names=("model",)).to_json()))))
    assert "no baseline was evaluated beside it" in said


def test_loss_mask_and_truth_are_marked(tmp_path):
    content = page(make_run(tmp_path, evaluation()))
    assert 'Watched<span class="token  loss-item">:</span><span class="token item loss-item">Alien</span>' in content
    assert '<span class="token feature">age</span><span class="token  loss-text"> Yes</span>' in content
    cards = content[content.index('<article class="user">') : content.index("</article>")]
    listed = re.findall(r"<li>(.*?)</li>", cards[cards.index("<ol>") : cards.index("</ol>")])
    assert [("<mark>" in entry) for entry in listed] == [
        False,
        False,
        True,
    ]  # the same title twice: the one at the rank
    assert "4 older" in cards


def test_unranked_truth(tmp_path):
    tree = evaluation()
    tree["users"][0] |= {"rank": math.inf, "truth": "Elsewhere"}  # pyright: ignore
    assert "truth not ranked, below this list: Elsewhere" in words(page(make_run(tmp_path, tree)))


def test_text_from_data_is_escaped(tmp_path):
    names = (HOSTILE + "0", HOSTILE + "1")
    table = result(names=names).to_json() | {"data": HOSTILE, "notes": {HOSTILE: [HOSTILE]}}
    tree = evaluation(HOSTILE, next_item=table, search=table, statistics={HOSTILE: HOSTILE, "title_language": HOSTILE})
    tree["lorenz"] = {HOSTILE: tree["lorenz"]["model"]}  # pyright: ignore
    tree["heat_map"]["rows"][0] = tree["heat_map"]["columns"][0] = HOSTILE  # pyright: ignore
    tree["steps"][0] |= {"name": HOSTILE, "detail": HOSTILE}  # pyright: ignore
    titled = {"title": HOSTILE, "score": 1.0}
    tree["users"] = [{"user_id": HOSTILE, "history": [HOSTILE] * 12, "list": [titled], "truth": HOSTILE, "rank": 1}]
    token = [{"text": HOSTILE, "kind": kind, "loss": "text"} for kind in ("word", "item", "feature")]
    tree["prompts"] = [{"template": HOSTILE, "task": HOSTILE, "language": HOSTILE, "tokens": token}]
    run = make_run(tmp_path, tree)
    (run / "config.yaml").write_text(yaml.safe_dump({"name": HOSTILE}), encoding="utf-8")
    content = page(run)
    found = parsed(content)
    assert "script" not in found.tags and "<script" not in content.lower()
    assert len(found.ids) == len(set(found.ids)) and "k" not in found.ids
    text = "".join(found.text)
    assert text.count(HOSTILE) > 40 and "霸王别姬" in content
    assert text.count("#010101") >= text.count(HOSTILE)  # colours of pictures are replaced, words are not
    assert html.escape("霸王别姬 #010101") in content


def test_same_files_same_bytes(tmp_path):
    run = make_run(tmp_path, evaluation())
    first = page(run)
    assert page(run) == first


def test_user_style_does_not_matter(tmp_path):
    import matplotlib

    run = make_run(tmp_path, evaluation())
    first = page(run)
    with matplotlib.rc_context({"font.size": 30, "xtick.major.size": 20, "svg.fonttype": "path"}):
        assert page(run) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_nothing_but_a_config(tmp_path):
    said = words(page(make_run(tmp_path, log=False)))
    assert "This run is not evaluated yet." in said
    assert "instructrec evaluate RUN_DIR --protocol full" in said and "instructrec train CONFIG" in said
    assert "item_id_embedding" in said  # the resolved config


def test_sampled_protocol_alone_asks_for_the_full_one(tmp_path):
    said = words(page(make_run(tmp_path, evaluation("1+9 uniform seed 0"))))
    assert "Candidates: 1+9 uniform seed 0" in said and "The whole catalogue: instructrec evaluate" in said


def test_test_split_and_full_ranking_lead(tmp_path):
    trees = (evaluation("1+9"), evaluation(split="valid"), evaluation())
    said = words(page(make_run(tmp_path, *trees)))
    at = [said.index(t) for t in ("Full ranking checkpoint", "Candidates: 1+9", "Full ranking, valid split")]
    assert at == sorted(at)


def test_cut_off_log_is_counted(tmp_path):
    run = make_run(tmp_path, evaluation())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 225, "lo')
    assert "1 line of metrics.jsonl could not be read" in words(page(run))


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml.*\n.*instructrec train"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"split": "test"}',
        json.dumps({"protocol": "full", "next_item": {"format": 1}}),
        json.dumps({"protocol": "full", "next_item": {"format": 99}}),
        json.dumps({"protocol": "full", "users": [{"user_id": "1"}]}),
        json.dumps(
            {"protocol": "full", "heat_map": {"rows": ["a"], "columns": ["b"], "ndcg": [[1, 2]], "count": [[1]]}}
        ),
    ],
)
def test_malformed_evaluation_names_its_file(tmp_path, content):
    run = make_run(tmp_path)
    (run / "evaluation" / "odd.json").write_text(content)
    with pytest.raises(DataError, match=r"odd\.json(.|\n)*remedy: run `instructrec evaluate"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    with pytest.raises(UserError, match=re.escape("pip install 'instructrec_jax[report]'")):
        write_report(make_run(tmp_path))


def test_long_curves_are_thinned():
    x, y = figures.thin(range(10_001), range(10_001), most=101)
    assert len(x) == 101 and x[-1] == y[-1] == 10_000
    assert np.allclose(np.diff(x[:-1]), 100, atol=1) and np.allclose(x, y)
    short, _ = figures.thin([1, 2], [3, 4])
    assert short.tolist() == [1, 2]


def test_pictures_leave_words_alone():
    name = '#010101 id="k"<b>&$_'
    bars = [figures.Bar(name, 0.5, 0.4, None, True), figures.Bar("line\nbreak\x00", 0.0, 0.0, 0.0, False)]
    svg = figures.dot_plot(bars, label='a "b" <c>', x_label="NDCG", name="dots")
    found = parsed(svg)
    assert name in "".join(found.text) and "line break" in "".join(found.text)
    assert "b" not in found.tags and 'aria-label="a &quot;b&quot; &lt;c&gt;"' in svg
    assert "var(--series-0)" in svg and "font-family" not in svg and "DejaVu" not in svg
    assert not re.search("#0[0-9]0[0-9]0[0-9]", re.sub(r">[^<]*<", "><", svg))
    curve = figures.curves({name: ([1.0], [0.0]), "阿甘": ([1.0, 2.0], [0.0, 0.01])}, label="", name="c", marked=1)
    assert name in "".join(parsed(curve).text) and "阿甘" in curve


def test_numbers_in_words():
    assert report_text.number(0.123, "coverage@10") == "12.3 %" and report_text.number(None, "ndcg@10") == "–"
    assert report_text.rank(7.5) == "7.5" and report_text.rank(1204.0) == "1,204" and report_text.rank(math.inf) == ""
    assert report_text.p_value(0.0001) == "p < 0.001" and report_text.signed(-0.5) == "−0.5000"
    assert dict(report_text.statistics_rows({"first_time": 10**18}))["first event (UTC)"] == f"{10**18:,}"
    assert dict(report_text.statistics_rows({"first_time": None}))["first event (UTC)"] == "–"
