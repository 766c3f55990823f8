"""A value that passes `check` is one that the engine can serve; one that does not is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.sampling import MAX_SEED, MAX_STOP_TOKEN_IDS, SamplingParams
from baton.v1 import inference_pb2

VOCAB = 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -math.inf),
        ("temperature", -0.5),
        ("temperature", 100.5),
        ("temperature", 1e30),
        ("top_p", math.nan),
        ("top_p", math.inf),
        ("top_p", 0.0),
        ("top_p", -0.1),
        ("top_p", 1.0001),
        ("top_k", -1),
        ("top_k", 2**31),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("stop_token_ids", (VOCAB,)),
        ("stop_token_ids", (3, -1)),
        ("stop_token_ids", tuple(range(MAX_STOP_TOKEN_IDS + 1))),
    ],
)
def test_out_of_bounds_names_the_field_its_value_and_what_would_be_right(field: str, value: Any) -> None:
    params: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**params).check(VOCAB)
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field} is ")
    assert "; it must be " in caught.value.message
    shown = value if not isinstance(value, tuple) else len(value) if len(value) > 2 else value[-1]
    assert str(shown) in caught.value.message


def test_min_tokens_over_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"min_tokens is 5; it must be at most max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4).check(VOCAB)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_tokens=1, min_tokens=1),
        SamplingParams(temperature=100.0, top_p=1e-6, top_k=2**31 - 1, seed=MAX_SEED),
        SamplingParams(seed=0, stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS))),
        SamplingParams(stop_token_ids=(0, VOCAB - 1), ignore_eos=True),
    ],
)
def test_the_bounds_themselves_are_allowed(params: SamplingParams) -> None:
    params.check(VOCAB)


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(0, 2**32 - 1),
    min_tokens=st.integers(0, 2**32 - 1),
    temperature=st.floats(width=32),
    top_p=st.floats(width=32),
    top_k=st.integers(0, 2**32 - 1),
    seed=st.none() | st.integers(0, MAX_SEED),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
)


@given(PARAMS)
def test_the_wire_carries_every_field(params: SamplingParams) -> None:
    """Compared by repr, in which NaN equals itself."""
    sent = params.to_proto().SerializeToString()
    assert repr(SamplingParams.from_proto(inference_pb2.SamplingParams.FromString(sent))) == repr(params)


def test_an_empty_message_means_the_defaults() -> None:
    assert SamplingParams.from_proto(inference_pb2.SamplingParams()) == SamplingParams()


def test_zero_on_the_wire_is_not_absence() -> None:
    message = inference_pb2.SamplingParams(max_tokens=0, top_p=0.0, seed=0)
    params = SamplingParams.from_proto(message)
    assert (params.max_tokens, params.top_p, params.seed) == (0, 0.0, 0)


@given(PARAMS, st.integers(1, 10_000), st.integers(0, MAX_SEED))
def test_defaults_fill_in_only_what_is_open_and_bound_max_tokens(params: SamplingParams, room: int, seed: int) -> None:
    filled = params.with_defaults(max_tokens=room, seed=seed)
    assert filled.max_tokens == (room if params.max_tokens is None else min(params.max_tokens, room))
    assert filled.seed == (seed if params.seed is None else params.seed)
    assert filled.greedy == (params.temperature == 0)
