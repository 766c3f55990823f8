"""`bench/gpu.sh`: every part in turn, tables on stdout, JSON and plots with --out."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from bench import machine, results
from bench.figures import Figure, number, report
from bench.gpu import kernels, start, steps, transformers_side
from bench.gpu.engines import engine
from bench.gpu.shapes import SHAPES, random_model
from bench.roofline import Peaks, Work

PARTS = ("kernels", "moves", "steps", "requests", "transformers", "start")
_ITEMSIZE = 2


def main() -> int:
    asked = _arguments()
    if not torch.cuda.is_available():
        print("bench/gpu.sh: this machine has no CUDA device that torch can use; nothing is measured", file=sys.stderr)
        return 1
    if asked.out:
        results.check_plots()
    device, began = torch.device("cuda"), time.monotonic()
    peaks, copies = machine.measure(torch.bfloat16, device), kernels.copy_bytes_per_second()
    name = torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}: reads {number(peaks.read_bytes_per_second / 1e9)} GB/s, copies "
        f"{number(copies / 1e9)} GB/s, computes {number(peaks.flops_per_second / 1e12)} TFLOP/s in bfloat16",
        flush=True,
    )
    figures: list[Figure] = []
    circumstances = results.circumstances() | {
        "gpu": name,
        "machine_peaks": asdict(peaks) | {"copy_bytes_per_second": copies},
        "triton": triton.__version__,
    }

    def take(what: str, found: Iterable[Figure]) -> None:
        for figure in found:
            figures.append(figure)
            share = figure.share_of_bound
            said = "" if share is None else f", {share:.0%} of what the GPU can do"
            print(
                f"[{time.monotonic() - began:4.0f} s] {what}: {figure.measure}, {figure.case}, {figure.side}: "
                f"{number(figure.median)} {figure.unit}{said}",
                file=sys.stderr,
                flush=True,
            )

    if "start" in asked.parts:  # first, while this process holds nothing
        take("Llama-3-8B", start.figures("Llama-3-8B"))
    if "kernels" in asked.parts:
        take("kernels", kernels.decode_attention(peaks))
        take("kernels", kernels.prefill_attention(peaks))
    if "moves" in asked.parts:
        take("kernels", kernels.moves(peaks, copies))
    _free()
    for shape in asked.shapes:
        found = _of_shape(shape, asked.parts, peaks, device, asked.rounds)
        take(shape, (replace(figure, measure=f"{shape}: {figure.measure}") for figure in found))
        _free()
    print(report(figures))
    if asked.out:
        for path in results.write(Path(asked.out), "gpu", circumstances, figures):
            print(f"written: {path}", file=sys.stderr)
    return 0


def _of_shape(shape: str, parts: Collection[str], peaks: Peaks, device: torch.device, rounds: int) -> Iterator[Figure]:
    spec, work = SHAPES[shape], Work(SHAPES[shape], _ITEMSIZE)
    if "steps" in parts or "requests" in parts:
        own = engine(random_model(shape, device), device)
        if "steps" in parts:
            yield from steps.decode_figures(own, peaks, work, rounds)
            yield steps.prefill_figure(own, peaks, work, rounds)
        if "requests" in parts:
            yield steps.requests_figure(own, peaks, work, rounds)
        own.stop()
        del own
        _free()
    if "transformers" in parts:
        yield from transformers_side.figures(spec)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", default="", help="directory for JSON and plots")
    parser.add_argument("--parts", type=_list(PARTS), default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shapes", type=_list(SHAPES), default=tuple(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case of the engine's")
    return parser.parse_args()


def _list(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        wanted = tuple(text.split(","))
        for word in wanted:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return wanted

    return parse


if __name__ == "__main__":
    sys.exit(main())
