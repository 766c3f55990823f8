"""Both commands once, whole, on a tiny checkpoint: what they print and what they leave behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import peers
from tests.system.harness import run_cli, system

pytestmark = pytest.mark.slow

_ROOT = Path(peers.__file__).resolve().parents[2]
_PEER = f"""
import sys
sys.path.insert(0, {str(_ROOT)!r})
from bench.peers.protocol import serve
serve("peer", lambda prompts, max_tokens: max_tokens)
"""


async def test_the_engine_is_measured_beside_a_peer_and_the_machine(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    script, out = tmp_path / "peer.py", tmp_path / "out"
    script.write_text(_PEER)
    status, said, errors = await run_cli(
        "bench", "engine", f"--model={checkpoint('llama')}", "--threads=1", "--device=cpu", "--rounds=1",
        "--max-num-seqs=32", "--batches=1,2", "--contexts=32,48", "--prompt-lengths=32,9999",
        f"--peer=command:peer={sys.executable} {script}", f"--out={out}", seconds=240,
    )  # fmt: skip
    assert status == 0, errors
    assert "prefill, 9999 tokens: left out, for it needs 10000 tokens" in errors
    assert "| W1, 32 mixed requests at once (tok/s, more is better) | baton | peer | machine's bound |" in said
    result = json.loads((out / "engine.json").read_text())
    figures = {(f["measure"], f["case"], f["side"]): f for f in result["figures"]}
    cases = {
        ("W1, 32 mixed requests at once", "output"),
        ("decode step", "batch 1"),
        ("decode step", "batch 2"),
        ("prefill", "32 tokens"),
        ("W3, shared prefix", "with cache"),
        ("cold start to ready", "start"),
        ("memory behind W1", "resident"),
    }
    own_cases = {
        ("W3, shared prefix", "without"),
        ("W3, shared prefix: with cache / without", "W3"),
        ("memory behind W1", "over weights + KV pool"),
        *(
            (measure, f"batch {batch}, context {context}")
            for measure in ("decode step by context", "step gap, share of the time outside the forward")
            for batch in (1, 2)
            for context in (32, 48)
        ),
    }
    assert {(measure, case) for measure, case, side in figures if side == "peer"} == cases
    assert {(measure, case) for measure, case, side in figures if side == "baton"} == cases | own_cases
    assert all(f["median"] > 0 for (_, _, side), f in figures.items() if side == "baton")
    assert figures["decode step by context", "batch 2, context 48", "baton"]["bound"] > 0
    assert (
        0 < figures["step gap, share of the time outside the forward", "batch 1, context 32", "baton"]["median"] < 100
    )
    assert result["versions"]["torch"]
    assert result["machine"]["cpu"]
    assert result["threads"] == 1
    assert (out / "engine_w1_32_mixed_requests_at_once.png").read_bytes().startswith(b"\x89PNG")


async def test_a_server_is_measured_under_load(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with system(checkpoint("llama"), tmp_path / "log", "--unified=1", "--threads=1") as running:
        status, said, errors = await run_cli(
            "bench", "serve", f"--endpoint=one={running.http}", f"--endpoint=two={running.http}/v1", "--rate=20",
            "--rate=inf", "--requests=5", "--rounds=1", "--vocab-size=384", "--input-len=24", "--output-len=8",
            "--ttft-objective-ms=60000", f"--out={out}", seconds=120,
        )  # fmt: skip
    assert status == 0, errors
    assert "| saturated | one | two | one : two |" in said
    assert "| good requests, % | 100 | 100 | 1.00 |" in said
    result: dict[str, Any] = json.loads((out / "serve.json").read_text())
    assert len(result["runs"]) == 4
    for run in result["runs"]:
        assert len(run["streams"]) == 5
        for stream in run["streams"]:
            assert stream["error"] == ""
            assert stream["completion_tokens"] == stream["asked"]
            assert 1 <= len(stream["arrivals"]) <= stream["asked"]  # a chunk may bring several tokens
    assert (out / "serve_ttft.png").is_file()


async def test_an_endpoint_where_nobody_answers_is_told_by_its_name() -> None:
    status, _, errors = await run_cli("bench", "serve", "--endpoint=gone=http://127.0.0.1:1")
    assert status == 1
    assert errors.startswith("baton bench serve: endpoint gone: http://127.0.0.1:1/v1/models gives no models (")
