"""Run local web applications: templates, request checks, security headers and server."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable
from types import FrameType
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

LOCALHOST = "127.0.0.1"
# Seconds for open requests to complete after an interrupt.
_SHUTDOWN_SECONDS = 5
_HEADERS = {
    # Pages load nothing from other sites and cannot be framed by them.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' "
    "'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Browsers revalidate static files, because an update of the package may change them.
    "cache-control": "no-cache",
}


class TooLarge(Exception):
    """The body of a request exceeds the limit."""


class RequestGuard:
    """ASGI middleware that rejects large bodies, foreign hosts and pages, and adds security headers.

    - 413: the body of the request is too large.
    - 421: the server listens on this machine only, but the request names a different host. This prevents DNS
      rebinding, in which a web page makes its own host name resolve to 127.0.0.1 to read the responses.
    - 403: the request comes from a page of another site, which could keep the model busy, although it cannot
      read the response.

    Args:
        app: application to wrap.
        max_bytes: maximum size of a request body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, started = 0, False

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise TooLarge
            return message

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = {name for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in names]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        if _is_local((scope.get("server") or ("",))[0]) and not _is_local(host := _host(scope)):
            message = f"host '{host}' is not this machine; use localhost, or serve other machines with --host"
            await _error(message, 421)(scope, receive, with_headers)
            return
        is_link = scope["method"] in ("GET", "HEAD")
        if not is_link and _header(scope, b"sec-fetch-site", "") == "cross-site":  # set by browsers
            await _error("requests of other sites are not allowed", 403)(scope, receive, with_headers)
            return
        declared = _header(scope, b"content-length", "0")
        try:
            if declared.isdigit() and int(declared) > self.max_bytes:
                raise TooLarge
            await self.app(scope, limited, with_headers)
        except TooLarge:
            if started:
                raise
            message = f"the request is larger than {self.max_bytes >> 20} MB"
            await _error(message, 413)(scope, receive, with_headers)


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


def _header(scope: Scope, name: bytes, default: str) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), default)


def _host(scope: Scope) -> str:
    """Return the host name of a request, without the port."""
    try:
        return (urlsplit(f"//{_header(scope, b'host', 'localhost')}").hostname or "").rstrip(".")
    except ValueError:  # not a valid host
        return ""


def _is_local(host: str) -> bool:
    """Return whether a host name or address denotes this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def open_socket(host: str, port: int) -> socket.socket:
    """Bind a socket before a model is loaded, so that a port in use is reported early.

    Args:
        port: TCP port; 0 chooses a free port.

    Raises:
        UsageError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use; choose a different --port") from None
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return opened


def address(opened: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Server that calls a function immediately when the process is interrupted."""

    def __init__(self, config: uvicorn.Config, on_interrupt: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.on_interrupt = on_interrupt

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.on_interrupt is not None:
            self.on_interrupt()
        super().handle_exit(sig, frame)


def run_app(
    app: FastAPI,
    opened: socket.socket,
    *,
    on_interrupt: Callable[[], None] | None = None,
    has_key: bool = False,
) -> None:
    """Serve an application on a bound socket until the process is interrupted.

    Args:
        app: the application.
        opened: result of `open_socket`.
        on_interrupt: ends streamed responses, for which the server would otherwise wait.
        has_key: whether the application requires an API key.
    """
    url = address(opened)
    host = opened.getsockname()[0]
    if host not in (LOCALHOST, "::1") and not has_key:
        logger.warning("listening on %s: everyone who can reach this address can use the application", host)
    opened.listen()  # from now on, connections are queued until the server runs
    logger.info("%s (stop with Ctrl+C)", url)
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
        _Server(config, on_interrupt).run(sockets=[opened])
