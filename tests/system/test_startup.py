"""What cannot start says why, in one place, with status 1, and leaves no process behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import edit_json
from tests.system.harness import run_cli
from tests.text.checkpoints import GIT_LFS_POINTER

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
    ("command", "damage", "says"),
    [
        ("prefill", lambda d: truncate(d / "model.safetensors"), "prefill: {}/model.safetensors has "),
        (
            "decode",
            lambda d: edit_json(d / "config.json", architectures=["MambaForCausalLM"]),
            "decode: {}/config.json: ",
        ),
        ("up", lambda d: (d / "config.json").unlink(), ": {}/config.json is missing"),
        ("up", lambda d: (d / "model.safetensors").write_text(GIT_LFS_POINTER), ": {}/model.safetensors is a git-lfs"),
        ("up", lambda d: (d / "tokenizer.json").write_text("{"), "router: {}/tokenizer.json cannot be read"),
        ("up", lambda d: (d / "chat_template.jinja").write_text("{% if"), "router: {}/chat_template.jinja: the chat "),
    ],
)
async def test_a_damaged_model_directory_is_named_in_one_line(
    checkpoint: Callable[[str], Path], tmp_path: Path, command: str, damage: Callable[[Path], object], says: str
) -> None:
    for source in checkpoint("llama").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    damage(tmp_path)
    doors = ["--grpc-port=0", "--http-port=0"] if command == "up" else []
    status, out, err = await run_cli(command, f"--model={tmp_path}", *doors)
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    reasons = [line for line in err.splitlines() if line.startswith("baton ") and str(tmp_path) in line]
    assert any(says.format(tmp_path) in reason for reason in reasons), err
    assert len({reason.split(": ", 1)[1] for reason in reasons}) == 1, "what is wrong is said in one way"


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
