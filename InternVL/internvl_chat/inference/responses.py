"""HTTP responses of the server and the web demo."""

from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from internvl_chat.inference.scheduler import Completion, QueueFullError, SchedulerStoppedError
from internvl_chat.utils.errors import DataError, M3LLMError


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


def status_of(error: M3LLMError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, QueueFullError | SchedulerStoppedError):
        return 503
    return 400 if isinstance(error, DataError) else 500
