"""Stop strings, against a plain search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.text import StopStrings

STOPS = st.lists(st.text(alphabet="aab€", min_size=1, max_size=5), max_size=3)


@st.composite
def texts_and_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text made of beginnings of its stop strings, so that many matches are begun and few completed."""
    stops = draw(STOPS)
    beginnings = sorted({stop[:n] for stop in stops for n in range(1, len(stop))} | {"a", "b"})
    return "".join(draw(st.lists(st.sampled_from(beginnings), max_size=10))), stops


def search(text: str, stops: list[str]) -> tuple[str, str]:
    """What is left of `text`, and the stop string that cut it: the one that ends first, the longest of such."""
    matches = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, ""
    end, _, stop = min(matches)
    return text[: end - len(stop)], stop


def pieces(text: str, cuts: list[int]) -> list[str]:
    """`text`, cut at the places that `cuts` name, modulo its length."""
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(texts_and_stops(), st.lists(st.integers(0, 100), max_size=8))
@settings(max_examples=500)
def test_any_chunking_gives_what_a_search_of_the_whole_text_gives(
    text_and_stops: tuple[str, list[str]], cuts: list[int]
) -> None:
    text, stops = text_and_stops
    watcher = StopStrings(stops)
    results = [watcher.push(piece) for piece in pieces(text, cuts)]
    results.append(watcher.flush())
    kept, stop = search(text, stops)
    assert "".join(result.emit for result in results) == kept
    assert results[-1].matched == stop


@given(texts_and_stops())
def test_no_more_is_held_back_than_may_still_become_a_stop_string(
    text_and_stops: tuple[str, list[str]],
) -> None:
    text, stops = text_and_stops
    watcher = StopStrings(stops)
    seen = emitted = ""
    for character in text:
        result = watcher.push(character)
        if result.matched:
            return
        seen, emitted = seen + character, emitted + result.emit
        held = seen[len(emitted) :]
        assert seen.startswith(emitted)
        prefixes = {stop[:n] for stop in stops for n in range(1, len(stop))}
        longest = max((len(p) for p in prefixes if seen.endswith(p)), default=0)
        assert len(held) == longest


def test_without_stop_strings_everything_is_emitted_at_once() -> None:
    watcher = StopStrings([])
    assert watcher.push("anything").emit == "anything"
    assert watcher.flush().emit == ""


def test_a_match_across_pieces_cuts_the_text_before_it() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.push("Yes.\n").emit == "Yes."
    assert watcher.push("\nUs").emit == ""
    result = watcher.push("er: what")
    assert (result.emit, result.matched) == ("", "\n\nUser:")


def test_after_a_match_nothing_more_comes() -> None:
    watcher = StopStrings(["."])
    assert watcher.push("a.b").emit == "a"
    assert watcher.push("c").emit == ""
    assert watcher.push("c").matched == "."
    assert watcher.flush().emit == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    watcher = StopStrings(["END"])
    assert watcher.push("the EN").emit == "the "
    assert watcher.flush().emit == "EN"


@pytest.mark.parametrize("stops", [["abcd", "bc"], ["bc", "abcd"]])
def test_the_match_that_ends_first_wins(stops: list[str]) -> None:
    result = StopStrings(stops).push("abcd")
    assert (result.emit, result.matched) == ("a", "bc")


@pytest.mark.parametrize("stops", [["abc", "bc"], ["bc", "abc"]])
def test_of_matches_that_end_together_the_longest_wins(stops: list[str]) -> None:
    result = StopStrings(stops).push("abc")
    assert (result.emit, result.matched) == ("", "abc")


def test_a_stop_string_that_repeats_itself_is_found_in_a_long_run() -> None:
    watcher = StopStrings(["a" * 500 + "b"])
    emitted = "".join(watcher.push("a").emit for _ in range(2001))
    assert emitted == "a" * 1501
    assert watcher.push("b").matched
