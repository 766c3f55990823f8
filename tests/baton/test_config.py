"""Settings: flags before environment before defaults, and a wrong one is told by its name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import (
    DecodeConfig,
    ModelConfig,
    RouterConfig,
    SchedulerConfig,
    UpConfig,
    WorkerConfig,
    parse,
    to_argv,
)
from baton.errors import ConfigError

PARTS = (UpConfig, RouterConfig, WorkerConfig, DecodeConfig)


def value_for(f: dataclasses.Field[Any], kind: Any) -> st.SearchStrategy[Any]:
    """Any value that the setting's own bounds let by."""
    if f.metadata["choices"]:
        return st.sampled_from(f.metadata["choices"])
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
    check = f.metadata["check"] or (lambda _: True)
    if kind is float:
        return st.floats(0, 1e6).filter(check)
    return st.integers(0, 65535).filter(check) | (st.none() if kind == (int | None) else st.nothing())


def configs(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    return st.builds(
        cls,
        **{
            f.name: configs(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else value_for(f, hints[f.name])
            for f in dataclasses.fields(cls)
        },
    )


@given(st.sampled_from(PARTS).flatmap(configs))
def test_flags_carry_every_setting_to_another_process(settings: Any) -> None:
    assert parse(type(settings), to_argv(settings), prog="baton", environ={}) == settings


@pytest.mark.parametrize("cls", PARTS)
def test_defaults_are_within_their_own_bounds(cls: type[Any]) -> None:
    assert parse(cls, [], prog="baton", environ={}) == cls()
    assert parse(cls, to_argv(cls()), prog="baton", environ={}) == cls()


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environ = {"BATON_BLOCK_SIZE": "32", "BATON_MAX_NUM_SEQS": "7"}
    settings = parse(WorkerConfig, ["--block-size", "8"], prog="baton", environ=environ)
    assert settings.cache.block_size == 8
    assert settings.scheduler.max_num_seqs == 7
    assert settings.scheduler.max_num_batched_tokens == 0


@pytest.mark.parametrize(
    ("device", "given", "right"),
    [
        ("cpu", SchedulerConfig(), (64, 2048)),
        ("cuda", SchedulerConfig(), (256, 8192)),
        ("cuda", SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16), (8, 16)),
        ("cpu", SchedulerConfig(max_num_seqs=4000), (4000, 4000)),
        ("cuda", SchedulerConfig(max_num_batched_tokens=100), (100, 100)),
        ("cpu", SchedulerConfig(max_num_seqs=9, max_num_batched_tokens=4), (9, 4)),  # refused where it is used
    ],
)
def test_what_a_step_holds_is_left_to_the_device(device: str, given: SchedulerConfig, right: tuple[int, int]) -> None:
    sizes = given.on(device)
    assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == right
    assert sizes == replace(given, max_num_seqs=right[0], max_num_batched_tokens=right[1])


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_KV_BLOCKS", "77")
    assert parse(WorkerConfig, [], prog="baton").cache.kv_blocks == 77


@pytest.mark.parametrize(
    ("word", "value"), [("1", True), ("true", True), ("Yes", True), ("0", False), ("FALSE", False), ("no", False)]
)
def test_switches_come_from_the_environment_too(word: str, value: bool) -> None:
    environ = {"BATON_ENABLE_PREFIX_CACHING": word, "BATON_UNIFIED": word}
    settings = parse(DecodeConfig, [], prog="baton", environ=environ)
    assert settings.cache.enable_prefix_caching is value
    assert settings.unified is value


def test_a_switch_can_be_turned_off_by_flag() -> None:
    environ = {"BATON_ENABLE_PREFIX_CACHING": "1"}
    settings = parse(WorkerConfig, ["--no-enable-prefix-caching"], prog="baton", environ=environ)
    assert settings.cache.enable_prefix_caching is False


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        (["--block-size", "0"], {}, "--block-size is 0; it must be at least 1"),
        (["--block-size", "x"], {}, "--block-size is 'x'; it must be a whole number"),
        (["--block-size", "1.5"], {}, "--block-size is '1.5'; it must be a whole number"),
        ([], {"BATON_BLOCK_SIZE": "-3"}, "BATON_BLOCK_SIZE is -3; it must be at least 1"),
        ([], {"BATON_BLOCK_SIZE": ""}, "BATON_BLOCK_SIZE is ''; it must be a whole number"),
        (["--itl-objective-ms", "-1"], {}, "--itl-objective-ms is -1; it must be at least 0"),
        (["--grpc-port", "65536"], {}, "--grpc-port is 65536; it must be between 0 (pick a free one) and 65535"),
        (["--grpc-port=-1"], {}, "--grpc-port is -1; it must be between 0"),
        (["--dtype", "int8"], {}, "--dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"),
        (["--lease-seconds", "nan"], {}, "--lease-seconds is 'nan'; it must be a finite number"),
        (["--lease-seconds", "inf"], {}, "--lease-seconds is 'inf'; it must be a finite number"),
        (["--lease-seconds", "soon"], {}, "--lease-seconds is 'soon'; it must be a number"),
        ([], {"BATON_ENABLE_PREFIX_CACHING": "2"}, "BATON_ENABLE_PREFIX_CACHING is '2'; it must be true or false"),
        (["--prefil", "2"], {}, "unrecognized arguments: --prefil 2; `baton up --help` lists the flags"),
        (["--model"], {}, "argument --model: expected one argument; `baton up --help` lists the flags"),
        (["--prefill", "-1"], {}, "--prefill is -1; it must be at least 0"),
    ],
)
def test_a_wrong_setting_is_told_by_name_value_and_bound(argv: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(UpConfig, argv, prog="baton up", environ=environ)
    assert says in caught.value.message


@pytest.mark.parametrize("cls", PARTS)
def test_help_lists_every_flag_with_its_default(cls: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(cls, ["--help"], prog="baton", environ={})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for argument in to_argv(cls()):
        assert argument.partition("=")[0] in shown
    assert "(default: 16)" in shown or cls is RouterConfig


def test_settings_cannot_be_written_to() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().dtype = "float32"  # type: ignore[misc]  # that it is refused is the point


@pytest.mark.parametrize("cls", PARTS)
def test_no_part_has_two_settings_of_one_name(cls: type[Any]) -> None:
    names = [argument.partition("=")[0].removeprefix("--no-") for argument in to_argv(cls())]
    assert len(names) == len(set(names))


def test_numbers_keep_their_value_on_the_way() -> None:
    settings = dataclasses.replace(UpConfig(), drain_seconds=0.1 + 0.2)
    again = parse(UpConfig, to_argv(settings), prog="baton", environ={})
    assert math.isclose(again.drain_seconds, 0.1 + 0.2, rel_tol=0)
