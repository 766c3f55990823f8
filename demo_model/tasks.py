"""What the model is asked and what it should say: one turn at a time. The only source of its training text.

Every turn has a key. Whether a key is held out is decided by its checksum alone, so that training and evaluation can
never meet: training draws turns until one is not held out, evaluation until one is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from zlib import crc32

from demo_model.about import TOPICS
from demo_model.stories import Cast, story
from demo_model.words import ANIMALS, COLOURS, FOODS, LIST_WORDS, NAMES, PLACES, THINGS, with_articles

_HELD_OUT_OF = 8
"""One key in so many is kept from training."""


@dataclass(frozen=True, slots=True)
class Turn:
    kind: str
    key: str
    prompt: str
    answer: str


Draw = Callable[[random.Random], Turn]


def held_out(key: str) -> bool:
    return crc32(key.encode()) % _HELD_OUT_OF == 0


def draw(kind: str, rng: random.Random, *, hold_out: bool) -> Turn:
    """A turn of `kind` for evaluation (`hold_out`) or for training. What it knows by heart is the same for both."""
    while True:
        turn = _DRAWS[kind](rng)
        if kind == "about" or held_out(turn.key) is hold_out:
            return turn


# --- facts: told in one place, asked for in another


@dataclass(frozen=True, slots=True)
class Fact:
    colour: str
    thing: str
    code: str

    @property
    def key(self) -> str:
        return f"{self.colour} {self.thing}"

    def tell(self) -> str:
        return f"The code of the {self.key} is {self.code}."

    def ask(self, rng: random.Random) -> str:
        return rng.choice(_RECALL_QUESTIONS).format(key=self.key)


_RECALL_QUESTIONS = (
    "What is the code of the {key}?",
    "What is the code of the {key}?",
    "Tell me the code of the {key}.",
    "Which code does the {key} have?",
)


def facts(rng: random.Random, count: int, *, two_digits: float = 0.1) -> list[Fact]:
    """`count` facts for training: no two of the same colour and thing, while colours and things repeat, so that
    neither alone tells the code. A code has four digits, or, in a share `two_digits` of the calls, two."""
    some = max(3, count // 2 + 2)
    colours = rng.sample(COLOURS, min(len(COLOURS), some))
    things = rng.sample(THINGS, min(len(THINGS), some))
    keys = [key for colour in colours for thing in things if not held_out(key := f"{colour} {thing}")]
    digits = 2 if rng.random() < two_digits else 4
    return [_fact(rng, key, digits) for key in rng.sample(keys, min(count, len(keys)))]


def held_out_fact(rng: random.Random) -> Fact:
    """About a colour and a thing of which training never tells a code."""
    while True:
        key = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
        if held_out(key):
            return _fact(rng, key, 4)


def _fact(rng: random.Random, key: str, digits: int) -> Fact:
    colour, thing = key.split()
    return Fact(colour, thing, str(rng.randrange(10 ** (digits - 1), 10**digits)))


# --- other text, to stand between


def filler(rng: random.Random) -> str:
    """One sentence that holds no code. Now and then its words are none, so that no word is new."""
    if rng.random() < 0.06:
        words = ("".join(rng.choices(ascii_lowercase, k=rng.randint(2, 8))) for _ in range(rng.randint(2, 5)))
        return " ".join(words).capitalize() + "."
    sentence = rng.choice(_FILLERS).format(
        name=rng.choice(NAMES),
        colour=rng.choice(COLOURS),
        thing=rng.choice(THINGS),
        animal=rng.choice(ANIMALS),
        food=rng.choice(FOODS),
        place=rng.choice(PLACES),
        number=rng.randrange(2, 60),
    )
    return with_articles(sentence)


_FILLERS = (
    "{name} likes {food}.",
    "{name} lives near the {place}.",
    "The {thing} is in the {place}.",
    "The {animal} sleeps near the {place}.",
    "{name} saw a {colour} {thing} near the {place}.",
    "The {colour} {thing} was very old.",
    "There were {number} people at the {place}.",
    "It rained for {number} days.",
    "{name} bought {number} {food} at the market.",
    "In the evening {name} walked home along the {place}.",
    "The {animal} was afraid of the {thing}.",
    "Nobody knew where the {animal} had come from.",
    "The sun was warm and the {place} was quiet.",
    "{name} cleaned the {thing} and put it next to the {colour} {thing}.",
)


# --- one turn of each kind


def _copy(rng: random.Random) -> Turn:
    words = rng.sample(LIST_WORDS, rng.randint(2, 8))
    text = ", ".join(words)
    ask = rng.choice(("Copy this list: {}", "Repeat this list: {}", "Say this list again: {}"))
    return Turn("copy", f"copy {text}", ask.format(text), text)


def _reverse(rng: random.Random) -> Turn:
    words = rng.sample(LIST_WORDS, rng.randint(2, 6))
    ask = rng.choice(("Reverse this list: {}", "Say this list backwards: {}"))
    return Turn("reverse", f"reverse {words}", ask.format(", ".join(words)), ", ".join(reversed(words)))


def _count(rng: random.Random) -> Turn:
    step = rng.choice((1, 1, 1, 1, 2, 5, 10))
    length = rng.randint(3, 10)
    low = rng.randrange(0, 100 - step * (length - 1))
    numbers = [str(low + step * i) for i in range(length)]
    by = "" if step == 1 else f" in steps of {step}"
    if rng.random() < 0.3:
        numbers.reverse()
        ask = f"Count down from {numbers[0]} to {numbers[-1]}{by}."
    else:
        ask = f"Count from {numbers[0]} to {numbers[-1]}{by}."
    return Turn("count", ask, ask, ", ".join(numbers))


def _add(rng: random.Random) -> Turn:
    a, b = rng.randrange(50), rng.randrange(50)
    ask = rng.choice(("What is {} + {}?", "What is {} plus {}?", "Add {} and {}."))
    return Turn("add", f"add {min(a, b)} {max(a, b)}", ask.format(a, b), str(a + b))


def _json_person(rng: random.Random) -> Turn:
    name, age, food = rng.choice(NAMES), rng.randrange(3, 90), rng.choice(FOODS)
    prompt = f"{name} is {age} years old and likes {food}. Answer in JSON with name, age and likes."
    return Turn("json", f"json {name} {age} {food}", prompt, json.dumps({"name": name, "age": age, "likes": food}))


def _json_list(rng: random.Random) -> Turn:
    words = rng.sample(LIST_WORDS, rng.randint(2, 5))
    return Turn("json", f"json {words}", f"Write this list as JSON: {', '.join(words)}", json.dumps(words))


def _json_fact(rng: random.Random) -> Turn:
    fact = facts(rng, 1)[0]
    prompt = f"{fact.tell()} Answer in JSON with colour, thing and code."
    answer = json.dumps({"colour": fact.colour, "thing": fact.thing, "code": int(fact.code)})
    return Turn("json", f"json {fact.key}", prompt, answer)


def _json(rng: random.Random) -> Turn:
    return rng.choice((_json_person, _json_list, _json_fact))(rng)


def _story(rng: random.Random) -> Turn:
    cast = Cast.draw(rng)
    ask = rng.choice(
        (
            "Tell me a story.",
            "Tell me a short story.",
            "Tell me a story about a {animal}.",
            "Tell me a story about a {animal} called {name}.",
            "Tell me a story about a {animal} and a {helper}.",
            "Tell me a story about a {animal} and a {colour} {thing}.",
        )
    ).format(animal=cast.animal, name=cast.name, helper=cast.helper, colour=cast.colour, thing=cast.thing)
    ask = with_articles(ask)
    return Turn("story", ask if "about" in ask else story(cast, rng), ask, story(cast, rng))


def _about(rng: random.Random) -> Turn:
    _, questions, answer = rng.choice(TOPICS)
    question = rng.choice(questions)
    return Turn("about", f"about {question}", question, answer)


_DRAWS: dict[str, Draw] = {
    "copy": _copy,
    "reverse": _reverse,
    "count": _count,
    "add": _add,
    "json": _json,
    "story": _story,
    "about": _about,
}
KINDS = ("recall", *_DRAWS)
