"""Web application of the data browser: record list, record pages, and images.

All pages are rendered on the server. Requests refer to records and images by number, never by path.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from internvl_chat.data.browse import pictures
from internvl_chat.data.browse.pages import PACKAGE, Pages
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import RecordError, printable_message
from internvl_chat.utils.errors import DataError, StorageError, UsageError
from internvl_chat.utils.text import counted
from internvl_chat.utils.web import RequestGuard

_MAX_BODY = 1 << 20
# Images may change on disk.
_CACHE = {"cache-control": "private, max-age=30"}


def create_app(pages: Pages) -> FastAPI:
    """Return the application; it builds the index in the background."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pages.index.start()
        yield
        pages.index.stop()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(RequestGuard, max_bytes=_MAX_BODY)
    app.mount("/static", StaticFiles(directory=str(files(PACKAGE) / "static")), name="static")
    _add_pages(app, pages)
    _add_pictures(app, pages)
    _add_errors(app, pages)
    return app


def _add_pages(app: FastAPI, pages: Pages) -> None:
    @app.get("/")
    def record_list(request: Request) -> HTMLResponse:
        return HTMLResponse(pages.record_list(request.query_params))

    @app.get("/record/{set_number}/{index}")
    def record(set_number: int, index: int, request: Request) -> HTMLResponse:
        _records(pages, set_number, index)
        return HTMLResponse(pages.record(set_number, index, request.query_params))

    @app.get("/jump")
    def jump(request: Request) -> RedirectResponse:
        path = pages.jump(request.query_params)
        if path is None:
            name = printable_message(request.query_params["id"])
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no record has the id {name!r}")
        return RedirectResponse(path, HTTPStatus.SEE_OTHER)

    @app.get("/status")
    def status() -> dict[str, Any]:
        return pages.status()


def _add_pictures(app: FastAPI, pages: Pages) -> None:
    """Add the routes of images; the response for an image that cannot be shown is the reason as text."""

    def respond(set_number: int, index: int, kind: str, render: Callable[[RecordSet], bytes]) -> Response:
        records = _records(pages, set_number, index)
        try:
            pages.catalog.check_file(set_number)
            return Response(render(records), media_type=f"image/{kind}", headers=_CACHE)
        except (DataError, RecordError) as error:
            message = error.message if isinstance(error, DataError) else printable_message(str(error))
            return PlainTextResponse(message, HTTPStatus.UNPROCESSABLE_ENTITY)

    @app.get("/thumbnail/{set_number}/{index}/{image}")
    def thumbnail(set_number: int, index: int, image: int) -> Response:
        return respond(set_number, index, "jpeg", lambda records: pictures.thumbnail(records, index, image))

    @app.get("/figure/{set_number}/{index}/{image}")
    def figure(set_number: int, index: int, image: int) -> Response:
        return respond(set_number, index, "jpeg", lambda records: pictures.figure(records, index, image))

    @app.get("/tile/{set_number}/{index}/{image}/{number}")
    def tile(set_number: int, index: int, image: int, number: int) -> Response:
        return respond(set_number, index, "png", lambda records: pictures.tile(records, index, image, number))


def _records(pages: Pages, set_number: int, index: int) -> RecordSet:
    """Return a dataset if it has a record with this index; otherwise respond with status 404."""
    sets = pages.catalog.sets
    if not 0 <= set_number < len(sets):
        raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no dataset {set_number}")
    records = sets[set_number]
    if not 0 <= index < len(records):
        last = f"dataset {records.spec.name} has {counted(len(records), 'record')}: 0 to {len(records) - 1:,}"
        raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no record {index}: {last}")
    return records


def _add_errors(app: FastAPI, pages: Pages) -> None:
    """Respond to invalid requests with a page that describes the error."""

    def show(status: int, heading: str, messages: list[str]) -> HTMLResponse:
        return HTMLResponse(pages.error(heading, messages), status)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> HTMLResponse:
        return show(error.status_code, HTTPStatus(error.status_code).phrase, [str(error.detail)])

    @app.exception_handler(RequestValidationError)
    def invalid_number(request: Request, error: RequestValidationError) -> HTMLResponse:
        message = "datasets, records and images are numbered from 0"
        return show(HTTPStatus.NOT_FOUND, HTTPStatus.NOT_FOUND.phrase, [message])

    @app.exception_handler(UsageError)
    def invalid_parameters(request: Request, error: UsageError) -> HTMLResponse:
        return show(HTTPStatus.BAD_REQUEST, "Invalid request", error.problems)

    @app.exception_handler(DataError)
    def unusable_file(request: Request, error: DataError) -> HTMLResponse:
        return show(HTTPStatus.CONFLICT, "Data changed", [str(error)])

    @app.exception_handler(StorageError)
    def unavailable(request: Request, error: StorageError) -> HTMLResponse:
        return show(HTTPStatus.BAD_GATEWAY, "Images unavailable", [str(error)])

    @app.exception_handler(Exception)
    def internal_error(request: Request, error: Exception) -> HTMLResponse:
        message = "An internal error occurred; its traceback is in the terminal of m3llm data browse."
        return show(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error", [message])
