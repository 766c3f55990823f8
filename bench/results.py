"""What a run leaves behind: one JSON file, and a plot a measure."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from baton import __version__
from baton.errors import ConfigError
from bench.figures import Figure, better, by_measure

_VERSIONS = ("torch", "transformers", "numpy", "grpcio", "aiohttp")


def check_plots() -> None:
    """Before hours of measuring. Raises ConfigError where nothing could be drawn in the end."""
    try:
        import matplotlib  # noqa: F401  # only to see, before anything is measured, whether it is there
    except ModuleNotFoundError:
        raise ConfigError(
            "--out draws plots with matplotlib, which is not installed; it comes with `pip install 'baton[dev]'`. "
            "Without --out the tables are printed all the same"
        ) from None


def circumstances() -> dict[str, Any]:
    """Date, machine, versions and commit: what figures are worth nothing without."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": ["baton", "bench", *sys.argv[1:]],
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {"baton": __version__, "python": platform.python_version(), **_versions()},
    }


def write(directory: Path, name: str, content: dict[str, Any], figures: Sequence[Figure]) -> list[Path]:
    """Figures beside their circumstances, and plots. Returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    whole = content | {"figures": [figure.as_json() for figure in figures]}
    path.write_text(json.dumps(_finite(whole), indent=2) + "\n")
    return [path, *(_plot(directory, name, measure, of_one) for measure, of_one in by_measure(figures).items())]


def commit() -> str | None:
    """Of the source tree that this runs from, with a plus where that has been changed since; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed; what lies around it is somebody else's
        return None
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plot(directory: Path, name: str, measure: str, figures: Sequence[Figure]) -> Path:
    """Bars by case and side; a whisker from the least to the most, a line where the machine's bound is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    cases = list(dict.fromkeys(f.case for f in figures))
    sides = list(dict.fromkeys(f.side for f in figures))
    canvas = Canvas(figsize=(max(4.0, 1.2 + 0.5 * len(cases) * (len(sides) + 1)), 4.0), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    width = 0.8 / len(sides)
    for index, side in enumerate(sides):
        own = [f for f in figures if f.side == side]
        at = [cases.index(f.case) + (index - (len(sides) - 1) / 2) * width for f in own]
        medians = [f.median for f in own]
        least_most = [[f.median - min(f.runs) for f in own], [max(f.runs) - f.median for f in own]]
        axes.bar(at, medians, width * 0.9, yerr=least_most, capsize=2, label=side)
    bounds = {f.case: f.bound for f in figures if f.bound is not None}
    for number, (case, bound) in enumerate(bounds.items()):
        at_case = cases.index(case)
        label = "the machine's bound" if number == 0 else "_nolegend_"
        axes.hlines(bound, at_case - 0.45, at_case + 0.45, colors="black", linestyles="dashed", label=label)
    axes.set_title(measure)
    axes.set_ylabel(f"{figures[0].unit} ({better(figures[0])} is better)")
    axes.set_xticks(range(len(cases)), cases, rotation=30 if len(cases) > 4 else 0)
    axes.legend(fontsize="small")
    path = directory / f"{name}_{re.sub(r'[^a-z0-9]+', '_', measure.lower()).strip('_')}.png"
    canvas.savefig(path, dpi=120)
    return path


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value != value else value
