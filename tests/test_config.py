"""Configs: precedence, every kind of wrong value, round trips, and which settings make another run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import config as configs
from instructrec_jax.config import Config, DataConfig, SplitConfig, TrainConfig
from instructrec_jax.errors import ConfigError

PRESETS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
# YAML's own line breaks beside "\n" are left out: PyYAML folds them into spaces.
LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\x85\u2028\u2029")
TEXT = st.text(LETTERS, max_size=6)
NAME = st.text(LETTERS, min_size=1, max_size=6).filter(lambda n: n not in (".", "..") and not set(n) & set("/\\\0"))


def values_of(kind: Any, name: str = "") -> st.SearchStrategy:
    """Any value that a field of this type may hold."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return any_config(typing.cast(type, kind))
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else values_of(a) for a in args])
    if origin is tuple:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, values_of(args[1]), max_size=2)
    return {
        bool: st.booleans(),
        int: st.integers(-(2**60), 2**60),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: NAME if name == "name" else TEXT,
    }[kind]


def any_config(cls: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: values_of(hints[f.name], f.name) for f in dataclasses.fields(cls)})


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out = []
    for key, value in tree.items():
        inner = isinstance(value, dict) and key != "columns"
        out += leaves(value, f"{prefix}{key}.") if inner else [(prefix + key, value)]
    return out


def set_leaf(config: Config, key: str, value: Any) -> Config:
    tree = configs.to_dict(config)
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[last] = value
    return configs.from_dict(tree)


