"""The stream of text against the text of the whole, for every kind of decoder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.text import Detokenizer, Tokenizer
from tests.text.checkpoints import CORPUS

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.sampled_from(CORPUS)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=10)


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    """The pushes, of so many tokens each in turn, and the flush."""
    detokenizer = Detokenizer(tokenizer, prompt)
    parts: list[str] = []
    place = turn = 0
    while place < len(ids):
        size = sizes[turn % len(sizes)]
        parts.append(detokenizer.push(ids[place : place + size]))
        place, turn = place + size, turn + 1
    return [*parts, detokenizer.flush()]


def native(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer._backend.encode(text, add_special_tokens=False).ids)


@given(ids=st.lists(st.integers(0, 425), max_size=30), sizes=SIZES)
def test_byte_level_streams_of_any_ids_are_the_whole_decoded(
    tokenizers: dict[str, Tokenizer], ids: list[int], sizes: list[int]
) -> None:
    tokenizer = tokenizers["byte_level"]
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 470), max_size=30), sizes=SIZES)
def test_byte_fallback_streams_of_any_ids_are_their_bytes_decoded(
    tokenizers: dict[str, Tokenizer], ids: list[int], sizes: list[int]
) -> None:
    tokenizer = tokenizers["byte_fallback"]
    known = b""
    for token_id in ids:
        if 3 <= token_id < 3 + 256:
            known += bytes([token_id - 3])
        elif 3 + 256 <= token_id < tokenizer.vocab_size:
            known += (tokenizer._backend.id_to_token(token_id) or "").replace("▁", " ").encode()
    expected = known.decode(errors="replace").removeprefix(" ")
    assert "".join(stream(tokenizer, ids, sizes)) == expected
    if REPLACEMENT not in tokenizer.decode(ids):
        assert expected == tokenizer.decode(ids)


@given(text=TEXT, sizes=SIZES)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_no_character_of_a_real_text_is_split(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, sizes: list[int]
) -> None:
    tokenizer = tokenizers[kind]
    ids = native(tokenizer, text)
    parts = stream(tokenizer, ids, sizes)
    assert "".join(parts) == tokenizer.decode(ids)
    assert "".join(parts).count(REPLACEMENT) == text.count(REPLACEMENT)


@given(text=TEXT, answer=TEXT)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_behind_a_prompt_the_answer_is_what_it_adds_to_the_prompt(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, answer: str
) -> None:
    tokenizer = tokenizers[kind]
    prompt = native(tokenizer, text + "x")
    ids = native(tokenizer, answer)
    whole = tokenizer.decode([*prompt, *ids])
    before = tokenizer.decode(prompt)
    assert "".join(stream(tokenizer, ids, [1], tuple(prompt))) == whole[len(before) :]


@given(ids=st.lists(st.integers(2, 149), max_size=40), sizes=SIZES)
@settings(max_examples=50)
def test_decoders_of_another_kind_are_streamed_too(
    tokenizers: dict[str, Tokenizer], ids: list[int], sizes: list[int]
) -> None:
    tokenizer = tokenizers["word_piece"]
    assert tokenizer.pieces is None
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids)


def test_an_emoji_comes_whole_with_its_last_byte(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    byte = {b: 3 + b for b in range(256)}
    parts = stream(tokenizer, [byte[b] for b in "é🙂".encode()], [1])
    assert parts == ["", "é", "", "", "", "🙂", ""]


def test_a_legitimate_replacement_character_is_not_held_back(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(native(tokenizer, REPLACEMENT)) == REPLACEMENT


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_left_incomplete_is_flushed_as_one_replacement(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    smiling = native(tokenizer, "𐍈")  # in no corpus: four tokens of one byte
    smiling = smiling[-4:]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(smiling[:3]) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_invalid_bytes_do_not_hold_up_what_follows(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    parts = stream(tokenizer, [3 + 0xE4, 3 + 0xBD, 3 + 0x41, 3 + 0xFF, 3 + 0x42], [1])
    assert parts == ["", "", REPLACEMENT + "A", REPLACEMENT, "B", ""]


def test_special_tokens_have_no_text_and_break_no_character(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    first, *rest = native(tokenizer, "𐍈")[-4:]
    special = min(tokenizer.special_ids)
    assert stream(tokenizer, [first, special, *rest, special], [1])[-3:] == ["𐍈", "", ""]


def test_ids_that_the_tokenizer_does_not_know_have_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert stream(tokenizer, [tokenizer.vocab_size, tokenizer.vocab_size + 1000], [1]) == ["", "", ""]


def test_a_character_begun_in_the_prompt_is_completed_by_the_answer(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = tokenizers[kind]
        ids = native(tokenizer, "ab𐍈")
        assert "".join(stream(tokenizer, ids[-2:], [1], tuple(ids[:-2]))) == "𐍈"


def test_a_leading_space_is_stripped_only_where_the_answer_begins_a_text(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["byte_fallback"]
    the = native(tokenizer, "the")
    bos = 1
    assert tokenizer.decode(the) == "the"
    assert "".join(stream(tokenizer, the, [1])) == "the"
    assert "".join(stream(tokenizer, the, [1], (bos,))) == "the"
    assert "".join(stream(tokenizer, the, [1], (bos, *the))) == " the"


def test_a_token_costs_a_look_at_few_others(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    real = Tokenizer.decode

    def counting(self: Tokenizer, token_ids: list[int]) -> str:
        looked_at.append(len(token_ids))
        return real(self, token_ids)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    for tokenizer in tokenizers.values():
        ids = [i % tokenizer.vocab_size for i in range(2000)]
        detokenizer = Detokenizer(tokenizer, ids)
        for token_id in [*ids, *[next(iter(tokenizer.special_ids))] * 500]:
            detokenizer.push([token_id])
    assert max(looked_at) <= 64
