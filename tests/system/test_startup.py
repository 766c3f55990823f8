"""What cannot start says why, in one place, with status 1, and leaves no process behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import edit_json
from tests.system.harness import run_cli

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prefill=0"], ["--prefill 0", "--unified 1"]),
        (["--decode=0"], ["--decode 0"]),
        (["--prefill=-1"], ["--prefill", "-1"]),
        (["--prefill=two"], ["--prefill", "whole number"]),
        (["--dtype=int3"], ["--dtype", "bfloat16"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--block-size=0"], ["--block-size"]),
        (["--model=/no/such/directory"], ["/no/such/directory"]),
        (["--model="], ["--model", "in the box"]),
        (["--redis-url=redis://127.0.0.1:1/0"], ["127.0.0.1:1"]),
        (["--redis-url=http://x"], ["redis://"]),
    ],
)
async def test_wrong_settings_are_named(checkpoint: Callable[[str], Path], flags: list[str], words: list[str]) -> None:
    model = f"--model={checkpoint('llama')}"
    status, out, err = await run_cli("up", model, "--grpc-port=0", "--http-port=0", *flags)
    assert (status, out) == (1, "")
    for word in words:
        assert word in err


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_a_port_in_use_is_named(checkpoint: Callable[[str], Path], door: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"grpc": 0, "http": 0} | {door: port}
        flags = [f"--{name}-port={number}" for name, number in ports.items()]
        status, _, err = await run_cli("up", f"--model={checkpoint('llama')}", *flags)
    assert status == 1
    assert str(port) in err
    assert f"--{door}-port" in err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), ["config.json"]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
        (lambda d: edit_json(d / "config.json", architectures=["MambaForCausalLM"]), ["MambaForCausalLM", "Llama"]),
        (lambda d: (d / "model.safetensors").unlink(), ["safetensors"]),
        (lambda d: truncate(d / "model.safetensors"), ["model.safetensors"]),
        (lambda d: edit_json(d / "config.json", intermediate_size=96), ["mlp", "96"]),
        (lambda d: edit_json(d / "config.json", num_hidden_layers=4), ["layers.3"]),
        (lambda d: edit_json(d / "config.json", num_hidden_layers=2), ["layers.2"]),
    ],
)
async def test_a_bad_checkpoint_names_file_and_tensor(
    checkpoint: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    for source in checkpoint("llama").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    damage(tmp_path)
    status, _, err = await run_cli("prefill", f"--model={tmp_path}")
    assert status == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


async def test_without_a_router_the_commands_say_how_to_start_one() -> None:
    for command in (["generate", "hello"], ["status"]):
        status, out, err = await run_cli(*command, "--target=127.0.0.1:1")
        assert (status, out) == (1, "")
        assert "baton up" in err


def truncate(path: Path) -> None:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header, "a safetensors file"
    path.write_bytes(data[: len(data) // 2])
