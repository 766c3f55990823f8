"""The HTTP door: OpenAI's API, health and metrics over the router's core. Knows no worker and no tokens' meaning."""

from router.http.door import HttpDoor, start_http

__all__ = ["HttpDoor", "start_http"]
