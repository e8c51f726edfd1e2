"""Limits, host names, requests of other sites, security headers and sockets of local web applications."""

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.web import RequestGuard, address, open_socket


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(RequestGuard, max_bytes=1 << 20)

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    return TestClient(app)


def test_body_below_the_limit(client):
    response = client.post("/size", content=b"x" * (1 << 20))
    assert (response.status_code, response.json()) == (200, 1 << 20)
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize("declared", [True, False], ids=["content length", "chunked"])
def test_body_above_the_limit(client, declared):
    chunk = b"x" * (1 << 20)
    content = chunk + b"x" if declared else iter([chunk, b"x"])
    response = client.post("/size", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the request is larger than 1 MB"


@pytest.mark.parametrize(
    ("server", "host", "status"),
    [
        ("http://127.0.0.1:8000", None, 200),
        ("http://127.0.0.1:8000", "localhost:8000", 200),
        ("http://127.0.0.1:8000", "demo.localhost.", 200),
        ("http://127.0.0.1:8000", "[::1]:8000", 200),
        ("http://127.0.0.1:8000", "rebound.example:8000", 421),
        ("http://127.0.0.1:8000", "127.0.0.1.example", 421),
        ("http://127.0.0.1:8000", "[", 421),
        ("http://127.0.0.1:8000", "", 421),
        ("http://192.0.2.7:8000", "workstation.example:8000", 200),
    ],
)
def test_a_local_server_rejects_foreign_host_names(client, server, host, status):
    local = TestClient(client.app, base_url=server)
    response = local.post("/size", headers={} if host is None else {"host": host})
    assert response.status_code == status
    if status == 421:
        assert "is not this machine; use localhost" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "site", "status"),
    [
        ("POST", "cross-site", 403),
        ("POST", "same-site", 200),
        ("POST", "same-origin", 200),
        ("POST", "none", 200),
        ("GET", "cross-site", 405),  # a link
    ],
)
def test_pages_of_other_sites_cannot_send_requests(client, method, site, status):
    response = client.request(method, "/size", headers={"sec-fetch-site": site, "content-type": "text/plain"})
    assert response.status_code == status


def test_port_in_use():
    with open_socket("127.0.0.1", 0) as opened:
        opened.listen()
        port = opened.getsockname()[1]
        assert address(opened) == f"http://127.0.0.1:{port}"
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            open_socket("127.0.0.1", port)


def test_unknown_host():
    with pytest.raises(UsageError, match=r"--host 256\.0\.0\.1 --port 0"):
        open_socket("256.0.0.1", 0)
