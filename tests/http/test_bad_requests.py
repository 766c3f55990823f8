"""What is wrong before any field is looked at, and what machines ask."""

from __future__ import annotations

import gzip
import re
from typing import Any

import pytest
from prometheus_client import Gauge

from tests.http.conftest import MAX_BODY_BYTES, Served
from tests.http.fake_core import MODEL

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be an object"),
        (b'"x"', "must be an object"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        ('{"prompt": "é"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested too deeply"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "number that cannot be read"),
    ],
    ids=range(11),
)
async def test_a_body_that_cannot_be_read_is_refused(served: Served, data: bytes, said: str) -> None:
    status, body, _ = await served.post(PATH, data=data)
    error: Any = body["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert said in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_cap_is_refused(served: Served, chunked: bool) -> None:
    data = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'

    async def pieces() -> Any:
        yield data

    status, body, _ = await served.post(PATH, data=pieces() if chunked else data)
    error: Any = body["error"]
    assert (status, error["code"]) == (413, "message_too_large")
    assert str(MAX_BODY_BYTES) in error["message"]


async def test_a_compressed_body_counts_as_what_it_unpacks_to(served: Served) -> None:
    packed = gzip.compress(b'{"prompt": "' + b"x" * 50 * MAX_BODY_BYTES + b'"}')
    assert len(packed) < MAX_BODY_BYTES
    status, body, _ = await served.post(PATH, data=packed, headers={"Content-Encoding": "gzip"})
    error: Any = body["error"]
    assert (status, error["code"]) == (413, "message_too_large")


async def test_a_body_that_is_not_compressed_as_it_says_is_refused(served: Served) -> None:
    status, body, _ = await served.post(PATH, data=b"plain", headers={"Content-Encoding": "gzip"})
    assert status == 400
    assert "error" in body


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
async def test_an_unknown_model_is_not_found(served: Served, path: str) -> None:
    body = {"model": "gpt-0", "prompt": "x"} if path == PATH else {
        "model": "gpt-0",
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    status, answer, _ = await served.post(path, body)
    error: Any = answer["error"]
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert MODEL in error["message"]


async def test_while_nothing_is_served_requests_are_told_what_is_missing(served: Served) -> None:
    served.core.served, served.core.missing = [], "no decode worker"
    status, body, response = await served.post(PATH, {"prompt": "x"})
    error: Any = body["error"]
    assert (status, error["code"]) == (503, "unavailable")
    assert "no decode worker" in error["message"]
    assert response.headers["Retry-After"] == "1"


async def test_an_unknown_path_is_told_in_json(served: Served) -> None:
    status, body, _ = await served.post("/v1/embeddings", {})
    error: Any = body["error"]
    assert status == 404
    assert "/v1/embeddings" in error["message"]


async def test_a_wrong_method_is_told_in_json(served: Served) -> None:
    async with served.http.get(served.url + PATH) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert "use POST" in (await response.json())["error"]["message"]


async def test_an_internal_error_shows_no_insides(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.core.script = lambda spec: [RuntimeError("secret")]
    status, body, response = await served.post(PATH, {"prompt": "x"})
    error: Any = body["error"]
    assert (status, error["code"]) == (500, "internal_error")
    assert "secret" not in str(body)
    assert response.headers["X-Request-Id"] in error["message"]
    assert "secret" in caplog.text


async def test_a_request_id_is_taken_and_returned(served: Served) -> None:
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
        async with served.http.post(served.url + PATH, json=body, headers={"X-Request-Id": "trace-7"}) as response:
            assert response.headers["X-Request-Id"] == "trace-7"
            await response.read()
    assert [spec.request_id for spec in served.core.specs] == ["trace-7", "trace-7"]


@pytest.mark.parametrize("sent", ["", "x" * 121, "with space", "é"])
async def test_a_request_id_that_is_not_plain_is_replaced(served: Served, sent: str) -> None:
    async with served.http.post(served.url + PATH, json={"prompt": "x"}, headers={"X-Request-Id": sent}) as response:
        assert re.fullmatch(r"req-[0-9a-f]{16}", response.headers["X-Request-Id"])


async def test_what_the_server_refuses_by_itself_has_a_request_id_too(served: Served) -> None:
    async with served.http.post(served.url + PATH, data=b"{}", headers={"Expect": "the impossible"}) as response:
        assert response.status == 417
        assert response.headers["X-Request-Id"]


async def test_models_are_listed_and_looked_up(served: Served) -> None:
    async with served.http.get(f"{served.url}/v1/models") as response:
        (card,) = (await response.json())["data"]
    assert (card["id"], card["max_model_len"], card["object"]) == (MODEL, 4096, "model")
    async with served.http.get(f"{served.url}/v1/models/{MODEL}") as response:
        assert await response.json() == card
    async with served.http.get(f"{served.url}/v1/models/other") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


async def test_health_follows_the_core(served: Served) -> None:
    for path in ("/health", "/readyz", "/healthz"):
        async with served.http.get(served.url + path) as response:
            assert response.status == 200
    served.core.missing = "no decode worker is known"
    for path in ("/health", "/readyz"):
        async with served.http.get(served.url + path) as response:
            assert response.status == 503
            assert (await response.json())["missing"] == "no decode worker is known"
    async with served.http.get(served.url + "/healthz") as response:
        assert response.status == 200


async def test_metrics_are_the_registrys(served: Served) -> None:
    Gauge("something", "A figure.", registry=served.metrics.registry).set(3)
    async with served.http.get(served.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert "something 3.0" in await response.text()


async def test_the_version_is_told(served: Served) -> None:
    async with served.http.get(served.url + "/version") as response:
        assert (await response.json())["version"]
