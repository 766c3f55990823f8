"""What machines ask: which models, is it alive, is it ready, what are the figures, which version."""

from __future__ import annotations

import time

from aiohttp import web

import baton
from baton.metrics import CONTENT_TYPE, Metrics
from router.http.answering import Json
from router.http.asked import not_served
from router.request import Generates, ServedModel


class System:
    def __init__(self, core: Generates, metrics: Metrics) -> None:
        self._core = core
        self._metrics = metrics
        self._started = int(time.time())

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card(model) for model in self._core.models()]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        served = {model.name: model for model in self._core.models()}
        if name not in served:
            raise not_served(name, list(served))
        return web.json_response(self._card(served[name]))

    async def ready(self, request: web.Request) -> web.Response:
        """503 says in `missing` what is missing. For load balancers: stop sending, do not restart."""
        missing = self._core.ready()
        if missing:
            return web.json_response({"status": "not ready", "missing": missing}, status=503)
        return web.json_response({"status": "ready"})

    async def alive(self, request: web.Request) -> web.Response:
        """200 while the event loop turns, whatever else is missing."""
        return web.json_response({"status": "alive"})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": baton.__version__})

    def _card(self, model: ServedModel) -> Json:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "baton",
            "max_model_len": model.max_model_len,
        }
