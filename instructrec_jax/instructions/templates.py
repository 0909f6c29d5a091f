"""Instruction templates: read from YAML, checked strictly, each error with line and column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.instructions import aspects
from instructrec_jax.instructions.packs import FOLDER, LANGUAGES, WORD_SLOTS, capital

# slot -> what it reads of the data; "" = nothing that needs to be declared
PROMPT_SLOTS = {
    "history": "history",
    "preference": "preference",
    "intention": "",  # declared by target_* below
    "candidates": "candidates",
    "candidates_numbered": "candidates",
    "item": "item",
    "features": "features",
}
ANSWER_SLOTS = ("answer_title", "answer_item", "verdict")
TARGET_READS = ("target_tags", "target_categories", "target_title")  # where the words of an intention come from
READS = ("history", "preference", "features", "candidates", "item", *TARGET_READS)
METRICS = ("next-item", "search")
_SLOT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Template:
    """One wording of an instruction."""

    id: str  # the same in every language
    language: str
    preference: str  # P0, P1, P2
    intention: str  # I0, I1, I2
    task: str  # T0, T2, T3
    prompt: str
    answer: str  # "" = the item itself is the answer, predicted from the last prompt position
    reads: frozenset[str]  # out of READS
    metric: str  # "next-item", or "search" where the prompt reads the target
    held_out: bool = False  # never trained on

    @property
    def aspects(self) -> tuple[str, str, str]:
        """(P, I, T)."""
        return self.preference, self.intention, self.task

    @property
    def reads_target(self) -> bool:
        """Whether words of the prompt come from the target; to show it as a candidate or ask about it is not that."""
        return any(read in self.reads for read in TARGET_READS)

    @property
    def kind(self) -> str:
        """Task family: sequential, search (both answered by an item), describe, rerank or pointwise (by words)."""
        if self.task != "T2":
            return {"T0": "pointwise", "T3": "rerank"}[self.task]
        if self.answer:
            return "describe"
        return "sequential" if self.intention == "I0" else "search"


def load_templates(languages: Sequence[str] = LANGUAGES) -> list[Template]:
    """The built-in templates of the languages, in file order.

    Raises:
        ConfigError: unknown language; anything that ``load_template_file`` finds.
    """
    out: list[Template] = []
    for language in languages:
        if language not in LANGUAGES:
            raise ConfigError(
                f"unknown language {language!r}{did_you_mean(language, LANGUAGES)}",
                remedy=f"instructions.languages holds {', '.join(LANGUAGES)}",
            )
        out.extend(_builtin(language))
    return out


@cache
def _builtin(language: str) -> tuple[Template, ...]:
    return tuple(load_template_file(FOLDER / f"{language}.yaml"))


def load_template_file(path: str | Path) -> list[Template]:
    """Read and check one template file.

    Raises:
        ConfigError: not YAML, unknown key, slot or level, missing aspect, a slot that is not declared in ``reads`` or a
            declared read without its slot, P1 without ``{history}``, words of the target with a metric other than
            "search", a T2 prompt answered by the item whose history is not at its end, two templates of one id. The
            message has the file, line and column, and the nearest known name.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}: line {mark.line + 1}, column {mark.column + 1}" if mark else path.name
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    return _File(path.name, text.splitlines()).templates(root)


