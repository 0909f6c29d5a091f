"""Run configuration: frozen dataclasses, a YAML preset, dotted overrides. The resolved config travels with every run.

Precedence: dataclass default < YAML file < ``--section.key value`` on the command line. A key that does not exist is an error
that names the nearest one. This module imports neither JAX nor anything slow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from instructrec_jax.dotted import built, changed, leaves, parse_options, plain, set_dotted
from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.files import path_of
from instructrec_jax.settings import (
    PROJECTIONS,
    AdapterConfig,
    BaselineConfig,
    CleanConfig,
    DataConfig,
    EvaluateConfig,
    InstructionConfig,
    ItemMemoryConfig,
    MeshConfig,
    ModelConfig,
    ProfileConfig,
    SplitConfig,
    TeacherConfig,
    TrainConfig,
    WishWordsConfig,
)

__all__ = [
    "PROJECTIONS",
    "AdapterConfig",
    "BaselineConfig",
    "CleanConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "InstructionConfig",
    "ItemMemoryConfig",
    "MeshConfig",
    "ModelConfig",
    "ProfileConfig",
    "SplitConfig",
    "TeacherConfig",
    "TrainConfig",
    "WishWordsConfig",
    "check_same_run",
    "dump",
    "from_dict",
    "load",
    "run_dir",
    "to_dict",
    "with_overrides",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything a run needs. ``configs/*.yaml`` hold presets."""

    name: str = "ml-latest-small"
    prepared: str = "prepared"  # folder of prepared data sets
    # Several prepared data sets in one run: config file of each to its share of the examples; 0 = none, its items are there all the same.
    # `data` and `instructions` are then those of the sets' own configs.
    mixture: dict[str, float] = field(default_factory=dict)
    runs: str = "runs"  # folder of runs, or gs://bucket/folder; with several processes one that all of them see
    data: DataConfig = field(default_factory=DataConfig)
    instructions: InstructionConfig = field(default_factory=InstructionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        # A name is one folder: "" or ".." would have commands replace the folder above.
        if self.name in ("", ".", "..") or any(c in self.name for c in "/\\\0"):
            raise ConfigError(
                f"name = {self.name!r} cannot name a folder", remedy="use letters, digits, '-', '_' and '.'"
            )

    @property
    def prepared_dir(self) -> Path:
        """Where ``data prepare`` writes this config's data set."""
        return path_of(self.prepared) / self.name

    def members(self) -> list[Config]:
        """The configs of a mixture's sets, their data in this config's folder of prepared data sets.

        Raises:
            ConfigError: two of one name, a mixture in a mixture, or settings of data or instructions beside it.
        """
        members = [replace(load(path), prepared=self.prepared) for path in self.mixture]
        names = [member.name for member in members]
        if len({*names, self.name}) <= len(names):
            raise ConfigError(f"mixture: names {', '.join([self.name, *names])}", remedy="give each a name of its own")
        if any(member.mixture for member in members):
            raise ConfigError("mixture: one of its sets is a mixture", remedy="list the sets of that one")
        if stray := [*changed(self.data), *changed(self.instructions).keys() - {"seed", "shard_records"}]:
            raise ConfigError(
                f"mixture: {', '.join(stray)} beside it",
                remedy="set what concerns data and instructions in the sets' configs",
            )
        return members

    def member(self, number: int) -> Config:
        """This config with name, data and instructions of a set: how its prompts are made. A config that is no mixture is its own."""
        if not self.mixture:
            return self
        own = self.members()[number]
        # Lists of negatives and taught texts are for training prompts alone, which are written.
        instructions = replace(own.instructions, negatives="uniform", negatives_file="", teacher="")
        return replace(self, name=own.name, mixture={}, data=own.data, instructions=instructions)

    def data_hash(self) -> str:
        """Hash of everything that decides the content of the prepared data."""
        names = ("vocab_size", "content_features", "cooccurrence_features", "text_encoder", "pretrained")
        model = changed(self.model)
        parts = [changed(self.data), changed(self.instructions)]
        parts += [{k: v for k, v in model.items() if k in names}]
        # The words in them decide, not only where they are.
        files = (*self.instructions.templates, *self.instructions.packs, self.instructions.negatives_file)
        parts += [_digest(path) for path in files if path]
        if self.mixture:
            parts += [[member.data_hash(), weight] for member, weight in zip(self.members(), self.mixture.values())]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""  # whoever reads it will say so


def run_dir(config: Config) -> Path:
    """The folder of a config's run: the same settings give the same folder, so the same command resumes."""
    outside = (
        "runs",
        "prepared",
        "evaluate",
        "baseline",
        "mesh",
        "profile",
        "teacher",
    )  # decide nothing of what is learnt
    tree = {k: v for k, v in changed(config).items() if k not in outside}
    if config.mixture:  # a set is what its config says, not where it lies
        tree["mixture"] = [
            [member.data_hash(), weight] for member, weight in zip(config.members(), config.mixture.values())
        ]
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return path_of(config.runs) / f"{config.name}-{digest[:8]}"


def check_same_run(config: Config, folder: Path) -> None:
    """Refuse to continue a run with settings that change what it learns.

    Raises:
        ConfigError: the folder holds a run of other data, instruction, model or training settings; the first ones are named.
    """
    if not (folder / "config.yaml").is_file():
        return
    sections = ("mixture", "data", "instructions", "model", "train")
    before, now = to_dict(load(folder / "config.yaml")), to_dict(config)
    old, new = (leaves({s: tree[s] for s in sections}) for tree in (before, now))
    other = [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in {**new, **old} if old.get(key) != new.get(key)]
    if other:
        raise ConfigError(
            f"{folder} is a run with other settings: {'; '.join(other[:4])}",
            remedy="give another --run folder, or remove this one",
        )


# ------------------------------------------------------------------------------------------------- loading and saving


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML preset and apply ``("--train.steps", "400", "--train.seed=1", ...)``.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type.
    """
    path = path_of(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise ConfigError(f"no config file {path}{near}", remedy="see configs/ for presets")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of sections")
    return from_dict(with_overrides(tree, overrides), where=str(path))


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The nested dictionary with dotted options applied (in place)."""
    for key, value in parse_options(Config, overrides).items():
        set_dotted(tree, key, value)
    return tree


def from_dict(tree: dict[str, Any], *, where: str = "config") -> Config:
    """Build a ``Config`` from nested dictionaries, checking every key and type."""
    return built(Config, tree, where)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dictionaries; ``from_dict(to_dict(c)) == c``."""
    return plain(config)


def dump(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
