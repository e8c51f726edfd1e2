"""HTTP responses of the server and the web demo: streamed answers and errors."""

from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from internvl_chat.inference.scheduler import Completion, QueueFullError, SchedulerStoppedError
from internvl_chat.utils.errors import DataError, M3LLMError

# Maximum number of requests whose images are decoded at the same time, to limit memory.
MAX_PREPARING = 4
_CLIENT_CLOSED = 499


class AnswerStream(StreamingResponse):
    """Streamed answer, which is cancelled if the client disconnects, even before the first piece of text.

    Args:
        completion: the answer.
        events: text of the response.
        media_type: type of the response.
    """

    def __init__(self, completion: Completion, events: AsyncIterator[str], media_type: str) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies must not buffer it
        super().__init__(events, media_type=media_type, headers=headers)
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.completion.cancel()


def add_error_handlers(app: FastAPI, respond: Callable[[int, str], Response]) -> None:
    """Add handlers that turn errors into responses.

    Args:
        app: the application.
        respond: returns the response for an HTTP status and a message.
    """

    async def on_m3llm_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, M3LLMError)
        return respond(status_of(error), str(error))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return respond(error.status_code, f"{error.detail}: {request.method} {request.url.path}")

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED)

    async def on_unexpected_error(request: Request, error: Exception) -> Response:
        return respond(500, "internal error; see the log of the server")

    app.add_exception_handler(M3LLMError, on_m3llm_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_unexpected_error)


def status_of(error: M3LLMError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, QueueFullError | SchedulerStoppedError):
        return 503
    return 400 if isinstance(error, DataError) else 500
