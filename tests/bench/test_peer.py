"""Peers that are scripts of a few lines: what is asked of them, and what is said of one that fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import ConfigError, Unavailable
from bench import peers
from bench.memory import parse_status
from bench.peer import Peer
from bench.peers.protocol import Settings
from bench.settings import PeerSpec
from bench.workloads import Job

SETTINGS = Settings("DIR", "bfloat16", 2, 2048, 32, 2048, True)
_OURS = r"^ *(?:from|import) ((?:baton|engine|worker|bench)\b(?!\.peers\.protocol).*)"
JOBS = [Job([1, 2, 3], 4), Job([5], 6)]


def peer(tmp_path: Path, body: str, **options: str) -> Peer:
    script = tmp_path / "peer.py"
    root = Path(peers.__file__).resolve().parents[2]
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom bench.peers.protocol import serve, settings\n{body}\n"
    )
    return Peer(PeerSpec("mine", "command", (sys.executable, str(script)), dict(options)), SETTINGS)


def test_a_peer_is_given_jobs_and_tells_how_long_they_took(tmp_path: Path) -> None:
    body = (
        "print('noise of an engine')\n"
        "def run(prompts, max_tokens):\n"
        "    assert prompts == [[1, 2, 3], [5]], prompts\n"
        "    return max_tokens\n"
        "serve(f'{settings().dtype} {settings().options}', run)"
    )
    mine = peer(tmp_path, body, eager="true", n="4", kind="x", limit="1")
    try:
        assert mine.engine == "bfloat16 {'eager': True, 'n': 4, 'kind': 'x'}"
        assert mine.limit == 1
        assert 0 <= mine.run(JOBS) < 10
        assert mine.run(JOBS) >= 0
        assert mine.start_seconds > 0
        assert mine.resident().total > 1_000_000
    finally:
        mine.stop()


def test_a_peer_that_generates_less_than_was_asked_for_is_not_believed(tmp_path: Path) -> None:
    mine = peer(tmp_path, "serve('short', lambda prompts, max_tokens: [1, 1])")
    try:
        with pytest.raises(Unavailable, match=r"peer mine generated \[1, 1\] tokens; \[4, 6\] were asked for"):
            mine.run(JOBS)
    finally:
        mine.stop()


def test_a_peer_that_ends_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="peer mine ended with status 3"):
        peer(tmp_path, "raise SystemExit(3)")


def test_a_limit_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit is 'few'"):
        peer(tmp_path, "", limit="few")


def test_drivers_import_nothing_that_a_peers_python_lacks() -> None:
    """But what they are there to drive. Ours runs in our own."""
    for path in Path(peers.__file__).parent.glob("*.py"):
        ours = re.findall(_OURS, path.read_text(), re.MULTILINE)
        assert path.stem == "baton" or not ours, f"{path.name}: {ours}"


def test_memory_is_read_as_linux_tells_it() -> None:
    found = parse_status("Name:\tx\nRssAnon:\t   12 kB\nRssFile:\t    3 kB\nRssShmem:\t    1 kB\n")
    assert (found.anonymous, found.file, found.shared, found.total) == (12288, 3072, 1024, 16384)
    assert parse_status("Name:\tx\nState:\tZ (zombie)\n").total == 0


def test_a_driver_sees_the_peers_packages_and_generates_what_was_asked_for(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemExit('not the peer's own')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = replace(SETTINGS, model=str(checkpoint("llama")), dtype="float32", threads=1)
    spec = PeerSpec("transformers", "transformers", (sys.executable,), {"mode": "static", "batch": "2"})
    driven = Peer(spec, settings)
    try:
        assert driven.engine.startswith("transformers ")
        assert driven.engine.endswith(" static")
        assert driven.run([*JOBS, Job([7, 8], 1)]) > 0
    finally:
        driven.stop()
