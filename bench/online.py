"""`baton bench serve`: endpoints in turns, at several rates, each load from a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import urlopen

from baton.errors import ConfigError, InternalError, Unavailable
from baton.flags import parse
from bench import arrivals, results
from bench.figures import Figure, table
from bench.latency import LATE_SECONDS, Objectives, lateness, quantities
from bench.load import Asked, Load
from bench.progress import bar
from bench.quiet import Quiet
from bench.settings import ServeBenchConfig, parse_endpoint
from bench.stream import Outcome
from bench.workloads import Job, w2

_WARM_UP_REQUESTS = 2
_ANSWER_SECONDS = 30.0
_LIST_FAILURES = 5


@dataclass(frozen=True)
class _Endpoint:
    name: str
    url: str
    model: str


@dataclass(frozen=True)
class _Run:
    """One endpoint under one load."""

    endpoint: str
    rate: float
    round: int
    outcome: Outcome


def main(argv: Sequence[str]) -> int:
    config = parse(ServeBenchConfig, argv, prog="baton bench serve")
    if not config.endpoint:
        raise ConfigError("give at least one --endpoint NAME=URL, such as --endpoint baton=http://127.0.0.1:8000")
    rates = [arrivals.parse_rate(word) for word in config.rate]
    if config.out:
        results.check_plots()
    endpoints = [_open(name, url, config.model) for name, url in map(parse_endpoint, config.endpoint)]
    if len({endpoint.name for endpoint in endpoints}) < len(endpoints):
        raise ConfigError("two --endpoint have the same name; give each its own")
    runs = _measure(config, endpoints, rates)
    objectives = Objectives(config.ttft_objective_ms / 1e3 or None, config.itl_objective_ms / 1e3 or None)
    by_rate = {rate: _figures(runs, rate, endpoints, objectives) for rate in rates}
    print(_tables(by_rate))
    _warn(runs)
    if config.out:
        content = results.circumstances() | {"settings": asdict(config), "runs": [*map(_as_json, runs)]}
        for path in results.write(
            Path(config.out), "serve", content, [f for of_rate in by_rate.values() for f in of_rate]
        ):
            print(f"written: {path}", file=sys.stderr)
    return 1 if any(not stream.whole for run in runs for stream in run.outcome.streams) else 0


def _measure(config: ServeBenchConfig, endpoints: list[_Endpoint], rates: list[float]) -> list[_Run]:
    runs, settle = [], Quiet()
    loads = config.rounds * len(rates) * len(endpoints)
    with bar(len(endpoints) * _WARM_UP_REQUESTS + loads * config.requests, "requests") as progress:
        for endpoint in endpoints:
            warm_up = _load(config, endpoint, arrivals.SATURATED, _WARM_UP_REQUESTS, salt=-1)
            run_load(warm_up, partial(progress.advance, f"{endpoint.name}, warming up"))
        for number in range(config.rounds):
            for index, rate in enumerate(rates):
                salt = config.seed + number * len(rates) + index
                for endpoint in _turned(endpoints, number):  # who is first changes
                    what = f"{endpoint.name}, {arrivals.name(rate)}, round {number + 1}"
                    load = _load(config, endpoint, rate, config.requests, salt)
                    settle()
                    runs.append(_Run(endpoint.name, rate, number, run_load(load, partial(progress.advance, what))))
    return runs


def _load(config: ServeBenchConfig, endpoint: _Endpoint, rate: float, count: int, salt: int) -> Load:
    """The same for every endpoint."""
    jobs = w2(
        config.vocab_size,
        salt,
        num_requests=count,
        input_len=config.input_len,
        output_len=config.output_len,
        spread=config.range_ratio,
    )
    times = arrivals.arrivals(rate, count, salt)
    asked = [Asked(at, _body(config, endpoint, job)) for at, job in zip(times, jobs, strict=True)]
    return Load(f"{endpoint.url}/v1/completions", asked, config.timeout)


def _body(config: ServeBenchConfig, endpoint: _Endpoint, job: Job) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": endpoint.model,
        "prompt": job.prompt,
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | {"return_token_ids": True} if config.return_token_ids else body


def run_load(load: Load, on_end: Callable[[], None]) -> Outcome:
    """In a process of its own; `on_end` is told of each stream that has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        with _pipe(process.stdin) as stdin:
            stdin.write(load.to_json())
        for line in _pipe(process.stdout):
            if not line.startswith("progress"):
                return Outcome.from_json(line)
            on_end()
        raise InternalError(f"the load generator ended with status {process.wait()} and no result")
    finally:
        process.kill()
        process.wait()


def _figures(runs: list[_Run], rate: float, endpoints: list[_Endpoint], objectives: Objectives) -> list[Figure]:
    """Of one rate."""
    of_sides = {
        endpoint.name: [
            quantities(run.outcome, objectives) for run in runs if run.rate == rate and run.endpoint == endpoint.name
        ]
        for endpoint in endpoints
    }
    return [
        Figure(
            measure=same[0].measure,
            case=f"{same[0].part} {arrivals.name(rate)}".strip(),
            side=side,
            unit=same[0].unit,
            runs=tuple(quantity.value for quantity in same),
            more_is_better=same[0].more_is_better,
        )
        for side, of_rounds in of_sides.items()
        for same in zip(*of_rounds, strict=True)  # one quantity, round by round
    ]


def _tables(by_rate: dict[float, list[Figure]]) -> str:
    """One a rate, with a row for each quantity."""
    tables = []
    for rate, figures in by_rate.items():
        name = arrivals.name(rate)
        rows = [replace(f, case=f"{f.measure} {f.case.removesuffix(name)}".strip()) for f in figures]
        tables.append(table(name, rows))
    return "\n\n".join(tables)


def _warn(runs: list[_Run]) -> None:
    """Of what makes figures worth less, on stderr."""
    for run in runs:
        where = f"{run.endpoint}, {arrivals.name(run.rate)}, round {run.round + 1}"
        late = lateness(run.outcome.streams)
        if late > LATE_SECONDS:
            print(
                f"{where}: the client itself sent its requests up to {1e3 * late:.0f} ms late (p99); "
                "its figures are not the server's alone",
                file=sys.stderr,
            )
        errors = [stream.error for stream in run.outcome.streams if not stream.whole]
        for error in errors[:_LIST_FAILURES]:
            print(f"{where}: a request failed: {error}", file=sys.stderr)
        if len(errors) > _LIST_FAILURES:
            print(f"{where}: and {len(errors) - _LIST_FAILURES} more", file=sys.stderr)


def _as_json(run: _Run) -> dict[str, Any]:
    streams = [stream.as_json() for stream in run.outcome.streams]
    return {"endpoint": run.endpoint, "rate": arrivals.name(run.rate), "round": run.round, "streams": streams}


def _open(name: str, url: str, model: str) -> _Endpoint:
    """Raises Unavailable where nobody answers."""
    try:
        with urlopen(f"{url}/v1/models", timeout=_ANSWER_SECONDS) as response:
            listed = [each["id"] for each in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if model and isinstance(error, HTTPError):
            return _Endpoint(name, url, model)  # it answers, and lists no models
        raise Unavailable(
            f"endpoint {name}: {url}/v1/models gives no models ({error}); without --model, it has to"
        ) from None
    if not listed:
        raise Unavailable(f"endpoint {name}: {url} serves no model yet")
    return _Endpoint(name, url, model or listed[0])


def _turned(endpoints: list[_Endpoint], by: int) -> list[_Endpoint]:
    by %= len(endpoints)
    return endpoints[by:] + endpoints[:by]


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the process was started with pipes"
    return pipe
