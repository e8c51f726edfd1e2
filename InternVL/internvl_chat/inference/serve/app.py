"""OpenAI-compatible web application: chat completions, models and health."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from internvl_chat.data.sources.uploads import MAX_BYTES
from internvl_chat.inference.responses import MAX_PREPARING, AnswerStream, add_error_handlers, status_of
from internvl_chat.inference.scheduler import Completion, Scheduler
from internvl_chat.inference.serve.prompt import to_prompt
from internvl_chat.inference.serve.schema import ChatRequest, describe_errors
from internvl_chat.utils.errors import M3LLMError
from internvl_chat.utils.web import RequestGuard


class ApiError(Exception):
    """An error with its HTTP status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        super().__init__(message)


def create_app(scheduler: Scheduler, model_name: str, api_key: str | None = None) -> FastAPI:
    """Return the web application.

    Args:
        scheduler: answers the requests.
        model_name: name of the model in requests and answers.
        api_key: API key that clients must send (default: none).
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestGuard, max_bytes=MAX_BYTES)
    app.add_exception_handler(ApiError, _on_api_error)
    add_error_handlers(app, lambda status, message: _response(ApiError(status, message)))
    server = _ChatServer(scheduler, model_name)

    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if api_key is not None and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    router = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])
    router.add_api_route("/chat/completions", server.chat, methods=["POST"], response_model=None)
    router.add_api_route("/models", server.list_models)
    router.add_api_route("/models/{name:path}", server.model)
    app.include_router(router)
    app.add_api_route("/health", server.health, response_model=None)
    return app


class _ChatServer:
    """Request handlers."""

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self.scheduler, self.model_name = scheduler, model_name
        self.started = int(time.time())
        self._preparing = anyio.CapacityLimiter(MAX_PREPARING)

    async def chat(self, request: Request) -> Response:
        """Answer a chat request."""
        self.scheduler.check_open()
        body = await request.body()
        chat, completion = await anyio.to_thread.run_sync(self._submit, body, limiter=self._preparing)
        reply = _Reply(self.model_name, completion)
        if chat.stream:
            include_usage = chat.stream_options is not None and chat.stream_options.include_usage
            return AnswerStream(completion, reply.events(include_usage), "text/event-stream")
        watcher = asyncio.create_task(_cancel_on_disconnect(request, completion))
        try:
            return JSONResponse(await reply.complete())
        finally:
            watcher.cancel()

    def _submit(self, body: bytes) -> tuple[ChatRequest, Completion]:
        """Parse a request, decode its images and queue its prompt; runs in a thread."""
        try:
            chat = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            message, param = describe_errors(error)
            raise ApiError(400, message, param=param) from None
        self._check_model(chat.model)
        prompt = to_prompt(chat, self.scheduler.engine.encoder.preprocessing.image_options)
        return chat, self.scheduler.submit(
            prompt, max_new_tokens=chat.max_new_tokens, sampling=chat.sampling, stop=chat.stop
        )

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"the model {name!r:.80} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def list_models(self) -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [await self.model(self.model_name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        self._check_model(name)
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "m3llm",
            "max_model_len": self.scheduler.engine.max_length,
        }

    async def health(self) -> Response:
        """Report whether the model works, and the number of running and waiting requests."""
        failure = self.scheduler.failure
        state = {
            "status": "ok" if failure is None else "failed",
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
        }
        return JSONResponse(state, 200 if failure is None else 503)


class _Reply:
    """Response to a chat request in OpenAI's format."""

    def __init__(self, model_name: str, completion: Completion) -> None:
        self.completion = completion
        self.common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    async def complete(self) -> dict[str, Any]:
        """Return the response once the answer is complete; cancel the answer if the response is abandoned."""
        try:
            text = "".join([piece async for piece in self.completion])
        finally:
            self.completion.cancel()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": self.completion.finish_reason,
        }
        return {**self.common, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events."""
        unknown = {"usage": None} if include_usage else {}
        try:
            yield self._chunk({"role": "assistant", "content": ""}, **unknown)
            async for piece in self.completion:
                yield self._chunk({"content": piece}, **unknown)
        except M3LLMError as error:
            yield _event({"error": ApiError(status_of(error), str(error)).error})
            return
        yield self._chunk({}, self.completion.finish_reason, **unknown)
        if include_usage:
            yield self._chunk(None, usage=self._usage())
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str] | None, reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        choices = [] if delta is None else [choice]
        return _event({**self.common, "object": "chat.completion.chunk", "choices": choices, **more})

    def _usage(self) -> dict[str, Any]:
        prompt, answer = self.completion.prompt_tokens, self.completion.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"image_tokens": self.completion.image_tokens},
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _cancel_on_disconnect(request: Request, completion: Completion) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    completion.cancel()


def _response(error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse({"error": error.error}, error.status, headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)