class _File:
    """One YAML file with the places of its nodes."""

    def __init__(self, name: str, lines: list[str]):
        self.name, self.lines = name, lines

    def fail(self, node: yaml.Node | None, problem: str, *, find: str = "", remedy: str = "") -> ConfigError:
        """The error at the node, or at the first ``find`` inside it."""
        line, column = (node.start_mark.line, node.start_mark.column) if node else (0, 0)
        if node and find:
            for at in range(line, min(node.end_mark.line + 1, len(self.lines))):
                found = self.lines[at].find(find, column if at == line else 0)
                if found >= 0:
                    line, column = at, found
                    break
        return ConfigError(f"{self.name}: line {line + 1}, column {column + 1}: {problem}", remedy=remedy)

    def mapping(
        self, node: yaml.Node | None, known: Iterable[str], required: Iterable[str], what: str
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping")
        out: dict[str, yaml.Node] = {}
        known = list(known)
        for key, value in node.value:
            if key.value not in known:
                raise self.fail(
                    key,
                    f"unknown key {key.value!r}{did_you_mean(str(key.value), known)}",
                    remedy=f"known keys: {', '.join(known)}",
                )
            if key.value in out:
                raise self.fail(key, f"key {key.value!r} is given twice")
            out[key.value] = value
        if missing := [key for key in required if key not in out]:
            raise self.fail(node, f"{what} lacks {', '.join(missing)}")
        return out

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, f"{what} must be text")
        return str(node.value)

    def words(self, node: yaml.Node, what: str) -> list[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.fail(node, f"{what} must be a list")
        return [(self.text(n, what), n) for n in node.value]

    def templates(self, root: yaml.Node | None) -> list[Template]:
        top = self.mapping(root, ("language", "templates"), ("language", "templates"), "a template file")
        language = self.text(top["language"], "language")
        if language not in LANGUAGES:
            raise self.fail(
                top["language"],
                f"unknown language {language!r}{did_you_mean(language, LANGUAGES)}",
                remedy=f"one of {', '.join(LANGUAGES)}",
            )
        entries = top["templates"]
        if not isinstance(entries, yaml.SequenceNode):
            raise self.fail(entries, "templates must be a list")
        out: dict[str, Template] = {}
        for node in entries.value:
            template, id_node = self.template(node, language)
            if template.id in out:
                raise self.fail(id_node, f"the id {template.id!r} is taken by an earlier template")
            out[template.id] = template
        return list(out.values())

    def template(self, node: yaml.Node, language: str) -> tuple[Template, yaml.Node]:
        required = ("id", "aspects", "reads", "metric", "prompt")
        entry = self.mapping(node, (*required, "answer", "held_out"), required, "a template")
        levels = self.words(entry["aspects"], "aspects")
        if len(levels) != 3:
            raise self.fail(
                entry["aspects"], f"aspects needs 3 levels [P, I, T], not {len(levels)}", remedy="e.g. [P1, I0, T2]"
            )
        for (level, place), (aspect, known) in zip(levels, aspects.LEVELS.items(), strict=True):
            if level not in known:
                raise self.fail(
                    place,
                    f"{level!r} is not a level of {aspect}{did_you_mean(level, known)}",
                    remedy=f"one of {', '.join(known)}",
                )
        preference, intention, task = (level for level, _ in levels)
        if reason := aspects.invalid_reason(preference, intention, task):
            raise self.fail(entry["aspects"], reason)

        reads = self.words(entry["reads"], "reads")
        for read, place in reads:
            if read not in READS:
                raise self.fail(
                    place, f"unknown read {read!r}{did_you_mean(read, READS)}", remedy=f"one of {', '.join(READS)}"
                )
        metric = self.text(entry["metric"], "metric")
        if metric not in METRICS:
            raise self.fail(entry["metric"], f"metric {metric!r} must be one of {', '.join(METRICS)}")
        held_out = self.text(entry["held_out"], "held_out") if "held_out" in entry else "false"
        if held_out not in ("true", "false"):
            raise self.fail(entry["held_out"], f"held_out must be true or false, not {held_out!r}")
        template = Template(
            id=self.text(entry["id"], "id"),
            language=language,
            preference=preference,
            intention=intention,
            task=task,
            prompt=self.text(entry["prompt"], "prompt"),
            answer=self.text(entry["answer"], "answer") if "answer" in entry else "",
            reads=frozenset(read for read, _ in reads),
            metric=metric,
            held_out=held_out == "true",
        )
        self.check(template, entry)
        return template, entry["id"]

    def check(self, template: Template, entry: dict[str, yaml.Node]) -> None:
        """Whether what the template says of itself is true of its text."""
        words = [form for word in WORD_SLOTS[template.language] for form in (word, capital(word))]
        slots = self.slots(entry["prompt"], template.prompt, (*PROMPT_SLOTS, *words))
        answers = self.slots(entry.get("answer", entry["id"]), template.answer, (*ANSWER_SLOTS, *words))
        prompt = entry["prompt"]
        if not template.id:
            raise self.fail(entry["id"], "the id is empty")
        if not template.prompt.strip():
            raise self.fail(prompt, "the prompt is empty")
        for slot in slots:
            if (read := PROMPT_SLOTS.get(slot)) and read not in template.reads:
                raise self.fail(prompt, f"{{{slot}}} is used, but reads does not declare {read!r}", find=f"{{{slot}}}")
        used = {PROMPT_SLOTS.get(slot) for slot in slots}
        if idle := sorted(template.reads - used - set(TARGET_READS)):
            raise self.fail(entry["reads"], f"reads declares {', '.join(idle)}, which the prompt does not use")
        for level, slot in (("P1", "history"), ("P2", "preference")):
            if template.preference == level and slot not in slots:
                raise self.fail(prompt, f"{level} needs {{{slot}}} in the prompt")
        for slot, levels in (("history", ("P1", "P2")), ("preference", ("P2",))):
            if slot in slots and template.preference not in levels:
                raise self.fail(prompt, f"{{{slot}}} does not fit {template.preference}", find=f"{{{slot}}}")

        wished = template.intention != "I0"
        if wished != ("intention" in slots):
            raise self.fail(
                prompt, f"{template.intention} {'needs' if wished else 'does not fit'} {{intention}} in the prompt"
            )
        if wished != template.reads_target:
            raise self.fail(
                entry["reads"],
                f"{template.intention} {'must' if wished else 'must not'} declare what it reads of the target",
                remedy=f"some of {', '.join(TARGET_READS)}",
            )
        if template.metric != ("search" if template.reads_target else "next-item"):
            wanted = "search" if template.reads_target else "next-item"
            raise self.fail(
                entry["metric"],
                f"the prompt {'reads' if wished else 'does not read'} the target, so the metric is {wanted!r}",
            )

        shows_candidates = bool({"candidates", "candidates_numbered"} & set(slots))
        if shows_candidates != (template.task == "T3"):
            raise self.fail(prompt, "T3, and only T3, shows {candidates}")
        if ("item" in slots) != (template.task == "T0"):
            raise self.fail(prompt, "T0, and only T0, asks about {item}")
        if ("verdict" in answers) != (template.task == "T0"):
            raise self.fail(entry.get("answer", entry["id"]), "T0, and only T0, is answered by {verdict}")
        if not template.answer and template.task == "T3":
            raise self.fail(entry["id"], "a T3 template needs an answer", remedy='answer: "{answer_title}"')
        if (
            template.task == "T2"
            and not template.answer
            and "history" in slots
            and not template.prompt.endswith("{history}")
        ):
            raise self.fail(
                prompt,
                "the next item is predicted from the last position, so {history} must be the end of the prompt",
                find="{history}",
            )

    def slots(self, node: yaml.Node, text: str, known: Sequence[str]) -> list[str]:
        names = _SLOT.findall(text)
        for name in names:
            if name not in known:
                raise self.fail(
                    node,
                    f"unknown slot {{{name}}}{did_you_mean(name, known)}",
                    find=f"{{{name}}}",
                    remedy=f"known slots: {', '.join(known)}",
                )
        rest = _SLOT.sub("", text)
        if "{" in rest or "}" in rest:
            raise self.fail(node, "a brace without its partner", find="{" if "{" in rest else "}")
        if len(set(names)) != len(names) and (twice := [n for n in names if names.count(n) > 1 and n in PROMPT_SLOTS]):
            raise self.fail(node, f"{{{twice[0]}}} is used twice", find=f"{{{twice[0]}}}")
        return names
