"""Web demo: a page that asks one or two models about uploaded figures.

The page holds the state of a conversation. The server keeps only the answers in progress, and opens no files
or URLs named in a request.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from internvl_chat.data.encode.tiling import Grid, tiles_per_image
from internvl_chat.data.sources.problems import printable_message
from internvl_chat.data.sources.record_warnings import question_warnings
from internvl_chat.data.sources.uploads import MAX_BYTES, MAX_IMAGES, decode_uploads, upload_warnings
from internvl_chat.inference.responses import MAX_PREPARING, AnswerStream, add_error_handlers
from internvl_chat.inference.scheduler import MAX_NEW_TOKENS, Completion, Scheduler
from internvl_chat.inference.web.archive import export
from internvl_chat.inference.web.examples import EXAMPLES, example_image
from internvl_chat.inference.web.schema import (
    MAX_TEMPERATURE,
    AnswerRequest,
    ExportRequest,
    PlanRequest,
    parse,
)
from internvl_chat.utils.errors import DataError, M3LLMError
from internvl_chat.utils.html import STYLE, image_data_url, jpeg_thumbnail, templates
from internvl_chat.utils.web import RequestGuard

PACKAGE = "internvl_chat.inference.web"
_PREVIEW_PIXELS = 1024
# Images are sent in base64, which takes 4 bytes for 3; the rest is for the text.
_MAX_IMAGE_BYTES = (MAX_BYTES - (1 << 20)) // 4 * 3
# Numbers of the examples and their images in paths.
_EXAMPLE_IMAGES = {
    (str(number), str(index))
    for number, example in enumerate(EXAMPLES)
    for index in range(example.num_images)
}


def create_app(models: Mapping[str, Scheduler]) -> FastAPI:
    """Return the web application.

    Args:
        models: name and scheduler of each model.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestGuard, max_bytes=MAX_BYTES)
    add_error_handlers(app, _error)
    app.mount("/static", StaticFiles(directory=str(files(PACKAGE) / "static")), name="static")
    demo = _Demo(models)
    app.add_api_route("/", demo.page, response_class=HTMLResponse)
    app.add_api_route("/api/image", demo.image, methods=["POST"], response_model=None)
    app.add_api_route("/api/plan", demo.plan, methods=["POST"], response_model=None)
    app.add_api_route("/api/answer", demo.answer, methods=["POST"], response_model=None)
    app.add_api_route("/api/export", demo.export, methods=["POST"], response_model=None)
    app.add_api_route("/examples/{number}/{index}", demo.example, response_model=None)
    return app


