"""The generator: what it asks has the answer that it says, and nothing of the evaluation is ever trained on."""

from __future__ import annotations

import json
import random
import re

import pytest

from demo_model.about import TOPICS
from demo_model.stories import Cast, story
from demo_model.tasks import KINDS, draw, facts, held_out, held_out_fact

GENERATED = [kind for kind in KINDS if kind not in ("recall", "about")]


@pytest.mark.parametrize("kind", GENERATED)
def test_training_and_evaluation_never_share_a_key(kind: str) -> None:
    rng = random.Random(1)
    trained = {draw(kind, rng, hold_out=False).key for _ in range(400)}
    asked = {draw(kind, rng, hold_out=True).key for _ in range(100)}
    assert not any(held_out(key) for key in trained)
    assert all(held_out(key) for key in asked)


def test_facts_of_training_leave_out_what_is_asked_for_in_evaluation() -> None:
    rng = random.Random(2)
    told = [fact for _ in range(200) for fact in facts(rng, rng.randint(1, 30))]
    assert not any(held_out(fact.key) for fact in told)
    assert all(held_out(held_out_fact(rng).key) for _ in range(50))


def test_no_two_facts_of_a_conversation_are_about_the_same_thing() -> None:
    rng = random.Random(3)
    for count in (1, 2, 5, 40):
        known = facts(rng, count)
        assert len({fact.key for fact in known}) == len(known) == count


def test_colours_and_things_repeat_so_that_neither_alone_tells_the_code() -> None:
    known = facts(random.Random(4), 20)
    assert len({fact.colour for fact in known}) < 20
    assert len({fact.thing for fact in known}) < 20


def test_sums_counts_and_reversals_are_right() -> None:
    rng = random.Random(5)
    for _ in range(200):
        turn = draw("add", rng, hold_out=False)
        assert sum(map(int, re.findall(r"\d+", turn.prompt))) == int(turn.answer)
        turn = draw("count", rng, hold_out=False)
        first, last, *step = map(int, re.findall(r"\d+", turn.prompt))
        by = (step[0] if step else 1) * (-1 if "down" in turn.prompt else 1)
        assert list(map(int, turn.answer.split(", "))) == list(range(first, last + by, by))
        turn = draw("reverse", rng, hold_out=False)
        assert turn.answer.split(", ") == turn.prompt.split(": ")[1].split(", ")[::-1]
        turn = draw("copy", rng, hold_out=False)
        assert turn.prompt.endswith(f": {turn.answer}")


def test_json_answers_parse_and_say_what_the_prompt_says() -> None:
    rng = random.Random(6)
    for _ in range(200):
        turn = draw("json", rng, hold_out=False)
        answer = json.loads(turn.answer)
        values = answer if isinstance(answer, list) else answer.values()
        assert all(str(value) in turn.prompt for value in values)


def test_a_story_keeps_to_its_cast_and_leaves_no_gap() -> None:
    rng = random.Random(7)
    for _ in range(200):
        cast = Cast.draw(rng)
        text = story(cast, rng)
        assert cast.name in text
        assert "{" not in text
        assert not re.search(r"\ba (owl|otter|orange|umbrella)\b", text), text
        assert text.endswith((".", '"'))


def test_no_two_topics_are_asked_for_by_the_same_words() -> None:
    questions = [question for _, ways, _ in TOPICS for question in ways]
    assert len(set(questions)) == len(questions)
