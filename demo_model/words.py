"""The words that the generator draws from, and their article. Every list is plain, common English; no entry repeats within
a list."""

from __future__ import annotations

import re

COLOURS = tuple(
    "red blue green yellow white black brown grey pink purple orange golden silver violet crimson turquoise".split()
)
THINGS = tuple(
    "door lamp box chair table bottle book gate car boat bell drum kite ladder hat coat clock cup bag wagon "
    "tent bridge window basket bench bicycle candle carpet kettle mirror piano pillow plate radio robot ship "
    "shelf shoe spoon suitcase tower train truck umbrella vase violin wheel whistle".split()
)
ANIMALS = tuple(
    "fox bear cat dog owl duck goat horse mouse rabbit sheep turtle frog crow pony otter beaver hedgehog".split()
)
FOODS = tuple("apples pears plums cherries bread soup honey cheese rice beans nuts cake figs grapes".split())
NAMES = tuple(
    "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Max Nora Oscar Paula Rosa Simon Tom Vera".split()
)
PLACES = tuple("river forest mountain village garden harbour market meadow island lake valley school".split())
LIST_WORDS = (
    *THINGS,
    *ANIMALS,
    *"apple pear plum cherry bread river forest stone cloud star moon sun rain snow wind leaf tree flower".split(),
)


def with_articles(text: str) -> str:
    """`text` with "an" for "a" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
