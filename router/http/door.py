"""Opens and closes the HTTP door: routes, limits, the port. Must run on the router's event loop."""

from __future__ import annotations

import errno

from aiohttp import web

from baton.errors import ConfigError, PortInUse
from baton.metrics import Metrics
from router.http.asked import identify, return_request_id
from router.http.chat import ChatCompletions
from router.http.completions import Completions
from router.http.errors import MAX_BODY_BYTES, errors_as_json
from router.http.system import System
from router.request import WRITE_TIMEOUT_SECONDS, Generates


class HttpDoor:
    """An open door. Make one with `start_http`."""

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self.host = host
        self.port = port
        """The port that is listened on, also where 0 was asked for."""

    async def stop(self) -> None:
        """Takes no more connections, lets open requests end for as long as was said, then cancels what is left."""
        await self._runner.cleanup()


async def start_http(
    core: Generates,
    metrics: Metrics,
    *,
    host: str,
    port: int,
    max_body_bytes: int,
    drain_seconds: float = 30.0,
    write_timeout_seconds: float = WRITE_TIMEOUT_SECONDS,
) -> HttpDoor:
    """Serves from the moment it returns.

    `port` 0 picks a free one. `drain_seconds`: how long `stop` waits for open requests. A client that takes nothing of
    its stream for `write_timeout_seconds` is cut off. Raises PortInUse, or ConfigError where the address is no good.
    """
    app = web.Application(middlewares=[identify, errors_as_json], client_max_size=max_body_bytes)
    app[MAX_BODY_BYTES] = max_body_bytes
    app.on_response_prepare.append(return_request_id)
    system = System(core, metrics)
    app.add_routes(
        [
            web.post("/v1/completions", Completions(core, write_timeout_seconds).handle),
            web.post("/v1/chat/completions", ChatCompletions(core, write_timeout_seconds).handle),
            web.get("/v1/models", system.models),
            web.get("/v1/models/{name:.+}", system.model),  # a served name may be a hub id, with its slash
            web.get("/health", system.ready),
            web.get("/readyz", system.ready),
            web.get("/healthz", system.alive),
            web.get("/metrics", system.metrics),
            web.get("/version", system.version),
        ]
    )
    # With handler_cancellation a client that leaves cancels its handler, and so its generation on the workers.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=drain_seconds)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"HTTP port {port} on {host} is in use; choose another with --http-port, or 0 for any free one"
            ) from None
        raise ConfigError(f"cannot listen for HTTP on {host} port {port}: {error}") from error
    return HttpDoor(runner, host, runner.addresses[0][1])
