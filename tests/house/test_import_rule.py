"""Imports run one way (docs/decisions/0002): the rule is data in import_rule.py, the sources are read here."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.import_rule import BANNED, OURS, violations

ROOT = Path(__file__).resolve().parents[2]


def test_sources_keep_the_import_rule() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(str(v) for v in found)


def test_every_package_that_is_installed_is_under_the_rule() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in include} == set(OURS)


def test_every_module_that_the_rule_names_exists() -> None:
    for module in BANNED:
        path = ROOT / Path(*module.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{module} is in the rule but not in the tree"


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("baton/x.py", "import engine.scheduler", "baton imports engine.scheduler"),
        ("baton/x.py", "import torch", "baton.x imports torch"),
        ("baton/cli/x.py", "def f():\n    import redis.asyncio", "only discovery may"),
        ("engine/x.py", "from kvtransfer import ticket", "engine imports kvtransfer"),
        ("engine/x.py", "import grpc", "engine.x imports grpc"),
        ("engine/scheduler.py", "import numpy as np", "engine.scheduler imports numpy"),
        ("kvtransfer/x.py", "from engine.plan import StepPlan", "kvtransfer imports engine.plan"),
        ("discovery/x.py", "import router", "discovery imports router"),
        ("worker/x.py", "import prefill_worker", "worker imports prefill_worker"),
        ("prefill_worker/x.py", "import decode_worker", "prefill_worker imports decode_worker"),
        ("baton/x.py", "from demo_model import demo", "baton imports demo_model"),
        ("demo_model/x.py", "import engine.runner", "demo_model imports engine.runner"),
        ("baton/cli/x.py", "from bench import offline", "baton imports bench"),
        ("bench/x.py", "from router import placement", "bench imports router"),
        ("router/x.py", "from sim import loop", "router imports sim"),
        ("sim/loop.py", "import time", "sim.loop imports time"),
        ("worker/x.py", "import aiohttp", "only bench and router may"),
        ("router/x.py", "from torch import nn", "router.x imports torch"),
        ("router/x.py", "if TYPE_CHECKING:\n    import kvtransfer", "router imports kvtransfer"),
        ("router/http/x.py", "from ...engine import plan", "router imports engine"),
        ("worker/x.py", "import importlib\nimportlib.import_module('router')", "hides an import"),
        ("worker/x.py", "from importlib import import_module", "hides an import"),
        ("worker/x.py", "__import__('router')", "hides an import"),
        ("worker/x.py", "import os\nos.environ.get('X')", "only baton.flags reads the environment"),
        ("worker/x.py", "from os import getenv", "only baton.flags reads the environment"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, source: str, says: str) -> None:
    _plant(tmp_path, path, source)
    found = violations(tmp_path)
    assert [v for v in found if says in str(v)], found
    assert all(str(v).startswith(f"{path}:") for v in found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worker/x.py", "import engine, kvtransfer, discovery, torch, grpc, baton.v1.worker_pb2"),
        ("decode_worker/x.py", "from worker import core"),
        ("sim/x.py", "import router.relay, prefill_worker.handoff, decode_worker.admission, engine.engine"),
        ("router/x.py", "from discovery import directory"),
        ("discovery/x.py", "import redis.asyncio"),
        ("bench/x.py", "import aiohttp, torch, worker.build, engine.messages"),
        ("baton/flags.py", "import os\nos.environ['X']"),
        ("worker/x.py", "import os\nos.environ['OMP_NUM_THREADS'] = '1'"),
        ("router/http/x.py", "from ..request import Chunk"),
        ("baton/x.py", "from importlib.metadata import version"),
    ],
)
def test_what_is_allowed_is_let_be(tmp_path: Path, path: str, source: str) -> None:
    _plant(tmp_path, path, source)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("baton", ("torch", "redis", "transformers")),
        ("discovery", ("torch", "transformers")),
        ("router", ("torch",)),
        ("engine.scheduler", ("torch", "numpy")),
    ],
)
def test_nothing_comes_in_by_way_of_another(package: str, absent: tuple[str, ...]) -> None:
    """Imports all modules of a package in a process of its own and looks at what was loaded on the way."""
    modules = _modules(package)
    assert modules, f"{package} has no modules"
    script = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        f"print(','.join(m for m in {absent!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {package} loads {done.stdout.strip()}"


def _modules(package: str) -> list[str]:
    path = ROOT / Path(*package.split("."))
    if not path.is_dir():
        return [package]
    names = [p.relative_to(ROOT).with_suffix("").parts for p in sorted(path.rglob("*.py"))]
    return [".".join(n) for n in names if n[-1] not in ("__init__", "__main__")]


def _plant(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(source + "\n")
