"""Whose sockets these are, as /proc tells."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_LISTEN = "0A"
_LOWEST_PORT, _PORTS = 10_000, 20_000  # below those from which the kernel takes the ports of outgoing connections


def owner(address: tuple[str, int], pids: Mapping[str, int]) -> str:
    """The name of the process whose socket has this address; `?` where it is none of `pids`."""
    inodes = {inode for local, _, inode in _sockets() if local == address}
    return next((name for name, pid in pids.items() if inodes & _inodes(pid)), "?")


def listening_ports(pid: int) -> set[int]:
    """On 127.0.0.1."""
    own = _inodes(pid)
    return {port for (host, port), state, inode in _sockets() if state == _LISTEN and inode in own}


def free_ports(rng: random.Random, count: int, hosts: Iterable[str]) -> list[int]:
    """Nobody listens on them on any of the hosts now."""
    hosts, found = list(hosts), []
    while len(found) < count:
        port = rng.randrange(_LOWEST_PORT, _LOWEST_PORT + _PORTS)
        if port not in found and all(_bindable(host, port) for host in hosts):
            found.append(port)
    return found


def _bindable(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _sockets() -> Iterator[tuple[tuple[str, int], str, str]]:
    """(local address, state, inode) of each TCP socket of IPv4."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        host, port = fields[1].split(":")
        yield (socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)), fields[3], fields[9]


def _inodes(pid: int) -> set[str]:
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(entry.path)
            except OSError:  # closed meanwhile
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # gone
        pass
    return found
