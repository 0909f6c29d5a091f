"""Template files: read from YAML and checked strictly, every problem with its line and column."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml

from instructrec_jax.errors import did_you_mean, nearest
from instructrec_jax.instructions import aspects
from instructrec_jax.instructions.packs import LANGUAGES, WORD_SLOTS, capital
from instructrec_jax.instructions.template import (
    ANSWER_SLOTS,
    GIVEN_AWAY,
    METRICS,
    PROMPT_SLOTS,
    READS,
    SLOT,
    TARGET_WORDS,
    WIDENINGS,
    Template,
)
from instructrec_jax.instructions.yaml_file import YamlFile

MOST_WORDS = 90  # of a wording, without what fills its slots; a Chinese character is half a word
_ID = re.compile(r"[\w.-]+")  # an id is a name in options and tables
_REQUIRED = ("id", "aspects", "reads", "metric", "prompt")


def load_template_file(path: str | Path, taken: Iterable[Template] = ()) -> list[Template]:
    """Read and check one template file.

    Args:
        path: the file.
        taken: templates that are there already; their ids (per language) are not free.

    Raises:
        ConfigError: see ``check_template_file``; the message holds every problem with file, line and column.
    """
    file = YamlFile(path)
    templates = check_template_file(file, taken)
    file.check()
    return templates


def check_template_file(file: YamlFile, taken: Iterable[Template] = ()) -> list[Template]:
    """The templates of a file; what is wrong is added to ``file.problems``.

    A problem is: not YAML; no template; an unknown key, slot, level, read or language; a missing aspect; a slot that is not
    declared in ``reads`` or a declared read without its slot; P1 without a history, P2 without a preference, I1 or I2 without
    a wish; words of the target in the prompt with a metric other than "search"; the target itself in the prompt of anything
    but a widening; a widening with a metric, or with an answer that its prompt has already said; a T2 prompt answered by the
    item whose history is not at its end; more than ``MOST_WORDS`` words; an id that is taken, or has other signs than
    letters, digits, ".", "_" and "-".
    """
    if file.root is None:
        return []
    top = file.mapping(file.root, ("language", "templates"), ("language", "templates"), "a template file")
    if top is None:
        return []
    language = file.one_of(top["language"], "language", LANGUAGES)
    entries = file.entries(top["templates"], "templates")
    if isinstance(top["templates"], yaml.SequenceNode) and not entries:
        file.note(top["templates"], "the file holds no template")
    if language not in LANGUAGES:  # which words are slots depends on it
        return []
    ids = {t.id for t in taken if t.language == language}
    out: list[Template] = []
    for node in entries:
        if (template := _template(file, node, language, ids)) is not None:
            ids.add(template.id)
            out.append(template)
    return out


def words_of(text: str) -> float:
    """Length of a wording in words, its slots left out; a Chinese character counts as half a word."""
    plain = SLOT.sub(" ", text)
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in plain)
    return len("".join(" " if "\u4e00" <= c <= "\u9fff" else c for c in plain).split()) + chinese / 2


def _template(file: YamlFile, node: yaml.Node, language: str, taken: Collection[str]) -> Template | None:
    entry = file.mapping(node, (*_REQUIRED, "answer", "held_out", "widening"), _REQUIRED, "a template")
    if entry is None:
        return None
    levels = _levels(file, entry["aspects"])
    reads = [file.one_of(n, "read", READS) for n in file.entries(entry["reads"], "reads")]
    held_out = file.one_of(entry["held_out"], "held_out", ("true", "false")) if "held_out" in entry else "false"
    widening = file.one_of(entry["widening"], "widening", WIDENINGS) if "widening" in entry else ""
    metric = file.one_of(entry["metric"], "metric", METRICS)
    name = file.text(entry["id"], "id")
    if not name:
        file.note(entry["id"], "the id is empty")
    elif not _ID.fullmatch(name):
        file.note(entry["id"], f"the id {name!r} holds more than letters, digits, '.', '_' and '-'")
    elif name in taken:
        file.note(entry["id"], f"the id {name!r} is taken by an earlier template")
    if levels is None:
        return None
    template = Template(
        id=name,
        language=language,
        preference=levels[0],
        intention=levels[1],
        task=levels[2],
        # YAML's ``>`` and ``|`` end a text with a line break that nobody means.
        prompt=file.text(entry["prompt"], "prompt").rstrip(),
        answer=file.text(entry["answer"], "answer").rstrip() if "answer" in entry else "",
        reads=frozenset(reads),
        metric=metric,
        held_out=held_out == "true",
        widening=widening,
        place=(entry["prompt"].start_mark.line + 1, entry["prompt"].start_mark.column + 1),
    )
    _Check(file, entry, template).all()
    return template


def _levels(file: YamlFile, node: yaml.Node) -> tuple[str, str, str] | None:
    places = file.entries(node, "aspects")
    if len(places) != 3:
        file.note(node, f"aspects needs 3 levels [P, I, T], not {len(places)}", remedy="e.g. [P1, I0, T2]")
        return None
    preference, intention, task = (
        file.one_of(place, f"level of {aspect}", known)
        for place, (aspect, known) in zip(places, aspects.LEVELS.items(), strict=True)
    )
    if any(level not in known for level, known in zip((preference, intention, task), aspects.LEVELS.values())):
        return None
    if reason := aspects.invalid_reason(preference, intention, task):
        file.note(node, reason)
        return None
    return preference, intention, task


class _Check:
    """Whether what a template says of itself is true of its text."""

    def __init__(self, file: YamlFile, entry: dict[str, yaml.Node], template: Template):
        self.file, self.entry, self.template = file, entry, template
        words = [form for word in WORD_SLOTS[template.language] for form in (word, capital(word))]
        self.prompt = entry["prompt"]
        self.answer = entry.get("answer", entry["id"])
        self.slots, self.meant = self._slots(self.prompt, template.prompt, (*PROMPT_SLOTS, *words))
        self.answers, self.meant_answers = self._slots(self.answer, template.answer, (*ANSWER_SLOTS, *words))

    def all(self) -> None:
        """Note every problem."""
        for node, text in ((self.prompt, self.template.prompt), (self.answer, self.template.answer)):
            if (length := words_of(text)) > MOST_WORDS:
                self.file.note(node, f"over-long: {length:.0f} words, at most {MOST_WORDS}")
        if not self.template.prompt.strip():
            self.file.note(self.prompt, "the prompt is empty")
        self._reads()
        self._preference()
        self._intention()
        self._task()
        self._widening()

    def _slots(self, node: yaml.Node, text: str, known: Collection[str]) -> tuple[list[str], set[str]]:
        """The slots of a text as they are, and with the nearest known ones for those that are misspelt."""
        names = SLOT.findall(text)
        for name in dict.fromkeys(names):
            if name not in known:
                self.file.note(
                    node,
                    f"unknown slot {{{name}}}{did_you_mean(name, known)}",
                    find=f"{{{name}}}",
                    remedy=f"known slots: {', '.join(known)}",
                )
        rest = SLOT.sub("", text)
        if "{" in rest or "}" in rest:
            self.file.note(node, "a brace without its partner", find="{" if "{" in rest else "}")
        for name in dict.fromkeys(n for n in names if names.count(n) > 1 and n in PROMPT_SLOTS):
            self.file.note(node, f"{{{name}}} is used twice", find=f"{{{name}}}")
        return names, {name if name in known else nearest(name, known) for name in names}

    def _shown(self, wanted: bool) -> tuple[Collection[str], Collection[str]]:
        """The slots of the prompt and of the answer: a misspelt one, told as such, is neither missed where it is ``wanted``
        nor found where it is not."""
        return (self.meant, self.meant_answers) if wanted else (self.slots, self.answers)

    def _reads(self) -> None:
        template = self.template
        for slot in dict.fromkeys(self.slots):
            if (read := PROMPT_SLOTS.get(slot)) and read not in template.reads:
                self.file.note(
                    self.prompt, f"{{{slot}}} is used, but reads does not declare {read!r}", find=f"{{{slot}}}"
                )
        used = {PROMPT_SLOTS.get(slot) for slot in self.meant}
        if idle := sorted((template.reads & set(READS)) - used - set(TARGET_WORDS)):
            self.file.note(self.entry["reads"], f"reads declares {', '.join(idle)}, which the prompt does not use")

    def _preference(self) -> None:
        template = self.template
        for level, slot, said in (("P1", "history", "history_titles"), ("P2", "preference", "preference")):
            shown = slot in self.meant or (bool(template.widening) and said in self.meant_answers)
            if template.preference == level and not shown:
                self.file.note(self.prompt, f"{level} needs {{{slot}}} in the prompt")
        for slot, levels in (("history", ("P1", "P2")), ("preference", ("P2",))):
            if slot in self.slots and template.preference not in levels:
                self.file.note(self.prompt, f"{{{slot}}} does not fit {template.preference}", find=f"{{{slot}}}")

    def _intention(self) -> None:
        template = self.template
        wished = template.intention != "I0"
        slots, answers = self._shown(wished)
        if wished != ("intention" in slots or (bool(template.widening) and "intention" in answers)):
            self.file.note(
                self.prompt, f"{template.intention} {'needs' if wished else 'does not fit'} {{intention}} in the prompt"
            )
        declared = bool(template.reads & set(TARGET_WORDS))
        in_prompt = "intention" in self._shown(declared)[0]
        if in_prompt != declared:
            self.file.note(
                self.entry["reads"],
                f"{template.intention} {'must' if in_prompt else 'must not'} declare what it reads of the target",
                remedy=f"some of {', '.join(TARGET_WORDS)}" if in_prompt else "",
            )

    def _task(self) -> None:
        template = self.template
        for task, ways, said in (
            ("T3", ({"candidates"}, {"candidates_numbered"}), "shows {candidates}"),
            ("T1", ({"first", "second"},), "shows {first} and {second}"),
            ("T0", ({"item"},), "asks about {item}"),
        ):
            wanted = template.task == task
            slots = self._shown(wanted)[0]
            # One half of a pair is as wrong elsewhere as both.
            shown = any(way.issubset(slots) if wanted else not way.isdisjoint(slots) for way in ways)
            if shown != wanted:
                self.file.note(self.prompt, f"{task}, and only {task}, {said}")
        if ("verdict" in self._shown(template.task == "T0")[1]) != (template.task == "T0"):
            self.file.note(self.answer, "T0, and only T0, is answered by {verdict}")
        if template.task in ("T1", "T3") and not template.answer:
            self.file.note(
                self.entry["id"], f"a {template.task} template needs an answer", remedy='answer: "{answer_title}"'
            )
        item_follows = template.task == "T2" and not template.answer
        if item_follows and "history" in self.slots and not template.prompt.endswith("{history}"):
            self.file.note(
                self.prompt,
                "the next item is predicted from the last position, so {history} must be the end of the prompt",
                find="{history}",
            )

    def _widening(self) -> None:
        template = self.template
        if template.widening:
            wanted, why = "none", f"{template.widening} is for training only"
            if template.task != "T2" or not template.answer:
                self.file.note(self.entry["aspects"], "a widening is a T2 with an answer in words")
        elif template.reads_target:
            wanted, why = "search", "the prompt reads the target"
        else:
            wanted, why = "next-item", "the prompt does not read the target"
        if template.metric != wanted:
            self.file.note(self.entry["metric"], f"{why}, so the metric is {wanted!r}")
        if template.widening:
            self._given_away()
            return
        if "chosen" in self.slots:
            self.file.note(
                self.prompt, "a leak: {chosen} is the target, which only a widening may show", find="{chosen}"
            )
        for slot in ("intention", "preference", "history_titles"):
            if slot in self.answers:
                self.file.note(self.answer, f"only a widening is answered by {{{slot}}}", find=f"{{{slot}}}")

    def _given_away(self) -> None:
        """A widening may show the target and answer by it, but not both: to repeat the prompt teaches nothing."""
        for shown in dict.fromkeys(self.slots):
            for slot in GIVEN_AWAY.get(shown, ()):
                if slot in self.answers:
                    self.file.note(
                        self.answer,
                        f"a leak: {{{slot}}} repeats what the prompt says by {{{shown}}}",
                        find=f"{{{slot}}}",
                    )
