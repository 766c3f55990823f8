"""`baton warmup`, in processes of its own, in which Triton compiles and does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_START = """
import sys
from baton.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from baton.metrics import EngineMetrics, Metrics
from worker.build import build, load
config = WorkerConfig(
    model=ModelConfig(model=sys.argv[1], device="cuda"),
    cache=CacheConfig(kv_blocks=64),
    scheduler=SchedulerConfig(max_num_seqs=8),
)
build(config, *load(config), EngineMetrics(Metrics(), "m"))
"""


def _run(cache: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True)


def _warm_up(cache: Path, model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return _run(cache, "-m", "baton.cli.main", "warmup", f"--model={model}", "--max-num-seqs=8", *flags)


def _machine_code(cache: Path) -> set[Path]:
    return set(cache.rglob("*.cubin"))


def test_what_is_compiled_once_is_found_the_next_time(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    first = _warm_up(tmp_path, checkpoint("qwen3"), "--gpu=NVIDIA H200")
    assert first.returncode == 0, first.stderr
    compiled = _machine_code(tmp_path)
    assert f"{len(compiled)} kernels for NVIDIA H200 (90)" in first.stdout
    kernels = {path.stem for path in compiled}
    assert kernels >= {"attend_split", "attend_tile", "add_norm_rows", "choose", "copy_and_sum", "finish_sums"}
    assert _warm_up(tmp_path, checkpoint("qwen3"), "--gpu=NVIDIA H200").returncode == 0
    assert _machine_code(tmp_path) == compiled


@pytest.mark.gpu
def test_a_worker_behind_it_compiles_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert _warm_up(tmp_path, checkpoint("qwen3")).returncode == 0
    compiled = _machine_code(tmp_path)
    started = _run(tmp_path, "-c", _START, str(checkpoint("qwen3")))
    assert started.returncode == 0, started.stderr
    assert _machine_code(tmp_path) == compiled


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpu=NVIDIA H2OO",), "give --compute-capability, such as 90"),
        (("--gpu=NVIDIA H200", "--model=/nowhere"), "/nowhere"),
    ],
)
def test_what_it_cannot_know_is_asked_for(
    flags: tuple[str, ...], words: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    refused = _warm_up(tmp_path, checkpoint("qwen3"), *flags)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert words in line
