"""Docs say what is so: links lead somewhere, the glossary's words are found where it says, decisions are in order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path

import pytest

from baton.metrics import (
    BLOCK_STATES,
    EngineMetrics,
    Metrics,
    RequestMetrics,
    RouterMetrics,
    TransferMetrics,
    WorkerMetrics,
)
from kvtransfer.lifetimes import DESTINATION, SOURCE
from sim.planted import PLANTS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DECISIONS = sorted(p for p in (DOCS / "decisions").glob("*.md") if p.name != "README.md")
HEADINGS = ["## Why", "## Decision", "## What it costs"]


def _rows() -> list[list[str]]:
    lines = (DOCS / "glossary.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "term"]


ROWS = _rows()


@cache
def _protos() -> str:
    return "\n".join(p.read_text() for p in sorted((ROOT / "proto").rglob("*.proto")))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_word_of_the_glossary_is_found_where_it_says(row: list[str]) -> None:
    _, meaning, code, proto, metrics = row
    assert meaning.endswith(".")
    for path, name in re.findall(r"`([\w/]+\.py):?(\w*)`", code):
        assert (ROOT / path).is_file(), f"{path} is not there"
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path} does not say {name}"
    for name in re.findall(r"`([\w.]+)`", proto):
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", _protos()), f"no proto says {part}"
    for name in re.findall(r"`([\w:]+)`", metrics):
        assert name in _metric_names(), f"there is no metric {name}"
    assert "`" in code, "a word that stands for nothing in the code"


def test_the_glossary_defines_a_word_once() -> None:
    words = [word for row in ROWS for word in row[0].split(", ")]
    assert sorted(words) == sorted(set(words))


def test_the_glossary_has_every_state_of_a_block() -> None:

    assert set(BLOCK_STATES) <= {word for row in ROWS for word in row[0].split(", ")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    tops = {p.name for p in ROOT.iterdir()}
    for path in re.findall(r"`([\w.]+/[\w./]+)`", page.read_text()):
        if path.partition("/")[0] in tops:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_decisions_are_numbered_listed_and_of_one_form() -> None:
    listed = (DOCS / "decisions" / "README.md").read_text()
    for number, path in enumerate(DECISIONS, start=1):
        title, *lines = path.read_text().splitlines()
        assert path.name.startswith(f"{number:04d}-")
        assert title.startswith(f"# {number:04d}: ")
        assert [line for line in lines if line.startswith("## ")] == HEADINGS
        assert f"| [{number:04d}]({path.name}) | {title.partition(': ')[2]} |" in listed


@pytest.mark.parametrize("table", [SOURCE, DESTINATION], ids=["source", "destination"])
def test_the_handoffs_tables_are_the_codes(table: Mapping[Enum, frozenset[Enum]]) -> None:
    page = (DOCS / "handoff.md").read_text()
    for state, following in table.items():
        (row,) = re.findall(rf"^\| {state.name} \| [^|]+ \|([^|]*)\|$", page, re.MULTILINE)
        assert {word.strip() for word in row.split(",") if word.strip()} == {after.name for after in following}


def test_the_bugs_of_others_are_those_that_can_be_planted() -> None:
    page = (DOCS / "handoff.md").read_text()
    named = re.findall(r"\| `([\w-]+)` \|$", page, re.MULTILINE)
    assert len(named) == len(set(named)) == 16
    assert set(named) <= set(PLANTS)


def test_every_folder_is_introduced() -> None:
    text = (DOCS / "development.md").read_text()
    packages = [p.parent.name for p in ROOT.glob("*/__init__.py")]
    assert packages
    for package in packages:
        assert f"`{package}/`" in text, f"development.md does not say what {package}/ is"


@cache
def _metric_names() -> str:
    metrics = Metrics()
    EngineMetrics(metrics, "m")
    RequestMetrics(metrics, "m")
    TransferMetrics(metrics)
    RouterMetrics(metrics)
    workers = Metrics()  # some of a worker's own bear the names of a router's
    WorkerMetrics(workers)
    return (metrics.render() + workers.render()).decode()