class _Demo:
    """Request handlers."""

    def __init__(self, models: Mapping[str, Scheduler]) -> None:
        self.names, self.schedulers = list(models), list(models.values())
        self._preparing = anyio.CapacityLimiter(MAX_PREPARING)
        # Images are shown as the first model sees them.
        self._options = self.schedulers[0].engine.encoder.preprocessing.image_options
        self._page = (
            templates(PACKAGE)
            .get_template("demo.html")
            .render(
                style=STYLE,
                config=self._config(),
                models=self.names,
                examples=EXAMPLES,
                max_new_tokens=MAX_NEW_TOKENS,
                max_temperature=MAX_TEMPERATURE,
            )
        )

    def _config(self) -> dict[str, Any]:
        options = [scheduler.engine.encoder.preprocessing for scheduler in self.schedulers]
        return {
            "models": self.names,
            "tokensPerTile": [each.tokens_per_tile for each in options],
            "maxImages": MAX_IMAGES,
            "maxBytes": _MAX_IMAGE_BYTES,
        }

    async def page(self) -> HTMLResponse:
        """Return the page."""
        return HTMLResponse(self._page)

    async def image(self, request: Request, name: str = "") -> Response:
        """Check an uploaded image and return its size, a preview and warnings."""
        data = await request.body()
        shown = printable_message(name)[:100] or "(unnamed)"
        described = await anyio.to_thread.run_sync(self._describe, data, shown, limiter=self._preparing)
        return JSONResponse(described)

    def _describe(self, data: bytes, name: str) -> dict[str, Any]:
        [image] = decode_uploads([data], self._options, [name])
        width, height = image.size
        preview = image_data_url(jpeg_thumbnail(image, _PREVIEW_PIXELS), "jpeg")
        warnings = upload_warnings(data, name, self._options)
        return {"width": width, "height": height, "preview": preview, "warnings": warnings}

    async def plan(self, request: Request) -> Response:
        """Return the tile grids of images for each model."""
        sizes = parse(PlanRequest, await request.body()).sizes
        return JSONResponse([_plan(scheduler, sizes) for scheduler in self.schedulers])

    async def answer(self, request: Request) -> Response:
        """Stream a model's answer to the last question as JSON lines."""
        body = await request.body()
        completion, warnings = await anyio.to_thread.run_sync(self._submit, body, limiter=self._preparing)
        return AnswerStream(completion, _lines(completion, warnings), "application/x-ndjson")

    def _submit(self, body: bytes) -> tuple[Completion, list[str]]:
        """Decode the images of a request and queue its prompt; runs in a thread."""
        asked = parse(AnswerRequest, body)
        if asked.model >= len(self.schedulers):
            raise DataError(f"there is no model {asked.model}")
        scheduler = self.schedulers[asked.model]
        scheduler.check_open()
        preprocessing = scheduler.engine.encoder.preprocessing
        prompt = asked.prompt(preprocessing.image_options)
        completion = scheduler.submit(prompt, max_new_tokens=asked.max_new_tokens, sampling=asked.sampling)
        escaped = preprocessing.escape_control_tokens
        return completion, list(question_warnings(asked.questions[-1].text, escaped=escaped))

    async def export(self, request: Request) -> Response:
        """Return the conversation as a zip file."""
        body = await request.body()
        content = await anyio.to_thread.run_sync(
            lambda: export(parse(ExportRequest, body), self.names), limiter=self._preparing
        )
        disposition = 'attachment; filename="conversation.zip"'
        return Response(content, media_type="application/zip", headers={"content-disposition": disposition})

    def example(self, number: str, index: str) -> Response:
        """Return an image of an example."""
        if (number, index) not in _EXAMPLE_IMAGES:
            raise HTTPException(404, "there is no such example")
        return Response(example_image(int(number), int(index)), media_type="image/jpeg")


def _plan(scheduler: Scheduler, sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Return the tile grid of each image.

    A conversation that is too long gets fewer tiles; the response to its question reports the actual grids.
    """
    encoder = scheduler.engine.encoder
    max_tiles = tiles_per_image(encoder.preprocessing.max_dynamic_patch, max(len(sizes), 1))
    return _as_lists([encoder.plan_grid(size, max_tiles) for size in sizes])


def _as_lists(grids: Sequence[Grid]) -> list[list[int]]:
    """Return (columns, rows, thumbnail) of each grid."""
    return [[grid.columns, grid.rows, int(grid.thumbnail)] for grid in grids]


async def _lines(completion: Completion, warnings: list[str]) -> AsyncIterator[str]:
    encoded = completion.encoded
    yield _line(
        promptTokens=completion.prompt_tokens,
        imageTokens=completion.image_tokens,
        grids=_as_lists(encoded.grids),
        tilesLost=encoded.tiles_lost,
        warnings=warnings,
    )
    try:
        async for piece in completion:
            yield _line(text=piece, answerTokens=completion.completion_tokens)
    except M3LLMError as error:
        yield _line(error=str(error))
        return
    yield _line(finishReason=completion.finish_reason, answerTokens=completion.completion_tokens)


def _line(**content: Any) -> str:
    return json.dumps(content) + "\n"


def _error(status: int, message: str) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    return JSONResponse({"error": {"message": message}}, status, headers)
