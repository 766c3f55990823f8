"""The model that is served where none is named: found in the tree and in an installation, and missed by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton import model_in_the_box
from baton.config import ModelConfig
from baton.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
ASK = "import baton.model_in_the_box as box, baton.config; print(box.resolve(baton.config.ModelConfig()).model)"


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(model_in_the_box, "DIRECTORY", tmp_path)
    return tmp_path


def test_it_lies_beside_the_package() -> None:
    assert model_in_the_box.DIRECTORY == ROOT / "demo_model" / "checkpoint"


def test_it_is_served_by_its_own_name_where_no_model_is_given(box: Path) -> None:
    (box / "config.json").touch()
    assert model_in_the_box.resolve(ModelConfig()) == ModelConfig(model=str(box), served_model_name="baton-tiny")
    named = model_in_the_box.resolve(ModelConfig(served_model_name="mine", dtype="float32"))
    assert named == ModelConfig(model=str(box), served_model_name="mine", dtype="float32")


def test_a_model_that_is_given_goes_before_it(box: Path) -> None:
    (box / "config.json").touch()
    assert model_in_the_box.resolve(ModelConfig(model="mine")) == ModelConfig(model="mine")


def test_an_installation_without_one_says_what_to_give(box: Path) -> None:
    with pytest.raises(ConfigError, match=r"no --model was given.*no model in the box.*give --model a Hugging Face"):
        model_in_the_box.resolve(ModelConfig())


def test_a_wheel_brings_it_and_finds_it(tmp_path: Path) -> None:
    """With what it is built from, and with stand-ins for the weights, which are not what this is about."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    leave_out = shutil.ignore_patterns("__pycache__", "checkpoint", "draft")
    for package in ("baton", "demo_model"):
        shutil.copytree(ROOT / package, source / package, ignore=leave_out)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("checkpoint", "draft"):
        (source / "demo_model" / name).mkdir()
        for file in ("config.json", "model.safetensors", "README.md"):
            (source / "demo_model" / name / file).write_text("{}")
    _run("-c", BUILD, str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, installed, "zip")
    assert _run("-c", ASK, cwd=installed) == f"{installed / 'demo_model' / 'checkpoint'}\n"
    for name in ("checkpoint", "draft"):
        assert (installed / "demo_model" / name / "model.safetensors").is_file()


def _run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
