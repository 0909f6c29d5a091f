"""Nothing of the target, of later events or of ids is in a prompt, beyond what its template declares."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import chisquare

from instructrec_jax.config import InstructionConfig
from instructrec_jax.data.schema import TEST, TRAIN, VALID, Catalogue
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import Feature
from instructrec_jax.instructions.render import ANSWERED_TITLES
from instructrec_jax.instructions.template import GIVEN_AWAY, SLOT, TARGET_WORDS
from instructrec_jax.instructions.templates import load_templates
from tests.small_split import small_split

CONFIG = InstructionConfig(
    languages=("en", "zh"),
    history_items=8,
    short_history_items=5,
    candidates=6,
    search=4,
    rerank=4,
    pointwise=2,
    describe=2,
    profile=2,
    rerank_more=2,
    pointwise_more=2,
    describe_more=2,
    pairwise=4,
    turn_around=2,
    relatedness=2,
    reasoning=2,
)
ONLY = {"search": 0, "rerank": 0, "pointwise": 0, "describe": 0, "profile": 0}
TEMPLATES = load_templates()
FEATURES = (Feature(0, 1.0), Feature(1, -0.5))


def replaced(data, user, end, shift):
    """The data with the user's events from ``end`` on replaced by other items."""
    item, stop = data.item.copy(), data.offsets[user + 1]
    item[end:stop] = (item[end:stop] + shift) % data.num_items
    return replace(data, item=item)


def prompt(builder, template, user, end, **fixed):
    target = int(builder.data.item[end])
    slots = builder.slots(template, user, end, target, features=FEATURES, **fixed)
    return slots and builder.example(template, slots, user=user, target=target, about_user=True)


@cache
def pairs(items_as):
    """(user, event, builder, builder without the target and the future), with events of every split."""
    data = small_split()
    out = []
    for user in range(data.num_users):
        start, stop = int(data.offsets[user]), int(data.offsets[user + 1])
        for end in range(start + 1, stop, 3):
            other = replaced(data, user, end, 1 + end % 7)
            out.append((user, end, *(Builder(d, CONFIG, "films", items_as=items_as) for d in (data, other))))
    assert {int(data.split[end]) for _, end, *_ in out} == {TRAIN, VALID, TEST}
    return out


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: f"{t.language}-{t.id}")
@pytest.mark.parametrize("items_as", ["token", "title", "both"])
def test_target_and_future_do_not_show(template, items_as):
    """Nothing of the prompt changes outside the slots that are declared; what is declared is really read."""
    fixed: dict = {}
    declared = set()  # what the template says that it reads of the target
    if template.reads & set(TARGET_WORDS):
        fixed["wish"] = "declared words"
        declared.add("wish")
    if template.reads & {"candidates", "pair"}:
        fixed["candidates"] = (3, 1, 4) if template.task == "T3" else (3, 1)
    if template.reads & {"item", "target_item"}:
        fixed["item"] = 5
    if "target_item" in template.reads:
        declared.add("item")
    changed, compared = dict.fromkeys(declared, 0), 0
    for user, end, one, other in pairs(items_as):
        a, b = (prompt(x, template, user, end, **fixed) for x in (one, other))
        assert a is not None and b is not None
        assert (a.prompt, a.prompt_items, a.features) == (b.prompt, b.prompt_items, b.features)
        compared += 1
        for name in declared:
            shown = {k: v for k, v in fixed.items() if k != name}
            a, b = (prompt(x, template, user, end, **shown) for x in (one, other))
            changed[name] += (
                a is not None and b is not None and (a.prompt, a.prompt_items) != (b.prompt, b.prompt_items)
            )
    assert compared > 20
    assert all(changed.values()) and bool(declared) == template.reads_target


WIDENINGS = [t for t in TEMPLATES if t.widening]


@pytest.mark.parametrize("template", WIDENINGS, ids=lambda t: f"{t.language}-{t.id}")
def test_no_widening_answers_with_what_its_prompt_says(template):
    """By its slots and, where items stand as titles, by its text: no sentence and no title of the answer is in the prompt."""
    shown = set(SLOT.findall(template.prompt))
    assert not {slot for name in shown & set(GIVEN_AWAY) for slot in GIVEN_AWAY[name]} & template.answered_by
    compared = 0
    for user, end, builder, _ in pairs("title"):
        target = int(builder.data.item[end])
        slots = builder.slots(template, user, end, target)
        if slots is None:
            continue
        made = builder.example(template, slots, user=user, target=target)
        fills = {
            "intention": [slots.intention],
            "preference": [slots.preference],
            "answer_title": [builder.titles[target]],
            "history_titles": [builder.titles[i] for i in slots.history[-ANSWERED_TITLES:]],
        }
        for slot in template.answered_by & set(fills):
            assert not any(fill in made.prompt for fill in fills[slot])
            compared += 1
    assert compared


