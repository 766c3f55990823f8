"""How a training run went: a line every some steps, kept as JSON and shown as a plot."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Line:
    step: int
    seconds: float
    """Since the first step."""
    length: int
    """Tokens in a row."""
    loss: float
    """Mean over the answers' tokens since the line before, in nats."""
    right: float
    """Share of the answers' tokens that were the most likely ones."""


@dataclass(slots=True)
class History:
    seed: int
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, step: int) -> History:
        """What `write` left there, up to `step`."""
        run = json.loads(path.with_suffix(".json").read_text())
        return cls(run["seed"], [Line(**line) for line in run["lines"] if line["step"] <= step])

    @property
    def seconds(self) -> float:
        return self.lines[-1].seconds if self.lines else 0.0

    def add(self, step: int, seconds: float, length: int, loss: float, right: float) -> None:
        self.lines.append(Line(step, round(seconds, 1), length, round(loss, 4), round(right, 4)))

    def write(self, path: Path) -> None:
        """`path`.json and `path`.svg."""
        head = {"seed": self.seed, "python": platform.python_version(), "torch": torch.__version__}
        lines = ",\n  ".join(json.dumps(asdict(line)) for line in self.lines)
        path.with_suffix(".json").write_text(f'{json.dumps(head)[:-1]},\n "lines": [\n  {lines}\n ]}}\n')
        self._plot(path.with_suffix(".svg"))

    def _plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("svg")
        matplotlib.rcParams["svg.hashsalt"] = "baton"  # the same run gives the same file
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
        minutes = [line.seconds / 60 for line in self.lines]
        axes.plot(minutes, [line.loss for line in self.lines], color="tab:blue")
        axes.set(xlabel="minutes", ylabel="loss on answers, nats a token", yscale="log")
        share = axes.twinx()
        share.plot(minutes, [line.right for line in self.lines], color="tab:orange")
        share.set(ylabel="share of tokens right", ylim=(0, 1.02))
        for before, line in zip(self.lines, self.lines[1:], strict=False):
            if before.length != line.length:
                axes.axvline(before.seconds / 60, color="0.8", zorder=0)
                axes.annotate(f"{line.length}", (before.seconds / 60, axes.get_ylim()[0]), color="0.5", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
