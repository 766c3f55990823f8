"""Our own engine in a process of its own: its cold start and its memory are measured as a peer's are. Options are the
flags of a worker, such as max_num_batched_tokens=512 or enable_prefix_caching=false.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from baton import __version__
from baton.config import WorkerConfig, parse
from bench.own import OwnEngine
from bench.peers.protocol import serve, settings
from bench.workloads import Job
from worker.build import load


def main() -> None:
    given = asdict(settings())
    options = given.pop("options")
    config = parse(WorkerConfig, [_flag(*each) for each in (given | options).items()], prog="bench.peers.baton")
    engine = OwnEngine(config, *load(config))

    def run(prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        engine.run([Job(*each) for each in zip(prompts, max_tokens, strict=True)])
        return max_tokens  # or it had raised

    serve(f"baton {__version__}", run)


def _flag(name: str, value: Any) -> str:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words}={value}"


if __name__ == "__main__":
    main()
