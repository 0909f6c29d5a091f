"""A YAML file whose every node has its place, and the list of what is wrong in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

from instructrec_jax.errors import ConfigError, did_you_mean


class Problem(NamedTuple):
    """One thing that is wrong; ``line`` and ``column`` are 1-based, 0 = the file as a whole."""

    file: str
    line: int
    column: int
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.file}: line {self.line}, column {self.column}" if self.line else self.file
        return f"{where}: {self.text}" + (f"\n  remedy: {self.remedy}" if self.remedy else "")


class YamlFile:
    """A file read for checking: reading goes on after a problem, so that ``problems`` holds all of them.

    ``root`` is None where the file cannot be read or parsed; that is a problem too.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.problems: list[Problem] = []
        self.root: yaml.Node | None = None
        self._lines: list[str] = []
        try:
            text = self.path.read_text("utf-8")
            self._lines = text.splitlines()
            self.root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(Problem(str(path), 0, 0, f"cannot be read: {error}"))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
            what = f"not YAML: {getattr(error, 'problem', None) or error}"
            self.problems.append(Problem(str(self.path), line, column, what))
        else:
            if self.root is None:
                self.problems.append(Problem(str(self.path), 1, 1, "the file is empty; it must be a mapping"))

    def keys(self) -> set[str]:
        """The keys of the file's top mapping; none where it is no mapping."""
        return {str(key.value) for key, _ in self.root.value} if isinstance(self.root, yaml.MappingNode) else set()

    def note(self, node: yaml.Node, problem: str, *, find: str = "", remedy: str = "") -> None:
        """Add a problem at the node, or at the first ``find`` inside it."""
        line, column = node.start_mark.line, node.start_mark.column
        if find:
            for at in range(line, min(node.end_mark.line + 1, len(self._lines))):
                found = self._lines[at].find(find, column if at == line else 0)
                if found >= 0:
                    line, column = at, found
                    break
        self.problems.append(Problem(str(self.path), line + 1, column + 1, problem, remedy))

    def mapping(
        self, node: yaml.Node, known: Iterable[str], required: Iterable[str], what: str
    ) -> dict[str, yaml.Node] | None:
        """The known keys of a mapping with their values; None if the node is none, or lacks a required key.

        ``known`` empty = any key.
        """
        if not isinstance(node, yaml.MappingNode):
            self.note(node, f"{what} must be a mapping")
            return None
        out: dict[str, yaml.Node] = {}
        known = list(known)
        for key, value in node.value:
            name = str(key.value)
            if known and name not in known:
                self.note(
                    key, f"unknown key {name!r}{did_you_mean(name, known)}", remedy=f"known keys: {', '.join(known)}"
                )
            elif name in out:
                self.note(key, f"key {name!r} is given twice")
            else:
                out[name] = value
        if missing := [key for key in required if key not in out]:
            self.note(node, f"{what} lacks {', '.join(missing)}")
            return None
        return out

    def text(self, node: yaml.Node, what: str) -> str:
        """A scalar as text; empty if the node is none."""
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        self.note(node, f"{what} must be text")
        return ""

    def one_of(self, node: yaml.Node, what: str, known: Iterable[str]) -> str:
        """A scalar out of ``known``; the text as it is if it is none of them."""
        text, known = self.text(node, what), list(known)
        if text not in known:
            self.note(node, f"unknown {what} {text!r}{did_you_mean(text, known)}", remedy=f"one of {', '.join(known)}")
        return text

    def entries(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        """The nodes of a list."""
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        self.note(node, f"{what} must be a list")
        return []

    def check(self) -> None:
        """Raises ConfigError with every problem, in the file's order."""
        if self.problems:
            raise ConfigError("\n".join(str(p) for p in sorted(self.problems, key=lambda p: (p.line, p.column))))
