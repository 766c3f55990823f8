"""Every kernel, in the default configurations and in those of a device, as Triton and ptxas compile it: nothing in
local memory, and tiles that fit. Needs no GPU, but processes in which Triton does not interpret, unlike this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD_DIMS = ("64", "128", "256")
ATTENTION = {"attend_split", "reduce_splits", "attend_tile", "rotate_and_write", "write_as_is"}
HOPPER = {("attend_tiles", "64", 90), ("attend_tiles", "128", 90)}
OTHERS = {
    *("add_norm_rows", "gate_rows", "multiply_rows"),
    *("survey", "settle", "gather", "choose", "count_drawn"),
    *("copy_and_sum", "finish_sums"),
}
HOPPER_STACK = 64
"""Bytes of what it needs only between tiles: within its loops everything is in registers."""
# What a program can have at most: the default is for cards of compute capability 8.6 and 8.9 too.
SHARED_BYTES = {"default": 99 << 10, "nvidia_h200": 227 << 10}


@dataclass(frozen=True)
class _Compiler:
    """A process of its own, so that two cores have work."""

    process: subprocess.Popen[str]

    @staticmethod
    def start(arch: int, device_name: str, cache: Path) -> _Compiler:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return _Compiler(
            subprocess.Popen(
                [sys.executable, "-m", "tests.kernels.every_launch", str(arch), device_name],
                cwd=ROOT,
                env=environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def results(self) -> Iterator[dict[str, int | str]]:
        said, complaints = self.process.communicate()
        assert self.process.returncode == 0, complaints
        for line in said.splitlines():
            yield json.loads(line)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache: a device's configurations are the default ones for many a kernel."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.parametrize(("device_name", "archs"), [("default", (80, 90)), ("nvidia_h200", (90,))])
def test_no_kernel_spills_and_every_tile_fits(
    device_name: str, archs: tuple[int, ...], compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compilers = [_Compiler.start(arch, device_name, compiled) for arch in archs]
    found = [result for compiler in compilers for result in compiler.results()]
    with capsys.disabled():
        print(f"\n{device_name:20}{'head':>6}{'arch':>6}{'warps':>7}{'REG':>6}{'STACK':>7}{'LOCAL':>7}{'shared':>9}")
        for it in found:
            sizes = f"{it['registers']:>6}{it['stack']:>7}{it['local']:>7}{it['shared']:>9}"
            print(f"{it['kernel']:20}{it['head_dim']:>6}{it['arch']:>6}{it['warps']:>7}{sizes}")
    wanted = {(kernel, size, arch) for kernel in ATTENTION for size in HEAD_DIMS for arch in archs}
    if device_name == "default":  # the others have no configurations of devices
        wanted |= {(kernel, "", arch) for kernel in OTHERS for arch in archs}
    wanted |= {it for it in HOPPER if it[2] in archs}
    assert {(it["kernel"], it["head_dim"], it["arch"]) for it in found} == wanted
    assert not [it for it in found if it["local"]]
    assert not [it for it in found if int(it["stack"]) > (HOPPER_STACK if it["kernel"] == "attend_tiles" else 0)]
    everywhere = [it for it in found if it["kernel"] != "attend_tiles"]
    assert not [it for it in everywhere if int(it["shared"]) > SHARED_BYTES[device_name]]
    assert not [it for it in found if it["early"]]
    assert not [it for it in found if int(it["shared"]) > max(SHARED_BYTES.values())]
