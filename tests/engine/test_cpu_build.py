"""How the compiled kernel is found, compiled and done without."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from baton.layout import KVLayout
from engine.kernels import choice
from engine.kernels.choice import choose_attention
from engine.kernels.cpu import build
from engine.kernels.cpu.attention import CompiledAttention
from engine.kernels.cpu.library import load_kernel, load_library
from engine.kernels.reference import ReferenceAttention
from engine.kv_cache import KVCache

TABLES = np.zeros((1, 1), dtype=np.int32)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources with nothing compiled beside them or in the cache."""
    here = tmp_path / "source"
    here.mkdir()
    for path in build.sources():
        shutil.copy(path, here)
    monkeypatch.setattr(build, "HERE", here)
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # quicker to compile
    return here


def _pool(head_dim: int = 16) -> KVCache:
    return KVCache(KVLayout(1, 1, 4, head_dim, "float32", b"test"), 1)


@pytest.mark.usefixtures("source")
def test_it_is_compiled_once_into_the_cache(tmp_path: Path) -> None:
    first = build.find_or_compile()
    assert list((tmp_path / "cache").iterdir()) == [first], "nothing is left behind but the result"
    assert load_library(first).isa >= 0
    made = first.stat().st_mtime_ns
    assert build.find_or_compile() == first
    assert first.stat().st_mtime_ns == made


def test_what_other_sources_made_is_never_loaded(source: Path) -> None:
    first = build.find_or_compile()
    (source / "tile.h").write_text((source / "tile.h").read_text() + "\n")
    assert build.find_or_compile() != first


def test_set_up_puts_it_beside_its_source_and_removes_older_ones(source: Path, tmp_path: Path) -> None:
    (source / "kernels-0123456789abcdef.so").touch()
    assert build.main() == 0
    (made,) = source.glob("*.so")
    assert build.find_or_compile() == made
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("source")
def test_without_a_compiler_torch_serves_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING):
        assert load_kernel.__wrapped__() is None
    (line,) = caplog.messages
    assert "no C compiler (no-such-compiler)" in line
    assert "torch's operations" in line
    monkeypatch.setattr(choice, "load_kernel", load_kernel.__wrapped__)
    assert isinstance(choose_attention(_pool(), TABLES, (None,)), ReferenceAttention)
    assert build.main() == 1
    assert "no C compiler (no-such-compiler)" in capsys.readouterr().err


def test_a_failing_compiler_is_quoted(source: Path, tmp_path: Path) -> None:
    (source / "attention.c").write_text("#error this is no kernel\n")
    with pytest.raises(build.BuildError, match="this is no kernel"):
        build.find_or_compile()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("source")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(build.BuildError, match=str(tmp_path / "cache")):
        build.find_or_compile()


def test_it_serves_pools_on_a_cpu_whose_heads_it_can_cut() -> None:
    assert isinstance(choose_attention(_pool(), TABLES, (None,)), CompiledAttention)
    assert isinstance(choose_attention(_pool(head_dim=24), TABLES, (None,)), ReferenceAttention)
    assert isinstance(choose_attention(_pool(head_dim=272), TABLES, (None,)), ReferenceAttention)
