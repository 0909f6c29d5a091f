"""Personal data in texts, and user ids that are nobody's name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import CleanConfig
from instructrec_jax.data import sources
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.privacy import Scrubber, luhn, user_keys
from instructrec_jax.errors import ConfigError
from instructrec_jax.evaluation.recommendations import read_recommendations
from tests.datasets import write_csv
from tests.test_forget import NAMES, write_named
from tests.test_prepare import config_of, silent

SECRET = "correct horse battery staple"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to Ann.Lee+x@mail.example.co.uk now", "Write to [e-mail] now"),
        ("pay with 4111 1111 1111 1111, thanks", "pay with [card], thanks"),
        ("pay with 4111-1111-1111-1112, thanks", "pay with 4111-1111-1111-1112, thanks"),  # wrong check digit
        ("call +44 20 7946 0958 or (212) 555-0187", "call [phone] or [phone]"),
        ("call 212-555-0187.", "call [phone]."),
        ("电话13812345678，座机010-12345678", "电话[phone]，座机[phone]"),
        ("Lives at 12 Old Mill Road, Apt 4b.", "Lives at [address]."),
        ("send it to P.O. Box 123", "send it to [address]"),
        ("北京市海淀区中关村大街27号3室有售", "[address]有售"),
        ("ISBN 978-3-16-148410-0, 1995, 10/10, 2,000 pieces", "ISBN 978-3-16-148410-0, 1995, 10/10, 2,000 pieces"),
        ("Windows 95 and 3 x 4 = 12 cm; model 123-456", "Windows 95 and 3 x 4 = 12 cm; model 123-456"),
        ("the 400 Blows, 21 grams of drama", "the 400 Blows, 21 grams of drama"),
        ("user@", "user@"),
    ],
)
def test_patterns(text, expected):
    scrub = Scrubber()
    assert scrub(text) == expected
    assert scrub.counts.total() == expected.count("[")
    assert Scrubber()(expected) == expected


def test_luhn():
    assert luhn("4111111111111111") and luhn("79927398713") and not luhn("79927398710")


@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_scrubbing_is_idempotent_and_counts_its_marks(text):
    scrub = Scrubber()
    once = scrub(text)
    found = scrub.counts.total()
    assert scrub(once) == once and scrub.counts.total() == found
    assert (once == text) == (found == 0)


@given(st.lists(st.one_of(st.none(), st.sampled_from(["a@b.org x", "plain", "", "+49 30 1234567", "1 2 3"]))))
def test_a_column_is_scrubbed_as_its_values_are(values):
    scrub = Scrubber()
    expected = [None if v is None else Scrubber()(v) for v in values]
    assert scrub.column(pa.array(values, pa.string())).to_pylist() == expected


def test_the_cleaning_step_counts_what_it_removed(tmp_path):
    write_named(tmp_path)
    items = [
        (i, f"{i} Jump Street", f"Ask bob{i}@example.com or 212-555-0187", "Drama|call 212-555-0187") for i in range(30)
    ]
    write_csv(tmp_path / "items.csv", ["item_id", "title", "about", "genres"], items)
    raw = sources.read(config_of(tmp_path, data={"path": str(tmp_path)}).data, "x")
    tags = raw.tags
    assert tags is not None
    raw = dataclasses.replace(
        raw, tags=tags.set_column(2, "tag", pa.array(["me@x.org"] + ["slow"] * (tags.num_rows - 1)))
    )
    rules = CleanConfig(k_core=0, min_user_events=1, scrub="patterns")
    out = clean(raw, rules)
    assert out.items["title"].to_pylist() == raw.items["title"].to_pylist()
    assert set(out.items["about"].to_pylist()) == {"Ask [e-mail] or [phone]"}
    assert out.items["genres"].to_pylist()[0] == ["Drama", "call [phone]"]
    assert out.tags is not None and out.tags.num_rows == tags.num_rows - 1
    (step,) = (s for s in out.steps if s.name.startswith("scrub"))
    assert step.detail == "60 phone, 31 e-mail; 1 tags dropped"
    assert not [s for s in clean(raw, dataclasses.replace(rules, scrub="none")).steps if s.name.startswith("scrub")]


def test_presidio_beside_the_patterns():
    pytest.importorskip("presidio_analyzer")
    scrub = Scrubber("presidio")
    assert scrub("Mail ann@example.com, card 4111 1111 1111 1111") == "Mail [e-mail], card [card]"
    assert scrub.counts == {"e-mail": 1, "card": 1} and scrub.engine.startswith("presidio with")


def test_presidio_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"instructrec_jax\[privacy\]"):
        Scrubber("presidio")


# ------------------------------------------------------------------------------------------------------------------ ids


def test_hashes_depend_on_the_secret_and_are_never_the_id(monkeypatch):
    monkeypatch.setenv("IDS", SECRET)
    key = user_keys("IDS")
    monkeypatch.setenv("IDS", SECRET + "!")
    other = user_keys("IDS")
    assert key("42") == key("42") != other("42") and len(key("42")) == 32 and key("42") != key("43")
    assert user_keys("")("42") == "42"
    for value in ("short", ""):
        monkeypatch.setenv("IDS", value)
        with pytest.raises(ConfigError, match=f"holds {len(value)} characters"):
            user_keys("IDS")


def test_prepared_data_hold_no_raw_id_and_files_still_match(tmp_path, monkeypatch):
    monkeypatch.setenv("IDS", SECRET)
    write_named(tmp_path / "data")
    config = config_of(tmp_path, data={"hash_ids": "IDS"})
    prepared = prepare.prepare(config, silent)
    for path in (p for p in prepared.folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert not any(name.encode() in content for name in NAMES), path
        assert SECRET.encode() not in content, path
    assert SECRET not in configs.dump(config)
    key = user_keys("IDS")
    assert sorted(prepared.data.user_ids) == sorted(map(key, NAMES))
    plain = prepare.prepare(config_of(tmp_path, name="plain"), silent).data
    for name in NAMES:  # the same people, with the same histories
        hashed = prepared.data.history(prepared.data.user_ids.index(key(name)))
        assert sorted(hashed.tolist()) == sorted(plain.history(plain.user_ids.index(name)).tolist())
    assert prepared.data.users is not None and prepared.data.users["age"].null_count == 0
    write_csv(tmp_path / "recs.csv", ["user_id", "item_id", "score"], [(n, 1, 0.5) for n in NAMES])
    found = read_recommendations(Path(tmp_path / "recs.csv"), prepared.data, user_key=key)
    assert len(found.user) == len(NAMES) and not found.unknown_users
