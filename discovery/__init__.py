"""The only code that talks to Redis: worker records with a time to live, and the prefix directory.

Redis gives hints, never ownership. With Redis down, slow, empty or lying, everything still works, only colder:
nothing here blocks an engine, and after start nothing here raises into a worker or the router.

    worker    Registration ── record + heartbeat ──►  Redis  ◄── list of workers ──────── Directory   router
              stored/evicted ── batched diffs ─────►         ◄── longest prefix, one trip ──
"""

from redis.asyncio import Redis

from discovery.directory import Directory, DirectoryStats
from discovery.embedded import EmbeddedRedis
from discovery.records import WorkerRecord, WorkerRole
from discovery.redis_client import connect, redact
from discovery.registration import Registration, RegistrationStats

__all__ = [
    "Directory",
    "DirectoryStats",
    "EmbeddedRedis",
    "Redis",
    "Registration",
    "RegistrationStats",
    "WorkerRecord",
    "WorkerRole",
    "connect",
    "redact",
]
