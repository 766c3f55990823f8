"""baton/v1/ is what proto/baton/v1/ generates, and the check that says so can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_fresh() -> None:
    done = _check(ROOT)
    assert done.returncode == 0, done.stderr


def test_a_changed_proto_makes_it_stale(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copytree(ROOT / "baton" / "v1", tmp_path / "baton" / "v1")
    proto = tmp_path / "proto" / "baton" / "v1" / "inference.proto"
    proto.write_text(proto.read_text() + "\nmessage Planted {}\n")
    done = _check(tmp_path)
    assert done.returncode == 1
    assert "inference_pb2.py" in done.stderr
    assert "make proto" in done.stderr


def _check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "proto" / "generate.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