def changed_value(kind: Any, value: Any) -> Any:
    """Another valid value of a field."""
    if typing.get_origin(kind) is Literal:
        return next(a for a in typing.get_args(kind) if a != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {"rating": "stars"}
    if isinstance(value, list):
        return [*value, *value[:1]] or [1.0 if float in typing.get_args(kind) else "x"]
    if isinstance(value, str):
        return value + "x"
    return 0.25 if value is None else value + 1


def kind_of(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind)[part]
    return kind


LEAVES = [key for key, _ in leaves(configs.to_dict(Config()))]


def yaml_file(folder: Path, text: str) -> Path:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------------------------- precedence


def test_defaults_then_file_then_overrides(tmp_path):
    file = yaml_file(tmp_path, "name: mine\ntrain:\n  steps: 7\n  seed: 3\n")
    config = configs.load(file, ["--train.steps", "9", "--model.dropout=0.5"])
    assert (config.name, config.train.steps, config.train.seed, config.model.dropout) == ("mine", 9, 3, 0.5)
    assert config.train.batch_size == TrainConfig().batch_size
    assert configs.load(file).train.steps == 7


def test_the_last_of_two_overrides_wins(tmp_path):
    assert configs.load(yaml_file(tmp_path, ""), ["--train.steps", "1", "--train.steps=2"]).train.steps == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_is_all_defaults(tmp_path, text):
    assert configs.load(yaml_file(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("words", "get", "expected"),
    [
        (["--train.learning_rate", "1e-3"], lambda c: c.train.learning_rate, 1e-3),
        (["--train.learning_rate=1E-3"], lambda c: c.train.learning_rate, 1e-3),
        (["--train.steps", "1e3"], lambda c: c.train.steps, 1000),
        (["--train.weight_decay", "0"], lambda c: c.train.weight_decay, 0.0),
        (["--mesh.fsdp", "-1"], lambda c: c.mesh.fsdp, -1),
        (["--data.clean.min_rating", "3"], lambda c: c.data.clean.min_rating, 3.0),
        (["--data.clean.min_rating", "null"], lambda c: c.data.clean.min_rating, None),
        (["--model.scan_layers", "false"], lambda c: c.model.scan_layers, False),
        (["--instructions.languages", "[en, zh]"], lambda c: c.instructions.languages, ("en", "zh")),
        (["--instructions.languages", "zh"], lambda c: c.instructions.languages, ("zh",)),
        (["--evaluate.cutoffs", "[1, 10]"], lambda c: c.evaluate.cutoffs, (1, 10)),
        (["--evaluate.baselines", "[]"], lambda c: c.evaluate.baselines, ()),
        (["--evaluate.protocol", "1+9"], lambda c: c.evaluate.protocol, "1+9"),
        (["--data.columns.rating", "stars"], lambda c: c.data.columns, {"rating": "stars"}),
        (["--data.columns.rating", "1"], lambda c: c.data.columns, {"rating": "1"}),
        (["--data.path=a=b"], lambda c: c.data.path, "a=b"),
        (["--data.path="], lambda c: c.data.path, ""),
    ],
)
def test_overrides_are_read_by_the_type_of_their_field(tmp_path, words, get, expected):
    value = get(configs.load(yaml_file(tmp_path, ""), words))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", ["1e3", "007", "no", "2024-01-01", "nan", "1_000", "null", "[a]", "0x10", "a: b"])
def test_a_text_field_keeps_the_text_of_the_command_line(tmp_path, text):
    """YAML would read all of these as something else."""
    config = configs.load(yaml_file(tmp_path, ""), ["--name", text, f"--data.path={text}"])
    assert (config.name, config.data.path) == (text, text)


def test_exponents_in_a_file(tmp_path):
    config = configs.load(yaml_file(tmp_path, "train: {learning_rate: 1e-3, steps: 2e3}\nname: 1e3\n"))
    assert (config.train.learning_rate, config.train.steps, config.name) == (1e-3, 2000, "1e3")


# ------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stpes: 3}", ["train.stpes", "did you mean 'steps'?", "c.yaml"]),
        ("trian: {steps: 3}", ["trian", "did you mean 'train'?"]),
        ("data: {clean: {kcore: 3}}", ["data.clean.kcore", "did you mean 'k_core'?"]),
        ("1: 2", ["unknown key 1", "known keys: name"]),
        ("train: {steps: many}", ["train.steps", "int", "'many'"]),
        ("train: {steps: 1.5}", ["train.steps", "1.5"]),
        ("train: {steps: true}", ["train.steps", "True", "bool"]),
        ("train: {steps: null}", ["train.steps", "None"]),
        ("train: {learning_rate: fast}", ["train.learning_rate", "float", "'fast'"]),
        ("train: {learning_rate: .nan}", ["train.learning_rate", "finite"]),
        ("train: {learning_rate: -.inf}", ["train.learning_rate", "finite"]),
        ("model: {scan_layers: 1}", ["model.scan_layers", "bool"]),
        ("name: [a]", ["name", "str", "['a']"]),
        ("name: yes", ["name", "str", "True"]),
        ("name: ''", ["name = ''"]),
        ("name: ..", ["name = '..'"]),
        ("name: a/b", ["name = 'a/b'"]),
        ("data: {source: embeded}", ["data.source", "did you mean 'embedded'?", "'recbole'"]),
        ("model: {dtype: [float32]}", ["model.dtype", "one of 'float32', 'bfloat16'"]),
        ("evaluate: {cutoffs: [1, ten]}", ["evaluate.cutoffs[1]", "'ten'"]),
        ("data: {columns: rating}", ["data.columns", "mapping"]),
        ("data: {columns: {rating: [a]}}", ["data.columns.rating"]),
        ("train: 3", ["train must be a mapping"]),
        ("train:", ["train must be a mapping"]),
        ("- a", ["holds a list"]),
        ("just words", ["holds a str"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        configs.load(yaml_file(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.steps"], "has no value"),
        (["steps", "3"], "unexpected argument 'steps'"),
        (["--"], "unexpected argument"),
        (["--name.first", "x"], "unknown key|is a value|must be"),
        (["--train.stpes", "3"], "did you mean 'steps'"),
        (["--nothing.like.this", "3"], "unknown key nothing"),
        (["--train.steps", "[1]"], "train.steps must be int"),
    ],
)
def test_wrong_overrides(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(yaml_file(tmp_path, "name: x"), words)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "ml_100k.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean 'ml_100k\.yaml'"):
        configs.load(tmp_path / "ml_10k.yaml")
    with pytest.raises(ConfigError, match="no config file"):
        configs.load(tmp_path / "none" / "x.yaml")
    with pytest.raises(ConfigError, match="no config file"):
        configs.load(tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML"):
        configs.load(file)


# ------------------------------------------------------------------------------------------------------- round trips


@given(any_config(Config))
def test_any_config_survives_dictionaries_and_yaml(tmp_path_factory, config):
    assert configs.from_dict(configs.to_dict(config)) == config
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(configs.dump(config), encoding="utf-8")
    assert configs.load(file) == config


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads_and_survives(preset, tmp_path):
    config = configs.load(preset)
    file = yaml_file(tmp_path, configs.dump(config))
    assert configs.load(file) == config
    assert config.model.heads % config.model.kv_heads == 0
    assert config.train.batch_size % config.train.accumulate == 0
    assert config.train.sequence_length % config.train.logits_chunk == 0
    assert config.train.warmup_steps < config.train.steps


def test_the_presets_are_there_and_named():
    names = [configs.load(p).name for p in PRESETS]
    assert {"ml_latest_small", "ml_100k", "ml_1m", "amazon_games", "amazon_industrial"} <= {p.stem for p in PRESETS}
    assert all(names)


# --------------------------------------------------------------------------------------------------------- run folders


def test_run_dir_is_the_same_for_the_same_settings():
    text = configs.dump(Config())
    code = "from instructrec_jax import config as c; print(c.run_dir(c.Config()), c.Config().data_hash())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [str(configs.run_dir(Config())), Config().data_hash()]
    assert configs.dump(Config()) == text
    same = dataclasses.replace(Config(), data=DataConfig(columns={}, split=SplitConfig(n=1)))
    assert configs.run_dir(same) == configs.run_dir(Config())


def test_the_order_of_columns_does_not_make_another_run():
    one, two = (
        Config(data=DataConfig(columns=c)) for c in ({"rating": "r", "item_id": "i"}, {"item_id": "i", "rating": "r"})
    )
    assert configs.run_dir(one) == configs.run_dir(two) and one.data_hash() == two.data_hash()


@pytest.mark.parametrize("key", LEAVES)
def test_each_setting_makes_another_run_unless_it_only_measures_or_places(key):
    before = dict(leaves(configs.to_dict(Config())))[key]
    other = set_leaf(Config(), key, changed_value(kind_of(key), before))
    section = key.split(".")[0]
    same_run = configs.run_dir(other).name == configs.run_dir(Config()).name
    assert same_run == (section in ("runs", "prepared", "evaluate", "baseline", "mesh", "profile", "teacher"))
    in_data = section in ("data", "instructions") or key in (
        "model.vocab_size",
        "model.content_features",
        "model.cooccurrence_features",
        "model.text_encoder",
        "model.pretrained",  # its tokeniser is copied
    )
    assert (other.data_hash() != Config().data_hash()) == in_data


@dataclasses.dataclass(frozen=True)
class LaterInstructionConfig(configs.InstructionConfig):
    new: int = 0


def test_a_new_setting_with_its_default_changes_no_hash():
    later = Config(instructions=LaterInstructionConfig(search=2.0))
    before = Config(instructions=configs.InstructionConfig(search=2.0))
    assert later.data_hash() == before.data_hash() != Config().data_hash()
    assert configs.run_dir(later) == configs.run_dir(before) != configs.run_dir(Config())
    used = Config(instructions=LaterInstructionConfig(search=2.0, new=1))
    assert used.data_hash() != before.data_hash() and configs.run_dir(used) != configs.run_dir(before)


@pytest.mark.parametrize("section", ["templates", "packs"])
def test_the_words_of_further_files_are_part_of_the_data(tmp_path, section):
    file = tmp_path / "words.yaml"
    config = Config(instructions=dataclasses.replace(Config().instructions, **{section: (str(file),)}))
    hashes = {config.data_hash()}
    for words in ("a", "b"):
        file.write_text(words)
        hashes.add(config.data_hash())
    assert len(hashes) == 3
    file.write_text("a")
    assert config.data_hash() in hashes


@pytest.mark.parametrize("key", [k for k in LEAVES if "." in k])
def test_check_same_run_names_the_changed_key(tmp_path, key):
    (tmp_path / "config.yaml").write_text(configs.dump(Config()), encoding="utf-8")
    configs.check_same_run(Config(), tmp_path)
    before = dict(leaves(configs.to_dict(Config())))[key]
    after = changed_value(kind_of(key), before)
    other = set_leaf(Config(), key, after)
    if key.split(".")[0] in ("evaluate", "baseline", "mesh", "profile", "teacher"):
        configs.check_same_run(other, tmp_path)
        return
    with pytest.raises(ConfigError) as caught:
        configs.check_same_run(other, tmp_path)
    name, change = (f"{key}.rating", "None → 'stars'") if key == "data.columns" else (key, f"{before!r} → {after!r}")
    assert f"{name}: {change}" in str(caught.value)
    assert "--run" in caught.value.remedy


def test_check_same_run_of_a_new_folder(tmp_path):
    configs.check_same_run(Config(), tmp_path)
    configs.check_same_run(Config(), tmp_path / "none")


def test_dropout_has_one_default_from_scratch_and_another_beside_published_weights():
    model = Config().model
    assert (model.residual_dropout, dataclasses.replace(model, pretrained="gpt2").residual_dropout) == (0.3, 0.0)
    assert dataclasses.replace(model, pretrained="gpt2", dropout=0.1).residual_dropout == 0.1
    assert dataclasses.replace(model, dropout=0.0).residual_dropout == 0.0
