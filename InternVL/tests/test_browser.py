"""Headless Chromium reports JavaScript errors, and the test server is reachable."""

import pytest
from browser import needs_browser, open_page, screenshot, served
from fastapi import FastAPI
from fastapi.responses import HTMLResponse


@needs_browser
def test_page_of_a_served_application(tmp_path):
    app = FastAPI()

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse("<h1>Served</h1>")

    with served(app) as url, open_page() as page:
        page.goto(url)
        assert page.locator("h1").inner_text() == "Served"
        screenshot(page, "served", tmp_path)


@needs_browser
def test_javascript_error():
    with pytest.raises(AssertionError, match="broken"), open_page() as page:
        page.set_content("<script>throw new Error('broken')</script>")
