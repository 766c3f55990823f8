from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from baton.errors import PortInUse, RedisUnreachable
from discovery import EmbeddedRedis, connect
from tests.discovery.conftest import eventually


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # nobody may be there to reap an orphan


async def test_killed_it_starts_again_on_its_port_and_has_kept_nothing(own_server: EmbeddedRedis) -> None:
    url, pid = own_server.url, own_server.pid
    assert pid is not None
    client = await connect(url)
    await client.set("key", "value")
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not own_server.running, "it is dead")
    assert own_server.pid is None
    own_server.start()
    assert own_server.url == url
    assert own_server.pid != pid
    again = await connect(url)
    assert await again.dbsize() == 0
    await client.aclose()
    await again.aclose()


def test_start_and_stop_may_be_repeated() -> None:
    server = EmbeddedRedis()
    server.stop()
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()
    assert pid is not None
    assert not is_alive(pid)
    assert not server.running


def test_a_stopped_server_is_ended_all_the_same(own_server: EmbeddedRedis) -> None:
    pid = own_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    own_server.stop()
    assert not is_alive(pid)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use"):
            EmbeddedRedis(port).start()


def test_what_it_says_when_it_cannot_start_is_passed_on() -> None:
    with pytest.raises(RedisUnreachable, match=r"did not start on .*it said: .*maxmemory"):
        EmbeddedRedis(max_memory="lots").start()


def test_servers_get_ports_of_their_own_and_leave_no_files() -> None:
    with EmbeddedRedis() as one, EmbeddedRedis() as two:
        assert one.port != two.port
        assert one._directory is not None
        directory = Path(one._directory.name)
        assert directory.exists()
    assert not directory.exists()


def test_it_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedRedis()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    assert server.running
    server.stop()


def test_ctrl_c_for_the_parents_group_does_not_reach_it(own_server: EmbeddedRedis) -> None:
    assert own_server.pid is not None
    assert os.getpgid(own_server.pid) != os.getpgid(0)


PARENT = """
import threading, time
from discovery.embedded import EmbeddedRedis
server = EmbeddedRedis()
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
print(server.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
async def test_kill_9_of_the_parent_leaves_no_orphan() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)}
    command = [sys.executable, "-c", PARENT]
    parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    await parent.wait()
    await eventually(lambda: not is_alive(pid), "the server dies with it")
