"""Headless Chromium for tests of pages and web applications."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Page, sync_playwright

from internvl_chat.utils.web import address, open_socket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="requires Chromium (Debian package chromium)")


@contextlib.contextmanager
def open_page(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Open a blank page; a JavaScript error on it fails the test."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            yield page
        finally:
            browser.close()
        assert not errors, errors


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application in a thread and return its URL."""
    opened = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield address(opened)
    finally:
        server.should_exit = True
        thread.join()
        opened.close()


def screenshot(page: Page, name: str, folder: Path, *, full_page: bool = False) -> None:
    """Save a screenshot to a test's folder, or to $M3LLM_SCREENSHOTS to update the pictures of the docs."""
    target = Path(os.environ.get("M3LLM_SCREENSHOTS", folder)) / f"{name}.png"
    page.screenshot(path=target, full_page=full_page)
    assert target.stat().st_size > 0
