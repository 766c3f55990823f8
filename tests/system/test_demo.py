"""The first things that a newcomer does: `make demo`, then `baton up` with no model named and `baton chat`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from baton.model_in_the_box import SERVED_NAME
from tests.system.harness import ROOT, children, run_cli, system

pytestmark = pytest.mark.slow


async def test_the_demo_gives_right_answers_and_shows_who_did_what() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "demo_model.demo",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        out, err = (text.decode() for text in await asyncio.wait_for(process.communicate(), 120))
    finally:
        if process.returncode is None:
            for up in children(process.pid):  # which would outlive the demo
                os.kill(up, signal.SIGTERM)
            process.kill()
            await process.wait()
    assert process.returncode == 0, err
    assert out.count("What is the code of the blue door?\n4172\n") == 2
    assert "That is wrong" not in out
    assert "limited by arithmetic" in out
    assert '{"name": "Anna", "age": 34, "likes": "cherries"}' in out
    assert "handoff  " in out
    assert "the answer has the same tokens" in out
    assert "cached" in out.split("blocks   decode-0: ")[1].splitlines()[0]
    assert "baton chat" in out.splitlines()[-1]


async def test_without_a_model_the_one_in_the_box_is_served_and_can_be_talked_to(tmp_path: Path) -> None:
    async with system("", tmp_path / "log") as running:
        lines = b"The code of the red lamp is 9031.\nWhat is the code of the red lamp?\n"
        status, out, err = await run_cli("chat", f"--target={running.grpc}", f"--model={SERVED_NAME}", stdin=lines)
        assert (status, err) == (0, "")
        assert out.splitlines()[-1] == "9031"
