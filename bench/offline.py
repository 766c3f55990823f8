"""`baton bench engine`: our engine in this process, peers in theirs, turn by turn, beside what the machine allows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from baton import model_in_the_box
from baton.config import WorkerConfig, parse
from baton.errors import ConfigError
from bench import machine, results
from bench.figures import Figure, number, report
from bench.measurements import Measurement, Model, alternating, cache_ratio, num_runs
from bench.own import OwnEngine
from bench.peer import Peer
from bench.peers.protocol import Settings
from bench.progress import bar
from bench.quiet import Quiet
from bench.roofline import Peaks, Work
from bench.settings import MEASURES, EngineBenchConfig, PeerSpec, parse_peer, parse_sizes
from bench.start import start_figures
from bench.steps import step_figures
from engine.loader import LoadedModel
from worker.build import load


@dataclass(frozen=True)
class _Plan:
    """What was asked for, understood."""

    measures: tuple[str, ...]
    peers: tuple[PeerSpec, ...]
    rounds: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt_lengths: tuple[int, ...]

    @classmethod
    def of(cls, config: EngineBenchConfig) -> _Plan:
        """Raises ConfigError."""
        for measure in config.measure:
            if measure not in MEASURES:
                raise ConfigError(f"--measure is {measure!r}; it must be one of {', '.join(MEASURES)}")
        peers = tuple(map(parse_peer, config.peer))
        names = [OwnEngine.name, *(peer.name for peer in peers)]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"the sides would be named {', '.join(names)}; give each --peer a label of its own, as in vllm:tuned=…"
            )
        return cls(
            measures=config.measure or MEASURES,
            peers=peers,
            rounds=config.rounds,
            batches=parse_sizes("--batches", config.batches),
            contexts=parse_sizes("--contexts", config.contexts),
            prompt_lengths=parse_sizes("--prompt-lengths", config.prompt_lengths),
        )


def main(argv: Sequence[str]) -> int:
    config = parse(EngineBenchConfig, argv, prog="baton bench engine")
    plan = _Plan.of(config)
    if config.out:
        results.check_plots()
    worker = WorkerConfig(model=model_in_the_box.resolve(config.model), cache=config.cache, scheduler=config.scheduler)
    loaded, device = load(worker)
    dtype: torch.dtype = getattr(torch, loaded.dtype)
    peaks = machine.measure(dtype, device)
    print(_machine(worker, loaded, peaks), file=sys.stderr)
    figures = _measure(plan, worker, loaded, device, peaks, Work(loaded.spec, dtype.itemsize))
    print(report(figures))
    if config.out:
        content = results.circumstances() | {
            "settings": asdict(replace(config, model=worker.model)),
            "dtype": loaded.dtype,
            "threads": torch.get_num_threads(),
            "machine_peaks": asdict(peaks),
        }
        for path in results.write(Path(config.out), "engine", content, figures):
            print(f"written: {path}", file=sys.stderr)
    return 0


def _measure(
    plan: _Plan, worker: WorkerConfig, loaded: LoadedModel, device: torch.device, peaks: Peaks, work: Work
) -> list[Figure]:
    settings = _settings(worker, loaded, device)
    figures: list[Figure] = []
    if "start" in plan.measures:  # first, while this process holds no pool and no peer runs beside
        with bar(plan.rounds * (1 + len(plan.peers)), "starts") as progress:
            figures += start_figures(settings, OwnEngine.name, plan.peers, work, plan.rounds, progress)
    own = OwnEngine(worker, loaded, device)
    measurements = _measurements(plan, own, peaks, work)
    if measurements:
        with ExitStack() as stack:
            peers = []
            for spec in plan.peers:
                peers.append(Peer(spec, settings))
                stack.callback(peers[-1].stop)
            with bar(num_runs(measurements, 1 + len(peers), plan.rounds), "runs") as progress:
                figures += alternating(measurements, [own, *peers], plan.rounds, progress, Quiet())
        figures += cache_ratio(figures)
    if "steps" in plan.measures:
        with bar(plan.rounds * len(plan.batches) * len(plan.contexts), "cases") as progress:
            figures += step_figures(own, peaks, work, plan.batches, plan.contexts, plan.rounds, progress)
    return figures


def _measurements(plan: _Plan, own: OwnEngine, peaks: Peaks, work: Work) -> list[Measurement]:
    """Those of all sides that were asked for and fit the model's length; says which do not."""
    model = Model(own.vocab_size, peaks, work)
    asked = {
        "w1": model.w1(),
        "decode": model.decode(plan.batches),
        "prefill": model.prefill(plan.prompt_lengths),
        "w3": model.w3(own.name, cache(own.without_cache)),
    }
    wanted = [each for name in plan.measures for each in asked.get(name, [])]
    for measurement in wanted:
        if measurement.longest > own.max_model_len:
            print(
                f"{measurement.measure}, {measurement.case}: left out, for it needs {measurement.longest} tokens and "
                f"requests may have {own.max_model_len}",
                file=sys.stderr,
            )
    return [measurement for measurement in wanted if measurement.longest <= own.max_model_len]


def _settings(worker: WorkerConfig, loaded: LoadedModel, device: torch.device) -> Settings:
    sizes = worker.scheduler.on(device.type)
    return Settings(
        model=str(loaded.directory.resolve()),
        dtype=loaded.dtype,
        threads=torch.get_num_threads(),
        max_model_len=loaded.max_model_len(worker.model.max_model_len),
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        enable_prefix_caching=worker.cache.enable_prefix_caching,
    )


def _machine(worker: WorkerConfig, loaded: LoadedModel, peaks: Peaks) -> str:
    return (
        f"{results.cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}: reads "
        f"{number(peaks.read_bytes_per_second / 1e9)} GB/s, computes {number(peaks.flops_per_second / 1e9)} GFLOP/s in "
        f"{loaded.dtype}; {worker.model.model}"
    )
