"""What a run leaves behind."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from baton.errors import ConfigError
from bench import results
from bench.figures import Figure

FIGURES = [
    Figure("decode step", "batch 1", "baton", "ms", (2.0, 1.0, 4.0), bound=1.5),
    Figure("decode step", "batch 8", "baton", "ms", (3.0,)),
    Figure("decode step", "batch 1", "peer", "ms", (2.0,), bound=1.5),
    Figure("ITL p99", "0.5 req/s", "peer", "ms", (math.nan,)),
]


def test_figures_lie_beside_their_circumstances(tmp_path: Path) -> None:
    written = results.write(tmp_path / "new", "engine", results.circumstances(), FIGURES)
    assert [path.name for path in written] == ["engine.json", "engine_decode_step.png", "engine_itl_p99.png"]
    assert all(path.stat().st_size > 0 for path in written)
    result = json.loads(written[0].read_text())
    assert result["machine"]["cpu"]
    assert {"date", "command", "commit", "versions"} <= result.keys()
    first, *_, last = result["figures"]
    assert (first["median"], first["low"], first["high"], first["share_of_bound"]) == (2.0, 1.0, 4.0, 0.75)
    assert last["median"] is None, "JSON has no NaN"


def test_without_matplotlib_it_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'baton\[dev\]'"):
        results.check_plots()


def test_a_commit_says_whether_the_tree_has_changed_since() -> None:
    commit = results.commit()
    if commit is not None:  # else these are not sources under git
        assert len(commit.removesuffix("+")) == 40
