"""Short stories with a beginning, a problem, and an end. Owns the plots; draws everything else from words.py.

A plot is a list of parts, a part a list of ways to say it. Names in braces are drawn once a story, so that the story
stays about the same animals and things from its first sentence to its last.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo_model.words import ANIMALS, COLOURS, FOODS, NAMES, PLACES, THINGS, with_articles

_OPENINGS = (
    "Once upon a time there was a {mood} {animal} called {name}.",
    "Long ago, a {mood} {animal} called {name} lived near the {place}.",
    "{name} was a {mood} {animal} who lived by the {place}.",
    "There once was a {animal} called {name}, who was very {mood}.",
)
_PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # something is lost and found
        ("{name} had a {colour} {thing} and loved it more than anything.", "Every day {name} played with a {colour} {thing}."),
        ("One morning the {thing} was gone.", "But one day the {colour} {thing} could not be found.", "Then, one evening, the {thing} was lost."),
        ("{name} looked in the {place}, and under every tree, but it was not there.", "{name} searched the whole {place} and found nothing."),
        ("At last a {helper} called {friend} came by and said: \"I will help you.\"", "A {helper} called {friend} heard {name} cry and came to help."),
        ("Together they found the {thing} behind a big stone.", "They looked again, slowly this time, and there it was, in the grass.", "{friend} found the {thing} at the edge of the {place}."),
        ("{name} was so happy that the two shared some {food}.", "\"Thank you,\" said {name}, and gave {friend} some {food}."),
        ("From that day on they were friends.", "And after that they always played together."),
    ),
    (  # a gift that is shared
        ("One day {name} found a basket of {food} near the {place}.", "One morning {name} came home with a bag full of {food}."),
        ("\"I will eat it all by myself,\" said {name}.", "{name} hid it behind a {colour} {thing}, so that nobody would see it."),
        ("Then a hungry {helper} called {friend} came along the road.", "Soon a {helper} called {friend} knocked at the door, cold and hungry."),
        ("{name} thought about it for a while.", "At first {name} said nothing.", "{name} looked at the {food}, and then at {friend}."),
        ("\"Come in,\" said {name}. \"There is enough for two.\"", "\"Take half of it,\" said {name} at last."),
        ("They ate together and told each other stories until it was dark.", "The two ate until they were full, and laughed a lot."),
        ("That night {name} learned that {food} taste better with a friend.", "And {name} was never alone again."),
    ),
    (  # a journey that is brave
        ("{name} wanted to see what was behind the {place}.", "{name} had never been far from home and dreamed of the {place}."),
        ("So one morning {name} packed some {food} and set out.", "One day {name} took a {colour} {thing} and began to walk."),
        ("On the way it began to rain, and the road was long.", "The road was steep, and soon the sun went down."),
        ("{name} was afraid, but went on, step by step.", "\"I can do it,\" said {name}, and went on."),
        ("In the night a {helper} called {friend} showed {name} the way.", "Then {name} met a {helper} called {friend}, who knew the way."),
        ("When the sun came up they stood on a hill and saw the whole {place}.", "In the morning they were there, and it was more beautiful than in any dream."),
        ("{name} went home with a happy heart.", "\"It was worth every step,\" said {name}."),
    ),
    (  # something is built together
        ("{name} wanted to build a {colour} {thing}.", "One spring {name} began to build a {colour} {thing}."),
        ("But the work was too hard for one {animal}.", "But it broke again and again."),
        ("\"I cannot do this alone,\" said {name}.", "{name} sat down in the grass and sighed."),
        ("A {helper} called {friend} stopped and asked: \"May I help?\"", "Then {friend}, a {helper} from the {place}, came to look."),
        ("They worked all day, and in the evening the {thing} was ready.", "{friend} held it and {name} tied it, and so it was done."),
        ("Everybody from the {place} came to see it.", "They were tired and proud."),
        ("\"Two are better than one,\" said {name}.", "And whoever passes there today can still see the {colour} {thing}."),
    ),
)  # fmt: skip
_MOODS = ("small", "brave", "clever", "shy", "cheerful", "lazy", "curious", "kind", "proud", "quiet")


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what a story is about."""

    name: str
    animal: str
    friend: str
    helper: str
    colour: str
    thing: str
    food: str
    place: str
    mood: str

    @classmethod
    def draw(cls, rng: random.Random) -> Cast:
        (name, friend), (animal, helper) = rng.sample(NAMES, 2), rng.sample(ANIMALS, 2)
        return cls(
            name=name,
            animal=animal,
            friend=friend,
            helper=helper,
            colour=rng.choice(COLOURS),
            thing=rng.choice(THINGS),
            food=rng.choice(FOODS),
            place=rng.choice(PLACES),
            mood=rng.choice(_MOODS),
        )


def story(cast: Cast, rng: random.Random) -> str:
    """About 100 words."""
    parts = (_OPENINGS, *rng.choice(_PLOTS))
    values = {name: getattr(cast, name) for name in Cast.__slots__}
    return with_articles(" ".join(rng.choice(part) for part in parts).format(**values))
