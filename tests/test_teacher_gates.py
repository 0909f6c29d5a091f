"""What the teacher's gates let through, how replies are read, and the sheet for a person's grades."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from instructrec_jax.config import TeacherConfig
from instructrec_jax.errors import DataError
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.packs import load_domain
from instructrec_jax.instructions.teacher import answers
from instructrec_jax.instructions.teacher.asks import Ask, Evidences
from instructrec_jax.instructions.teacher.gates import Duplicates, Gates
from instructrec_jax.instructions.teacher.sheet import QUESTIONS, read_grades, write_sheet
from instructrec_jax.instructions.teacher.texts import Taught
from instructrec_jax.instructions.titles import Titles, stem
from tests.fake_endpoint import labels_of
from tests.small_split import small_split
from tests.test_prepare import config_of

# ---------------------------------------------------------------------------------------------------------------- gates


@pytest.fixture(scope="module")
def gates() -> tuple[Gates, Evidences]:
    data = small_split()
    titles = [
        "Matrix, The (1999)", "Heat (1995)", "Godfather, The (1972)", "Godfather: Part II, The (1974)", "Big (1988)", "肖申克的救赎",
        *data.catalogue.titles[6:],
    ]  # fmt: skip
    table = data.catalogue.table.set_column(1, "title", [titles])
    data = dataclasses.replace(data, catalogue=dataclasses.replace(data.catalogue, titles=titles, table=table))
    domain = load_domain("films")
    evidences = Evidences(data, Builder(data, config_of(Path("x")).instructions, domain).words.facets, domain, 20)
    return Gates(evidences, TeacherConfig()), evidences


@pytest.mark.parametrize(
    ("language", "text", "gate"),
    [
        ("en", "Enjoys {label} films from many years.", ""),
        ("en", "Enjoys {seen} and other {label} films.", ""),
        ("en", "Enjoys {label} films such as {unseen}.", "invented"),
        ("en", "Enjoys {label} films such as {target}.", "leak"),
        ("en", "Enjoys “Nobody Made This” and other {label} films.", "invented"),
        ("en", "Enjoys gardening, cooking and long walks.", "grounded"),
        ("en", "Likes {label}.", "length"),
        ("en", "Enjoys {label} films. " * 40, "length"),
        ("en", "喜欢紧张的剧情电影，也喜欢老片和安静的故事。", "language"),
        ("zh", "Enjoys {label} films from many years.", "language"),
        ("zh", "喜欢{zh}电影，偏爱安静而缓慢的故事。", ""),
        ("en", "Enjoys {label} films, write to ann@example.com for more.", "personal"),
        ("en", "I'm sure they enjoy {label} films from many years.", "form"),
        ("en", "The {label} film, The {label} film, The {label} film, The {label} film.", "form"),
    ],
)
def test_gates_on_preferences(gates, language, text, gate):
    judge, evidences = gates
    data, facets = evidences.data, evidences.facets
    user = next(u for u in range(data.num_users) if data.offsets[u + 1] - data.offsets[u] > 8)
    end = int(data.offsets[user]) + 5
    ask = Ask("preference", language, user, end, int(data.item[end]))
    evidence = evidences.of(ask)
    assert evidence is not None
    seen = set(evidence.items)
    unseen = next(i for i in range(20, data.num_items) if i not in seen and i not in evidences.future(ask))
    label = facets.labels[evidence.items[0]][0]
    target = next(i for i in evidences.future(ask) if i >= 6)
    words = {
        "label": label.lower(), "zh": evidences.domain.names["zh"].get(label.lower(), label),
        "seen": stem(facets.titles[next(i for i in seen if i >= 6)]), "unseen": stem(facets.titles[unseen]),
        "target": stem(facets.titles[target]),
    }  # fmt: skip
    found = judge.judge(ask, evidence, text.format(**words))
    assert (found.gate if found else "") == gate, found


@pytest.mark.parametrize(
    ("item", "text", "gate"),
    [
        (2, "something like the godfather, with a family", "leak"),
        (1, "some heat for a cold evening with {label}", "leak"),
        (1, "a {label} for a cold evening", ""),
        (1, "{label} with the mood of The Matrix", "invented"),
        (1, "something green", "grounded"),
        (1, "{label}", "length"),
    ],
)
def test_gates_on_intentions(gates, item, text, gate):
    judge, evidences = gates
    ask = Ask("intention", "en", -1, -1, item)
    evidence = evidences.of(ask)
    assert evidence is not None
    found = judge.judge(ask, evidence, text.format(label=evidences.facets.labels[item][0].lower()))
    assert (found.gate if found else "") == gate, found


def test_titles_are_told_from_words():
    titles = Titles(
        ["Matrix, The (1999)", "Big (1988)", "Game, The (1997)", "Crime (1990)", "霸王别姬", "家"], frozenset({"crime"})
    )
    assert stem("City of Lost Children, The (Cité des enfants perdus, La) (1995)") == "The City of Lost Children"

    def named(text: str) -> list[str]:
        return [words for words, _ in titles.named(text)]

    assert named("They liked The Matrix and the game of chess, in a big way.") == ["The Matrix"]
    assert named('"Big" and Big (1988) and The Game') == ["Big", "Big", "The Game"]
    assert named("Enjoys Matrix films. Big ones. Crime and Crime.") == []
    assert named("喜欢霸王别姬，也喜欢回家，和《家》") == ["霸王别姬", "家"]


def test_near_duplicates():
    found = Duplicates(0.7)
    first = "Enjoys slow dramas of the seventies and quiet comedies about families in small towns by the sea"
    assert found.check(first) is None
    assert found.check(first + ".") is not None
    assert found.check("Goes for loud action films with many explosions, and for heists that go wrong") is None


def test_reading_of_replies():
    read_json = lambda reply: answers.read(reply, "preference", "json")  # noqa: E731
    assert read_json('Sure!\n```json\n{"preference": "Enjoys\nnoise"}\n``` done') == "Enjoys noise."
    bad = {
        "no": "no JSON",
        '{"a": "b"}': "only 'preference'",
        '{"preference": ': "not valid",
        '{"preference": " "}': "empty",
    }
    for reply, why in bad.items():
        with pytest.raises(answers.Unusable, match=why):
            read_json(reply)
    assert answers.read("Answer: “Enjoys noir.”\n\nMore talk", "preference", "text") == "Enjoys noir."
    assert answers.read("One. Two and a ha", "preference", "text", cut=True) == "One."
    assert answers.read("something slow.", "intention", "text") == "something slow"
    with pytest.raises(answers.Unusable, match="longer"):
        answers.read("endless", "preference", "text", cut=True)


# ---------------------------------------------------------------------------------------------------------------- sheet


def test_sheet_and_grades(tmp_path):
    texts = [
        Taught(kind, "en", "u", 1, "=SUM(A1)", str(i), f"Text {i}", f"- Title {i}")
        for i, kind in enumerate(["preference"] * 30 + ["intention"] * 20)
    ]
    file = tmp_path / "sheet.csv"
    assert write_sheet(texts, file, n=20) == 20
    rows = list(csv.reader(file.open(encoding="utf-8-sig", newline="")))
    assert Counter(r[1] for r in rows[2:]) == {"preference": 10, "intention": 10}
    assert all(not cell.startswith(("=", "-")) for r in rows[2:] for cell in r)
    at = rows[0].index("reflects")
    for n, row in enumerate(r for r in rows[2:] if r[1] == "preference"):
        row[at] = "y" if n < 8 else "No"
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows(rows)
    (found,) = read_grades(file)
    assert (found["yes"], found["graded"], found["question"]) == (8, 10, "reflects")
    # Wilson (1927) for 8 of 10, worked out by hand.
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    rows[3][at] = "maybe"
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows(rows)
    with pytest.raises(DataError, match=r"row 4.*reflects.*maybe"):
        read_grades(file)
    assert len(QUESTIONS) == 4


def test_labels_of_a_prompt():
    assert labels_of("- A (1999) (Drama, War), rated 3") == ["War"]
