"""The Dockerfile, read without Docker: stages, sources, user, and what a careful reader would look for."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


class Instruction(NamedTuple):
    word: str
    rest: str


def parse(text: str) -> list[list[Instruction]]:
    """Instructions by stage; what stands before the first FROM is stage 0."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: list[list[Instruction]] = [[]]
    for line in joined.splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append(Instruction(word, rest.strip()))
    return stages


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    return parse((ROOT / "Dockerfile").read_text())


def _all(stage: list[Instruction], word: str) -> list[str]:
    return [i.rest for i in stage if i.word == word]


def test_every_instruction_is_one_that_docker_knows(stages: list[list[Instruction]]) -> None:
    assert {i.word for stage in stages for i in stage} <= KNOWN


def test_it_builds_in_one_stage_and_runs_in_another(stages: list[list[Instruction]]) -> None:
    before, build, final = stages
    assert [i.word for i in before] == ["ARG"]
    assert _all(build, "FROM") == ["python:${PYTHON}-slim AS build"]
    assert _all(final, "FROM") == ["python:${PYTHON}-slim"]
    assert not any("pip" in run or "apt-get" in run for run in _all(final, "RUN"))


def test_the_base_is_a_python_that_baton_runs_on(stages: list[list[Instruction]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = _all(stages[0], "ARG")[0].removeprefix("PYTHON=")
    assert project["requires-python"] == ">=3.11,<3.13"
    assert version in ("3.11", "3.12")


def test_every_source_is_there_and_reaches_the_build(stages: list[list[Instruction]]) -> None:
    let_by = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    sources = [s for copy in _all(stages[1], "COPY") for s in copy.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.rstrip("/") in let_by, f"{source} is kept out by .dockerignore"
    assert let_by == {s.rstrip("/") for s in sources}


def test_every_package_is_copied(stages: list[list[Instruction]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {p.rstrip("*") for p in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {c.split()[0].rstrip("/") for c in _all(stages[1], "COPY")}
    assert packages <= copied


def test_a_build_without_the_model_in_the_box_fails(stages: list[list[Instruction]]) -> None:
    (install,) = (run for run in _all(stages[1], "RUN") if "--no-deps ." in run)
    assert "python -I -c" in install, "else Python would find the sources here, and not what was installed"
    assert "from baton.model_in_the_box import DIRECTORY; open(DIRECTORY / 'config.json')" in install


def test_the_image_brings_the_kernel_compiled(stages: list[list[Instruction]]) -> None:
    compiler, install = (run for run in _all(stages[1], "RUN") if "gcc" in run or "--no-deps ." in run)
    assert "apt-get install" in compiler
    assert "python -I -m engine.kernels.cpu.build" in install, "else it would be compiled beside the sources here"


def test_every_extra_that_a_part_needs_is_installed_as_pinned(stages: list[list[Instruction]]) -> None:
    runs = " ".join(_all(stages[1], "RUN"))
    for extra in ("router", "worker", "client"):
        assert f"extras['{extra}']" in runs
    installs = re.findall(r"pip install ([^&]*)", runs)
    assert installs
    for install in installs:
        assert "--constraint constraints.txt" in install or "--no-deps" in install, install


def test_it_asks_for_the_torch_that_is_pinned(stages: list[list[Instruction]]) -> None:
    pin = next(p for p in (ROOT / "constraints.txt").read_text().splitlines() if p.startswith("torch=="))
    assert _all(stages[1], "ARG") == [f'TORCH="{pin}"']
    assert f"TORCH ?= {pin}\n" in (ROOT / "Makefile").read_text()


def test_it_runs_as_a_numbered_user_who_is_not_root(stages: list[list[Instruction]]) -> None:
    (user,) = _all(stages[2], "USER")
    uid, gid = user.split(":")
    assert int(uid) >= 10000
    assert int(gid) >= 10000
    words = [i.word for i in stages[2]]
    assert words.index("USER") > max(i for i, w in enumerate(words) if w in ("RUN", "COPY"))


def test_signals_reach_baton_and_mean_drain(stages: list[list[Instruction]]) -> None:
    assert _all(stages[2], "STOPSIGNAL") == ["SIGTERM"]
    (entrypoint,) = _all(stages[2], "ENTRYPOINT")
    assert json.loads(entrypoint) == ["baton"], "the exec form: a shell in between would keep signals to itself"
    assert json.loads(_all(stages[2], "CMD")[0]) == ["--help"]


def test_nothing_secret_or_unpinned_comes_in(stages: list[list[Instruction]]) -> None:
    everything = " ".join(i.rest for stage in stages for i in stage)
    assert not re.search(r"password|token=|secret|:latest|\bADD\b|curl|wget", everything, re.IGNORECASE)
