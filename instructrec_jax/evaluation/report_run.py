"""A run directory as the report reads it: config, training log and evaluations, checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluation.table import EvaluationResult
from instructrec_jax.files import in_bucket

AGAIN = "run `instructrec evaluate RUN_DIR` again"
PARTS = {
    "next_item": "Next item",
    "search": "Search",
    "likelihood": "Likelihood of the text",
    "wordings": "By wording of the instruction",
}  # tables of an evaluation


@dataclass(frozen=True)
class Run:
    """The parts of a run directory, read and checked."""

    folder: str  # name of the run directory
    config: str  # text of config.yaml
    train: list[dict[str, float]]  # log lines with a loss, by step
    valid: list[dict[str, float]]  # validation lines, by step
    unreadable_lines: int  # lines of metrics.jsonl that are not JSON (a run that was killed while it wrote)
    evaluations: list[Evaluation]  # the test split first, and full ranking first in it

    @property
    def name(self) -> str:
        """The config's name of the data set, else the folder's."""
        tree = yaml.safe_load(self.config)
        return str(tree.get("name") or self.folder) if isinstance(tree, dict) else self.folder

    def first(self, key: str) -> Any:
        """A part of the first evaluation that has it, else None."""
        return next((e.tree[key] for e in self.evaluations if e.tree.get(key)), None)


@dataclass(frozen=True)
class Evaluation:
    """One file of ``evaluation/``."""

    file: Path
    tree: dict[str, Any]
    results: dict[str, EvaluationResult]  # by the keys of ``PARTS``: those that are there

    @property
    def protocol(self) -> str:
        """E.g. "full", "1+99"."""
        return str(self.tree["protocol"])

    @property
    def of_set(self) -> str:
        """Of a mixture: the set's name."""
        return str(self.tree.get("set") or "")

    @property
    def split(self) -> str:
        """ "test" or "valid"."""
        return str(self.tree.get("split", "test"))


def read_run(run_dir: Path) -> Run:
    """Read a run directory. Raises as ``write_report`` does."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{run_dir} is not a run directory: it has no config.yaml",
            remedy="give the folder that `instructrec train CONFIG` wrote",
        )
    lines, unreadable = _read_metrics(run_dir / "metrics.jsonl")
    found = [_read_evaluation(file) for file in sorted((run_dir / "evaluation").glob("*.json"))]
    content = config.read_text(encoding="utf-8")
    try:
        yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise DataError(f"not valid YAML: {error}", file=config, remedy="restore the file or train again") from error
    return Run(
        folder=(run_dir if in_bucket(run_dir) else run_dir.resolve()).name,
        config=content,
        train=[line for line in lines if "loss" in line],
        valid=[line for line in lines if any(k.startswith("valid_") for k in line)],
        unreadable_lines=unreadable,
        evaluations=sorted(found, key=lambda e: (e.split != "test", e.protocol != "full", e.protocol)),
    )


def _read_metrics(file: Path) -> tuple[list[dict[str, float]], int]:
    """Lines as numbers by key, ascending in step, and how many lines are not JSON. No file: no lines."""
    if not file.is_file():
        return [], 0
    lines, unreadable = [], 0
    for raw in file.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(raw)
            step = line["step"]
        except (ValueError, KeyError, TypeError):
            unreadable += bool(raw.strip())
            continue
        numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        lines.append(numbers | {"step": int(step)})
    return sorted(lines, key=lambda line: line["step"]), unreadable


def _read_evaluation(file: Path) -> Evaluation:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise DataError(f"not JSON: {error}", file=file, remedy=AGAIN) from error
    if not isinstance(tree, dict) or "protocol" not in tree:
        raise DataError("not an evaluation: it names no protocol", file=file, remedy=AGAIN)
    try:
        results = {key: EvaluationResult.from_json(tree[key]) for key in PARTS if tree.get(key)}
    except (DataError, AttributeError) as error:
        raise DataError(str(getattr(error, "message", error)), file=file, remedy=AGAIN) from error
    return Evaluation(file, tree, results)
