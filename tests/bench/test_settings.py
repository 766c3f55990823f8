"""What `baton bench` can be told, and what it says of what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.cli import bench, main
from baton.errors import ConfigError
from baton.flags import parse, to_argv
from bench.settings import EngineBenchConfig, PeerSpec, ServeBenchConfig, parse_endpoint, parse_peer, parse_sizes


def test_flags_may_be_given_several_times() -> None:
    argv = ["--endpoint", "a=http://x:1", "--rate=2", "--endpoint=b=http://y:2"]
    config = parse(ServeBenchConfig, argv, prog="baton bench serve", environ={})
    assert config.endpoint == ("a=http://x:1", "b=http://y:2")
    assert config.rate == ("2",)
    assert parse(ServeBenchConfig, to_argv(config), prog="baton bench serve", environ={}) == config


def test_in_the_environment_several_values_have_commas_between() -> None:
    config = parse(EngineBenchConfig, [], prog="baton bench engine", environ={"BATON_MEASURE": "w1,w3"})
    assert config.measure == ("w1", "w3")
    assert parse(EngineBenchConfig, [], prog="baton bench engine", environ={}).measure == ()


def test_a_peer_has_a_kind_a_label_a_python_and_options() -> None:
    assert parse_peer("vllm=/a b/python".replace(" b", "")) == PeerSpec("vllm", "vllm", ("/a/python",), {})
    assert parse_peer("vllm:tuned='/a b/python' enforce_eager=true n=4") == PeerSpec(
        "vllm:tuned", "vllm", ("/a b/python",), {"enforce_eager": "true", "n": "4"}
    )
    assert parse_peer("command:mine=./peer --fast x=1") == PeerSpec("mine", "command", ("./peer", "--fast", "x=1"), {})


def test_what_a_peer_names_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    spec = parse_peer("llama.cpp=venv/python gguf=m.gguf")
    assert spec == PeerSpec("llama.cpp", "llama.cpp", (f"{tmp_path}/venv/python",), {"gguf": f"{tmp_path}/m.gguf"})
    assert parse_peer("vllm=python3").command == ("python3",)
    with pytest.raises(ConfigError, match=f"gguf is {tmp_path}/other.gguf, where there is no file"):
        parse_peer("llama.cpp=venv/python gguf=other.gguf")


@pytest.mark.parametrize("text", ["vllm", "vllm=", "sglang=/bin/python", "=x"])
def test_what_is_no_peer_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="KIND one of vllm, transformers"):
        parse_peer(text)


def test_an_endpoint_is_a_name_and_where_its_v1_lies() -> None:
    assert parse_endpoint("vllm=http://h:1/v1/") == ("vllm", "http://h:1")
    with pytest.raises(ConfigError, match="NAME=http://HOST:PORT"):
        parse_endpoint("http://h:1")


@pytest.mark.parametrize("text", ["", "1,x", "0", "8,-1"])
def test_what_are_no_sizes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--batches is"):
        parse_sizes("--batches", text)


def test_the_command_lists_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert "baton bench engine" in capsys.readouterr().out
    assert main.main(["bench", "disk"]) == 1
    assert "there is nothing called 'disk' to measure" in capsys.readouterr().err
