"""`baton bench handoff`: what it costs a request that its prefill and its decode are on separate workers.

Two whole systems, one with a prefill and a decode worker, one with a unified worker, take turns with one long prompt at
a time, computed chunk by chunk. Each turn's prompt is new. All times are the client's.

- **First token**: from the sending to it. The router relays the prefill worker's, which waits for no transfer.
- **Handoff gap**: what the second token came later than a decode step takes (the median of the later gaps). The last
  chunk's blocks, the commit and the wait for a step are in it; a unified worker's is the same with none of these.
- **Hidden**: the share of the prompt's bytes that had landed when the prompt was computed.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from baton.client import Client
from baton.config import parse
from baton.errors import InternalError
from baton.flags import at_least, setting
from baton.sampling import SamplingParams
from bench import results
from bench.figures import Figure, report
from bench.progress import bar
from bench.quiet import Quiet

SYSTEMS = {"apart": ("--prefill=1", "--decode=1"), "unified": ("--unified=1",)}
_OUTPUT_TOKENS = 12
_FIRST_TOKEN_ID, _LAST_TOKEN_ID = 100, 1500
_MOVED, _HIDDEN = "baton_kv_transfer_bytes_total", "baton_kv_transfer_hidden_bytes_total"


@dataclass(frozen=True)
class HandoffBenchConfig:
    """`baton bench handoff`: first token and handoff gap of two workers beside a unified one."""

    model: str = setting("", "directory or hub id; without it, the model in the box")
    dtype: str = setting("auto", "as for `baton up`")
    prompt_tokens: int = setting(1536, "of each prompt", **at_least(2))
    chunk_tokens: int = setting(512, "of a prompt, in one step", **at_least(1))
    threads: int = setting(0, "of each worker; 0: as many as it finds", **at_least(0))
    transport: str = setting("auto", "as for `baton up`")
    rounds: int = setting(15, "how often each system is measured; figures are medians", **at_least(1))
    out: str = setting("", "directory for JSON and plots; without it, none are written")


@dataclass(frozen=True)
class Running:
    """One system."""

    grpc: str
    metrics: tuple[str, ...]
    """Addresses of its workers' pages."""

    def value(self, name: str) -> float:
        """Summed over its workers."""
        lines = [
            line for page in self.metrics for line in urlopen(f"http://{page}/metrics").read().decode().splitlines()
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@dataclass(frozen=True)
class Turn:
    """Seconds, and bytes."""

    first_token: float
    gap: float
    moved: float
    hidden: float


def main(argv: Sequence[str]) -> int:
    config = parse(HandoffBenchConfig, argv, prog="baton bench handoff")
    if config.out:
        results.check_plots()
    with ExitStack() as stack:
        running = {name: stack.enter_context(_up(config, flags)) for name, flags in SYSTEMS.items()}
        turns = asyncio.run(_take_turns(config, running))
    figures = _figures(config, turns)
    print(report(figures))
    if config.out:
        content = results.circumstances() | {"config": asdict(config) | {"out": None, "model": Path(config.model).name}}
        for path in results.write(Path(config.out), "handoff", content, figures):
            print(f"wrote {path}", file=sys.stderr)
    return 0


@contextmanager
def _up(config: HandoffBenchConfig, roles: tuple[str, ...]) -> Iterator[Running]:
    flags = [f"--dtype={config.dtype}", f"--max-num-batched-tokens={config.chunk_tokens}", "--max-num-seqs=8"]
    flags += [f"--threads={config.threads}", f"--transport={config.transport}", "--grpc-port=0", "--http-port=0"]
    flags += [f"--model={config.model}"] if config.model else []
    command = [sys.executable, "-m", "baton.cli.main", "up", *roles, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("baton ready"):
                raise InternalError(
                    f"`baton up {' '.join(roles + tuple(flags))}` did not start; it says why when run alone"
                )
            grpc = line.split("grpc=")[1].split()[0]
            yield Running(grpc, asyncio.run(_pages(grpc)))
        finally:
            process.terminate()


async def _pages(grpc: str) -> tuple[str, ...]:
    async with Client(grpc) as client:
        return tuple(worker.metrics for worker in (await client.status()).workers)


def _copies(size: int) -> list[float]:
    """Milliseconds that plain copies of so many bytes take, of memory that no cache holds."""
    pools = [bytearray(b"x") * (8 * size) for _ in range(2)]
    taken = []
    for start in range(0, 8 * size, max(size, 1)):
        began = time.perf_counter()
        memoryview(pools[1])[start : start + size] = memoryview(pools[0])[start : start + size]
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


async def _take_turns(config: HandoffBenchConfig, running: dict[str, Running]) -> dict[str, list[Turn]]:
    draw, quiet = random.Random(1), Quiet()
    turns: dict[str, list[Turn]] = {name: [] for name in running}
    with bar((config.rounds + 1) * len(running), "turns") as progress:
        for number in range(config.rounds + 1):  # the first warms up
            names = list(running)
            for name in names[number % 2 :] + names[: number % 2]:
                prompt = [draw.randint(_FIRST_TOKEN_ID, _LAST_TOKEN_ID) for _ in range(config.prompt_tokens)]
                quiet()
                turn = await _turn(running[name], prompt)
                if number:
                    turns[name].append(turn)
                progress.advance(name)
    return turns


async def _turn(running: Running, prompt: list[int]) -> Turn:
    before = running.value(_MOVED), running.value(_HIDDEN)
    arrivals: list[float] = []
    async with Client(running.grpc) as client:
        await client.status()  # the connection stands
        started = time.perf_counter()
        parts = client.generate(prompt, SamplingParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True))
        arrivals += [time.perf_counter() async for part in parts if part.token_ids]
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    return Turn(
        first_token=arrivals[0] - started,
        gap=gaps[0] - median(gaps[1:]),
        moved=running.value(_MOVED) - before[0],
        hidden=running.value(_HIDDEN) - before[1],
    )


def _figures(config: HandoffBenchConfig, turns: dict[str, list[Turn]]) -> list[Figure]:
    def figure(measure: str, side: str, unit: str, runs: list[float]) -> Figure:
        return Figure(measure, f"{config.prompt_tokens} tokens", side, unit, tuple(runs))

    apart, unified = turns["apart"], turns["unified"]
    found = [figure("first token", side, "ms", [1e3 * t.first_token for t in of]) for side, of in turns.items()]
    differences = [1e3 * (a.first_token - u.first_token) for a, u in zip(apart, unified, strict=True)]
    found.append(figure("first token, how much later than a unified worker's", "apart", "ms", differences))
    found += [figure("handoff gap", side, "ms", [1e3 * t.gap for t in of]) for side, of in turns.items()]
    last = apart[0].moved * min(config.chunk_tokens / config.prompt_tokens, 1.0)
    found.append(figure("bytes of the last chunk, by memcpy", "apart", "ms", _copies(int(last))))
    hidden = tuple(100 * t.hidden / t.moved for t in apart if t.moved)
    case = found[0].case
    found.append(Figure("hidden behind the prefill", case, "apart", "%", hidden, more_is_better=True))
    return found
