"""Training rows: only what the assistant says is learned, and stretched positions stay in order."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from demo_model.conversations import IGNORED, Batch, Mix, Rows
from demo_model.tokenizer import ASSISTANT, BOS, END, VOCAB_SIZE, train_tokenizer

SHORT = Mix(length=256, memory=0.5, two_digits=0.2, sentences=0.2, span=256)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), seed=0, samples=3000)


def batch(tokenizer: PreTrainedTokenizerFast, mix: Mix, seed: int = 0, count: int = 8) -> Batch:
    return Rows(tokenizer).batch(count, mix, random.Random(seed))


def test_the_same_seed_gives_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    again = train_tokenizer(tmp_path, seed=0, samples=3000)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(again) == VOCAB_SIZE


def test_numbers_are_pairs_of_digits_wherever_they_stand(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("4172", " 4172", "is 4172.", '{"code": 4172}'):
        tokens = tokenizer.tokenize(text)
        assert tokens[tokens.index("41") + 1] == "72"


def test_any_text_comes_back_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Grüße, 世界! \t\n  `baton up` 🙂 007"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_what_is_learned_is_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast) -> None:
    made = batch(tokenizer, SHORT, count=16)
    for row, targets in zip(made.token_ids, made.targets, strict=True):
        text = str(tokenizer.decode(row))
        if ASSISTANT not in text:
            continue  # plain stories
        said = re.findall(re.escape(ASSISTANT) + "(.*?" + re.escape(END) + ")", text)
        learned = str(tokenizer.decode([token for token in targets if token != IGNORED]))
        assert learned.startswith("".join(said)), "and perhaps the beginning of one more"


def test_plain_stories_are_learned_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    mix = Mix(length=256, memory=0.0, two_digits=0.0, sentences=0.0, span=256)
    made = batch(tokenizer, mix, count=64)
    plain = [n for n, row in enumerate(made.token_ids) if ASSISTANT not in str(tokenizer.decode(row))]
    assert plain
    bos = tokenizer.convert_tokens_to_ids(BOS)
    for n in plain:
        ignored = made.targets[n] == IGNORED
        following = np.append(made.token_ids[n][1:], -1)
        assert (following[ignored] == bos).all(), "only what begins the next story is not to be foreseen"


def test_targets_are_the_next_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    made = batch(tokenizer, SHORT)
    learned = made.targets[:, :-1] != IGNORED
    assert learned.any()
    assert (made.targets[:, :-1][learned] == made.token_ids[:, 1:][learned]).all()


def test_stretched_positions_jump_only_between_sentences_and_stay_within_the_span(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    mix = Mix(length=256, memory=1.0, two_digits=0.0, sentences=0.0, span=2048)
    made = batch(tokenizer, mix, count=32)
    steps = np.diff(made.positions, axis=1)
    assert (steps >= 1).all()
    assert (made.positions[:, 0] == 0).all()
    assert 1500 < made.positions.max() < 2048
    before_jump = made.token_ids[:, :-1][steps > 1]
    assert set(tokenizer.convert_ids_to_tokens(before_jump.tolist())) <= {".", END}


def test_the_same_seed_gives_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other, another = (batch(tokenizer, SHORT, seed) for seed in (1, 1, 2))
    assert (one.token_ids == other.token_ids).all()
    assert (one.positions == other.positions).all()
    assert (one.token_ids != another.token_ids).any()
