"""Workload W1 through the engine alone: one process, no RPC. With --peer-python, vLLM does the same in turns.

    python bench/engine_w1.py [--model DIR] [--runs 3] [--threads 2] [--peer-python PYTHON_THAT_HAS_VLLM]

Without --model it makes a model of half a billion random weights first. Both sides take turns, run by run, so that
what else the machine does falls on both; the ratio is of the medians. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from models import half_billion
from workloads import Job, w1

from baton.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from baton.ids import AttemptId
from baton.metrics import EngineMetrics, Metrics
from baton.sampling import SamplingParams
from engine.engine import Engine
from engine.messages import AddRequest, Ended, EndReason, Task, Tokens
from worker.build import build, load

BENCH = Path(__file__).parent
MAX_NUM_SEQS = 32
MAX_NUM_BATCHED_TOKENS = 2048


@dataclass
class Run:
    side: str
    seconds: float
    output_tokens: int

    @property
    def rate(self) -> float:
        return self.output_tokens / self.seconds


class OwnEngine:
    def __init__(self, model: Path, threads: int, device: str) -> None:
        config = WorkerConfig(
            model=ModelConfig(model=str(model), dtype="bfloat16", max_model_len=2048, threads=threads, device=device),
            cache=CacheConfig(),
            scheduler=SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS),
        )
        loaded, self.device = load(config)
        built = build(config, loaded, self.device, EngineMetrics(Metrics(), "bench"))
        self.engine: Engine = built.engine
        self.vocab_size = built.vocab_size
        self._batches = 0

    def run(self, jobs: Sequence[Job]) -> float:
        """Seconds until the last token of all `jobs`."""
        self._batches += 1
        started = time.perf_counter()
        for index, job in enumerate(jobs):
            sampling = SamplingParams(max_tokens=job.max_tokens, ignore_eos=True, seed=0)
            request = AttemptId(f"{self._batches}-{index}", 0)
            self.engine.handle(AddRequest(request, Task.LOCAL, tuple(job.prompt), len(job.prompt), sampling))
        generated, ended = 0, 0
        while ended < len(jobs):
            self.engine.step()
            for event in self.engine.drain_events():
                if isinstance(event, Tokens):
                    generated += len(event.token_ids)
                elif isinstance(event, Ended):
                    assert event.reason is EndReason.LENGTH, f"a request ended by {event.reason}: {event.message}"
                    ended += 1
        seconds = time.perf_counter() - started
        assert generated == sum(job.max_tokens for job in jobs), f"{generated} tokens were generated"
        return seconds


class PeerEngine:
    def __init__(self, python: str, model: Path, threads: int) -> None:
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        environment.pop("PYTHONPATH", None)  # the peer has packages of its own
        self._process = subprocess.Popen(
            [python, BENCH / "peer_vllm.py", model, str(MAX_NUM_SEQS), str(MAX_NUM_BATCHED_TOKENS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name: str = self._reply()["name"]

    def run(self, jobs: Sequence[Job]) -> float:
        stdin = _open(self._process.stdin)
        stdin.write(json.dumps({"prompts": [j.prompt for j in jobs], "max_tokens": [j.max_tokens for j in jobs]}))
        stdin.write("\n")
        stdin.flush()
        return float(self._reply()["seconds"])

    def stop(self) -> None:
        _open(self._process.stdin).close()
        self._process.wait(60)

    def _reply(self) -> dict[str, str]:
        for line in _open(self._process.stdout):
            if line.startswith("PEER "):
                reply: dict[str, str] = json.loads(line.removeprefix("PEER "))
                return reply
        raise SystemExit(f"the peer ended with status {self._process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peer-python")
    args = parser.parse_args()

    model = args.model or half_billion(BENCH.parent / "build" / "half-billion")
    own = OwnEngine(model, args.threads, args.device)
    sides: dict[str, OwnEngine | PeerEngine] = {"baton": own}
    peer = PeerEngine(args.peer_python, model.resolve(), args.threads) if args.peer_python else None
    if peer is not None:
        sides[peer.name] = peer
    for side in sides.values():
        side.run(w1(own.vocab_size, salt=1000))  # not counted: what is set up on first use
    runs: list[Run] = []
    for salt in range(args.runs):
        for name, side in sides.items():
            jobs = w1(own.vocab_size, salt)
            runs.append(Run(name, side.run(jobs), sum(job.max_tokens for job in jobs)))
            print(
                f"{name:14s} run {salt + 1}: {runs[-1].seconds:6.1f} s, {runs[-1].rate:6.1f} output tokens/s",
                flush=True,
            )
    if peer is not None:
        peer.stop()
    _report(runs, list(sides), args.threads, args.device)


def _report(runs: list[Run], sides: list[str], threads: int, device: str) -> None:
    medians = {name: statistics.median(run.rate for run in runs if run.side == name) for name in sides}
    result = {
        "workload": "w1",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpus": os.cpu_count(), "architecture": platform.machine(), "device": device, "threads": threads},
        "torch": torch.__version__,
        "output_tokens_per_second": {name: round(rate, 1) for name, rate in medians.items()},
        "ratio_to_peer": round(medians[sides[0]] / medians[sides[1]], 3) if len(sides) > 1 else None,
        "runs": [{"side": run.side, "seconds": round(run.seconds, 2)} for run in runs],
    }
    path = BENCH / "results" / f"engine_w1_{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'':14s} output tokens/s, median of {len(runs) // len(sides)}")
    for name, rate in medians.items():
        print(
            f"{name:14s} {rate:8.1f}" + ("" if name == sides[0] else f"   baton: {medians[sides[0]] / rate:.2f} of it")
        )
    print(f"written to {path}")


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the process was started without pipes"
    return pipe


if __name__ == "__main__":
    main()
