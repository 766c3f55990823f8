"""Element-wise work, sampling and the moving of blocks, in their default configurations, as the compilers for GPUs make
them: nothing in local memory. Needs no GPU, but processes in which Triton does not interpret, unlike this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 90)
KERNELS = {
    *("add_norm_rows", "gate_rows"),
    *("survey", "settle", "gather", "choose", "count_drawn"),
    *("copy_and_sum", "finish_sums"),
}
# What a program can have of consumers' cards of compute capability 8.6 to 12.0; those of data centres have more.
SHARED_BYTES = 99 << 10


def start(arch: int, cache: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.compile_others", str(arch)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_kernel_keeps_anything_in_local_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compilers = [start(arch, tmp_path) for arch in ARCHS]  # two cores have work
    found = []
    for compiler in compilers:
        said, complaints = compiler.communicate()
        assert compiler.returncode == 0, complaints
        found += [json.loads(line) for line in said.splitlines()]
    with capsys.disabled():
        print(f"\n{'kernel':16}{'arch':>6}{'warps':>7}{'REG':>6}{'STACK':>7}{'LOCAL':>7}{'shared':>9}")
        for it in found:
            print(
                f"{it['kernel']:16}{it['arch']:>6}{it['warps']:>7}{it['registers']:>6}{it['stack']:>7}{it['local']:>7}"
                f"{it['shared']:>9}"
            )
    assert {(it["kernel"], it["arch"]) for it in found} == {(kernel, arch) for kernel in KERNELS for arch in ARCHS}
    assert not [it for it in found if it["stack"] or it["local"]]
    assert not [it for it in found if it["shared"] > SHARED_BYTES]
