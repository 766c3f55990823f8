"""`baton status`: workers, what they hold, models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.client import ROLES, STATES, Client, status_to_json
from baton.config import StatusConfig, parse
from baton.v1 import inference_pb2


def main(argv: Sequence[str]) -> int:
    config = parse(StatusConfig, argv, prog="baton status")
    status = asyncio.run(_fetch(config.target))
    print(status_to_json(status) if config.json else table(status))
    return 0


async def _fetch(target: str) -> inference_pb2.GetStatusResponse:
    async with Client(target) as client:
        return await client.status()


def table(status: inference_pb2.GetStatusResponse) -> str:
    rows = [("WORKER", "ROLE", "STATE", "ADDRESS", "METRICS", "PID", "RUNNING", "WAITING", "BLOCKS FREE")]
    for w in sorted(status.workers, key=lambda worker: worker.id):
        load = w.load
        blocks = f"{load.available_blocks} of {load.total_blocks}"
        numbers = (str(w.pid), str(load.running), str(load.waiting), blocks)
        rows.append((w.id, ROLES.get(w.role, "?"), STATES.get(w.state, "?"), w.address, w.metrics, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    models = ", ".join(f"{m.name} (up to {m.max_model_len} tokens)" for m in status.models) or "none yet"
    redis = "answers" if status.redis_connected else "does not answer; serving on, with colder routing"
    return "\n".join([*lines, "", f"models   {models}", f"redis    {redis}", f"http     {status.http_address}"])