@pytest.mark.parametrize("items_as", ["token", "title", "both"])
def test_training_reads_training_events_only(items_as):
    data = small_split(users=20)
    item = data.item.copy()
    held = data.split != TRAIN
    item[held] = (item[held] + 11) % data.num_items
    rating = np.where(held, 5.0, data.rating)
    other = replace(data, item=item, rating=rating)
    a, b = (list(Builder(d, CONFIG, "films", items_as=items_as).training_examples()) for d in (data, other))
    assert a == b
    assert {e.metric for e in a} == {"next-item", "search", "none"}
    for example in a:
        train = set(data.history(example.user).tolist())
        assert example.target == -1 or example.target in train
        if example.task == "T2":
            assert set(example.prompt_items) <= train


def test_item_slots_come_before_the_target():
    data = small_split(users=20)
    for example in Builder(data, CONFIG, "films").training_examples():
        if example.target < 0 or example.preference != "P1":
            continue
        events = data.history(example.user).tolist()
        before = events[: events.index(example.target)]  # items do not repeat in this data
        shown = [i for i in example.prompt_items if i not in example.candidates]
        assert set(shown) <= set(before)
        if example.task == "T2":
            assert shown == before[-CONFIG.short_history_items :]


@pytest.mark.parametrize("split", [VALID, TEST])
def test_evaluation_does_not_see_its_answer(split):
    data = small_split()
    cases = data.cases(split)
    for user, end in zip(cases.user.tolist(), cases.end.tolist()):
        a, b = (Builder(d, CONFIG, "films") for d in (data, replaced(data, user, end, 3)))
        for kind in ("sequential", "describe", "taste", "cold"):
            one, other = a.evaluation_prompt(kind, user, end), b.evaluation_prompt(kind, user, end)
            assert (one.prompt, one.prompt_items) == (other.prompt, other.prompt_items)
            assert one.target != other.target


@pytest.mark.parametrize("items_as", ["token", "both"])
def test_no_ids_in_the_text_and_none_behind_it(items_as):
    data = small_split(users=20)
    catalogue = data.catalogue
    relabelled = replace(
        data,
        user_ids=[f"other{u}" for u in range(data.num_users)],
        catalogue=replace(catalogue, item_ids=catalogue.item_ids[::-1]),
    )
    a, b = (list(Builder(d, CONFIG, "films", items_as=items_as).training_examples()) for d in (data, relabelled))
    assert a == b
    for example in a:
        text = example.prompt + example.answer
        assert not any(i in text for i in (*data.user_ids, *catalogue.item_ids))


def test_order_of_the_catalogue_does_not_show():
    """Shuffled rows: the same texts, and the same items under new numbers (but candidates, drawn by number)."""
    data = small_split(users=20)
    old = np.random.default_rng(1).permutation(data.num_items)  # old[new number] = old number
    new = np.argsort(old)
    catalogue = data.catalogue
    shuffled = replace(
        data,
        catalogue=Catalogue(
            item_ids=[catalogue.item_ids[i] for i in old],
            titles=[catalogue.titles[i] for i in old],
            table=catalogue.table.take(old),
        ),
        item=new[data.item],
        tags=[(u, int(new[i]), t) for u, i, t in data.tags],
    )
    a, b = (list(Builder(d, CONFIG, "films").training_examples()) for d in (data, shuffled))
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert (one.template, one.prompt, one.user) == (other.template, other.prompt, other.user)
        if one.task == "T2":
            assert tuple(new[list(one.prompt_items)].tolist()) == other.prompt_items
            assert one.answer == other.answer


@pytest.mark.parametrize(("task", "family"), [("T3", "rerank"), ("T1", "pairwise")])
def test_place_among_the_candidates_says_nothing(task, family):
    data = small_split(users=300, longest=20)
    config = InstructionConfig(**ONLY | {family: 10}, languages=("en", "zh"), candidates=6)
    made = [e for e in Builder(data, config, "films").training_examples() if e.task == task]
    place = [e.candidates.index(e.target) for e in made]
    shown = config.candidates if task == "T3" else 2
    count = np.bincount(place, minlength=shown)
    assert len(place) > 2000 and len(count) == shown
    assert chisquare(count).pvalue > 1e-3
    low = np.asarray([e.target for e in made])
    assert abs(np.corrcoef(low, place)[0, 1]) < 0.06  # nor does the number of the target decide its place
