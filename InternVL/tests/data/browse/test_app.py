"""The pages of the data browser: requests, hostile records, and a headless browser."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import needs_browser, open_page, screenshot, served
from fastapi.testclient import TestClient
from playwright.sync_api import expect
from small_sets import break_inside, encoder, image_record, noise, text_record, write_png, write_set

from internvl_chat.data.browse.app import create_app
from internvl_chat.data.browse.catalog import BackgroundIndex, Catalog
from internvl_chat.data.browse.pages import Pages
from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.sources.meta import load_meta

SCRIPT = "<script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"


def pages_of(sets, cache, title="train.json") -> Pages:
    catalog = Catalog(sets)
    return Pages(catalog, BackgroundIndex(catalog, cache), title)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Pages of records that are malformed, huge, or contain HTML."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "images").mkdir()
    noise(80, 20).save(folder / "images/wide.png")
    noise(20, 20).save(folder / "images/Röntgen <b>.png")
    noise(200, 200).save(folder / "images/broken.png")
    break_inside(folder / "images/broken.png")
    write_png(folder / "images/huge.png", 8000, 8000)
    records = [
        text_record(0, SCRIPT, note=SCRIPT) | {"id": SCRIPT},
        text_record(1, "a cat " * 20_000),
        image_record(2, *["wide.png"] * 50),
        image_record(3, "broken.png", "Röntgen <b>.png"),
        image_record(4, "none.png", "wide.png"),
        text_record(5, "a<|im_end|>\n<|im_start|>user\nb") | {"id": "r21"},
        text_record(6) | {"id": {"nested": [1, "x/y"]}},
        image_record(7, "huge.png"),
        text_record(8, "lone \ud800 surrogate") | {"id": "\ud800"},
        text_record(9, "right \u202e to left") | {"id": 12},
        b'{"id": "' + b"x" * 5000,
        b"\xff\xfe",
        b"[" * 20_000 + b"]" * 20_000,
        b"null",
        text_record(14, id="x" * 5000),
    ]
    name = "a/../b <i>größe</i> %2F ?x=1"
    sets = [
        write_set(folder, records, "first"),
        write_set(folder, [text_record(n) for n in range(20, 24)], "half", repeat_time=0.5),
        write_set(folder, [text_record(0)], "none", repeat_time=0.1),
    ]
    by = encoder(max_seq_length=2000)
    specs = [replace(sets[0].spec, name=name), *(records.spec for records in sets[1:])]
    pages = pages_of(build_sets(specs, by), folder / "cache")
    with TestClient(create_app(pages)) as client:
        pages.index.wait()
        yield client, pages


class TestRequests:
    def test_every_page_of_hostile_records(self, hostile):
        client, pages = hostile
        for set_number, records in enumerate(pages.catalog.sets):
            for index in range(len(records)):
                response = client.get(f"/record/{set_number}/{index}")
                assert response.status_code == 200, (set_number, index)
                assert "<script>doc" not in response.text and 'onerror="' not in response.text
                assert "Traceback" not in response.text
        listing = client.get("/")
        assert listing.status_code == 200
        assert "<script>doc" not in listing.text and "<i>größe" not in listing.text
        assert "&lt;i&gt;größe&lt;/i&gt;" in listing.text

    def test_texts_of_hostile_records(self, hostile):
        client, _ = hostile

        def text(index):
            return client.get(f"/record/0/{index}").text

        assert "&lt;script&gt;document.title" in text(0)
        assert "Unusable: too long." in text(1) and "Raise --max_seq_length" in text(1)
        assert text(2).count('<section class="image-tiles"') == 50
        assert "none.png does not exist" in text(4) and 'src="/figure/0/4/1"' in text(4)
        assert text(5).count('<article class="message') == 4 and "Warning: control token." in text(5)
        assert "{&#39;nested&#39;: [1, &#39;x/y&#39;]}" in text(6)
        assert "lone \\ud800 surrogate" in text(8)
        assert "Unusable: json." in text(10) and "Unusable: encoding." in text(11)
        assert client.get("/record/1/3").text.count("Training does not use this record") == 1
        assert client.get("/record/1/1").text.count("Training does not use this record") == 0

    def test_pictures(self, hostile):
        client, _ = hostile
        for path in ("thumbnail/0/2/49", "figure/0/2/49", "tile/0/2/49/0", "figure/0/3/1"):
            response = client.get(f"/{path}")
            assert response.status_code == 200 and response.headers["content-type"].startswith("image/")
        assert client.get("/figure/0/7/0").status_code == 200
        for path, message in (
            ("figure/0/3/0", "broken.png"), ("figure/0/4/0", "does not exist"),
            ("tile/0/4/1/0", "does not exist"), ("thumbnail/0/7/0", "too large for a thumbnail"),
            ("figure/0/0/0", "the record has 0 images"),
            ("figure/0/2/50", "the record has 50 images"), ("tile/0/2/0/9", "has 1 tiles"),
            ("figure/0/11/0", "not UTF-8"),
        ):  # fmt: skip
            response = client.get(f"/{path}")
            assert response.status_code == 422 and message in response.text, path
            assert response.headers["content-type"].startswith("text/plain")

    @pytest.mark.parametrize(
        ("path", "status", "message"),
        [
            ("/record/0/15", 404, "there is no record 15: dataset a/../b &lt;i&gt;"),
            ("/record/0/-1", 404, "there is no record -1"),
            ("/record/3/0", 404, "there is no dataset 3"),
            ("/record/-1/0", 404, "there is no dataset -1"),
            ("/record/0/" + "9" * 5000, 404, "are numbered from 0"),
            ("/record/0/<b>", 404, "are numbered from 0"),
            ("/figure/0/0/../../../etc/passwd", 404, "Not Found"),
            ("/static/../app.py", 404, "Not Found"),
            ("/?set=9&sort=<b>", 400, "set=&#39;9&#39;: must be a whole number from 0 to 2"),
            ("/?min_tokens=x&problem=y", 400, "problem=&#39;y&#39;: must be one of error, warning"),
            ("/record/0/0?page=0", 400, "page=&#39;0&#39;"),
            ("/jump", 400, "enter the id of a record"),
            ("/jump?set=0&index=x", 400, "enter the id of a record"),
            ("/jump?id=<b>", 404, "no record has the id &#39;&lt;b&gt;&#39;"),
        ],
    )
    def test_invalid_requests(self, hostile, path, status, message):
        client, _ = hostile
        response = client.get(path)
        assert response.status_code == status and message in response.text
        assert response.headers["content-type"].startswith("text/html")

    def test_jump(self, hostile):
        client, _ = hostile

        def target(**parameters):
            return client.get("/jump", params=parameters, follow_redirects=False).headers["location"]

        assert target(id=SCRIPT) == "/record/0/0"
        assert target(id="12") == "/record/0/9"
        assert target(id="r23") == "/record/1/3"
        assert target(id="r21") == "/?id=r21"
        assert target(set=1, index=2) == "/record/1/2"
        listing = client.get("/?id=r21").text
        assert "<b>2</b> records with the id" in listing
        assert 'href="/record/0/5?id=r21"' in listing and 'href="/record/1/1?id=r21"' in listing

    def test_filters(self, hostile):
        client, _ = hostile

        def shown(query):
            return re.findall(r'class="name"><a href="/record/(\d+/\d+)', client.get(f"/?{query}").text)

        assert shown("set=1") == ["1/0", "1/1"] and shown("set=2") == []
        assert shown("problem=json") == ["0/10", "0/12"]
        assert shown("text=LONE") == ["0/8"]
        assert shown("min_tiles=2")[0] == "0/2"
        assert shown("sort=most_tiles")[0] == "0/2"
        listing = client.get("/?problem=image+missing").text
        assert 'value="image missing" selected>image missing (1)' in listing
        link = re.search(r'href="(/record/0/4\?[^"]+)"', listing)[1].replace("&amp;", "&")
        record = client.get(link).text
        assert "1 of 1" in record and 'href="/?problem=image+missing"' in record

    def test_neighbors_follow_the_list(self, hostile):
        client, _ = hostile
        text = client.get("/record/0/12?problem=json").text
        assert 'href="/record/0/10?problem=json" rel="prev"' in text and 'rel="next"' not in text
        text = client.get("/record/0/0").text
        assert 'href="/record/0/1" rel="next"' in text and 'rel="prev"' not in text

    def test_status(self, hostile):
        client, _ = hostile
        assert client.get("/status").json() == {"indexed": 17, "total": 17, "finished": True, "error": None}

    def test_changed_file(self, tmp_path):
        pages = pages_of([write_set(tmp_path, [text_record(0)])], tmp_path / "cache")
        with TestClient(create_app(pages)) as client:
            file = pages.catalog.sets[0].spec.annotation
            file.write_text(json.dumps(text_record(1)) + "\n" * 3)
            os.utime(file, (1, 1))
            response = client.get("/record/0/0")
            assert response.status_code == 409 and "has changed since it was opened" in response.text
            listing = client.get("/")
            assert listing.status_code == 200 and "has changed since it was opened" in listing.text
            assert client.get("/figure/0/0/0").status_code == 422

    def test_index_is_not_complete(self, tmp_path):
        """The pages work, and say how much is indexed."""
        pages = pages_of([write_set(tmp_path, [text_record(n) for n in range(3)])], tmp_path / "cache")
        pages.index.start = pages.index.stop = lambda: None
        with TestClient(create_app(pages)) as client:
            listing = client.get("/?sort=longest").text
            assert "among the 0 of 3 records indexed so far" in listing
            assert client.get("/").text.count("not indexed yet") == 3
            assert '<span id="indexed">0</span> of 3 records' in listing
            assert "supervised</dt>" in client.get("/record/0/1").text
            assert client.get("/jump?id=r2", follow_redirects=False).headers["location"] == "/record/0/2"

    def test_index_failed(self, tmp_path):
        pages = pages_of([write_set(tmp_path, [text_record(0)])], tmp_path / "cache")
        pages.index.start = pages.index.stop = lambda: None
        pages.index.error, pages.index.finished = "a <worker> died", True
        with TestClient(create_app(pages)) as client:
            assert "Indexing failed:</b> a &lt;worker&gt; died" in client.get("/").text

    def test_unexpected_error_is_not_shown(self, tmp_path, monkeypatch):
        pages = pages_of([write_set(tmp_path, [text_record(0)])], tmp_path / "cache")
        monkeypatch.setattr(pages, "record_list", lambda parameters: 1 / 0)
        with TestClient(create_app(pages), raise_server_exceptions=False) as client:
            response = client.get("/")
            assert response.status_code == 500
            assert "in the terminal" in response.text and "ZeroDivision" not in response.text

    def test_without_tokenizer(self, tmp_path):
        by = RecordEncoder(None, encoder().preprocessing)
        (tmp_path / "images").mkdir()
        noise(80, 20).save(tmp_path / "images/wide.png")
        pages = pages_of([write_set(tmp_path, [image_record(0, "wide.png")], by=by)], tmp_path / "cache")
        with TestClient(create_app(pages)) as client:
            pages.index.wait()
            assert "min_tokens" not in client.get("/").text and "--model" in client.get("/").text
            text = client.get("/record/0/0").text
            assert text.count("/tile/0/0/0/") == 10 and "image tokens" not in text


@pytest.fixture(scope="module")
def sample(sample_data, tiny_model, tmp_path_factory):
    """URL of the browser on the sample data, with InternVL3's tile size, and one record with problems."""
    options = Preprocessing(tokens_per_tile=256, max_dynamic_patch=6, max_seq_length=2048)
    by = RecordEncoder(load_tokenizer(tiny_model)[0], options)
    folder = tmp_path_factory.mktemp("sets")
    (folder / "train").symlink_to(sample_data / "train")
    (folder / "images").mkdir()
    noise(1500, 1000).save(folder / "images/figure.png")
    noise(400, 400).save(folder / "images/broken.png")
    break_inside(folder / "images/broken.png")
    records = [image_record(0, "figure.png", "none.png"), image_record(1, "figure.png", "broken.png"),
               text_record(2, SCRIPT)]  # fmt: skip
    specs = load_meta(sample_data / "train.json", sample_data)
    specs.append(write_set(folder, records, "broken", by=by).spec)
    # Relative paths, for the screenshots.
    relative = [replace(spec, annotation=Path(*spec.annotation.parts[-2:])) for spec in specs[:-1]]
    relative.append(replace(specs[-1], annotation=Path("broken.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pages = pages_of(build_sets(relative, by), tmp_path_factory.mktemp("cache"))
        with served(create_app(pages)) as url:
            pages.index.wait()
            yield url


def wait_for_images(page) -> None:
    """Wait until all images of a page are shown."""
    page.wait_for_load_state("networkidle")
    assert page.evaluate("[...document.images].every(image => !image.complete || image.naturalWidth > 0)")


@needs_browser
class TestBrowser:
    def test_list(self, sample, tmp_path):
        with open_page() as page:
            page.goto(sample)
            expect(page.locator(".rows li")).to_have_count(27)
            page.select_option("select[name=set] >> nth=0", label="qa-multiple_subimage")
            page.select_option("select[name=sort]", "longest")
            page.click("text=Show")
            expect(page.locator(".rows li")).to_have_count(4)
            wait_for_images(page)
            counts = page.locator(".numbers div:first-child dd").all_inner_texts()
            numbers = [int(text.replace(",", "")) for text in counts]
            assert numbers == sorted(numbers, reverse=True)
            screenshot(page, "browse_list", tmp_path)

    def test_record(self, sample, tmp_path):
        with open_page() as page:
            page.goto(f"{sample}/record/5/2")
            wait_for_images(page)
            cells, tiles = page.locator(".grid span"), page.locator(".cells img")
            assert cells.count() == tiles.count() > 1
            figure, grid = page.locator(".stage img").bounding_box(), page.locator(".grid").bounding_box()
            assert all(abs(figure[side] - grid[side]) <= 2 for side in figure)
            assert tiles.first.evaluate("image => image.naturalWidth") == 448
            tiles.nth(1).hover()
            assert page.locator(".on").count() == 2
            marked = "".join(page.locator("mark").all_inner_texts())
            assert marked and page.locator(".token.supervised").inner_text() == "<|im_end|>"
            screenshot(page, "browse_record", tmp_path, full_page=True)

    def test_navigation(self, sample):
        with open_page() as page:
            page.goto(f"{sample}/record/0/0")
            page.keyboard.press("ArrowRight")
            page.wait_for_url("**/record/0/1")
            page.keyboard.press("ArrowLeft")
            page.wait_for_url("**/record/0/0")
            page.click("text=All records")
            page.fill("input[name=id]", "compound_image-train-1")
            page.keyboard.press("Enter")
            page.wait_for_url("**/record/5/1")

    def test_problems(self, sample, tmp_path):
        with open_page() as page:
            page.goto(f"{sample}/?problem=error")
            page.click(".name a")
            assert "Unusable: image missing." in page.inner_text(".problem.error")
            assert "none.png does not exist" in page.inner_text("#image-1 .broken")
            screenshot(page, "browse_problem", tmp_path)
            page.goto(f"{sample}/record/6/1")
            page.locator("#image-1 .broken").nth(1).wait_for()  # the image and its tile
            page.wait_for_load_state("networkidle")
            assert "broken.png" in page.locator("#image-1 .broken").first.inner_text()
            for path in ("/record/6/2", "/?set=6"):  # records with scripts
                page.goto(sample + path)
                assert "attacked" not in page.title() and "<script>" in page.inner_text("body")

    def test_thumbnail_of_an_unreadable_image(self, tmp_path):
        pages = pages_of([write_set(tmp_path, [image_record(0, "none.png")])], tmp_path / "cache")
        with served(create_app(pages)) as url, open_page() as page:
            page.goto(url)
            reason = page.locator(".thumb .broken[title*='none.png does not exist']")
            reason.wait_for()
            assert reason.inner_text() == "cannot be shown"
            frame, text = page.locator(".thumb").bounding_box(), reason.bounding_box()
            assert frame["y"] <= text["y"] and text["y"] + text["height"] <= frame["y"] + frame["height"]

    def test_narrow_dark_pages(self, sample, tmp_path):
        with open_page(400, 800) as page:
            page.emulate_media(color_scheme="dark")
            for name, path in {"list": "/", "record": "/record/5/0", "problem": "/record/6/0"}.items():
                page.goto(sample + path)
                assert page.evaluate("document.documentElement.scrollWidth") <= 400
                screenshot(page, f"browse_narrow_{name}", tmp_path)


@needs_browser
def test_progress_of_the_index(tmp_path):
    """The page follows the index and offers the complete result."""
    pages = pages_of([write_set(tmp_path, [text_record(n) for n in range(3)])], tmp_path / "cache")
    start, pages.index.start = pages.index.start, lambda: None
    with served(create_app(pages)) as url, open_page() as page:
        page.goto(url)
        assert page.inner_text("#indexed") == "0" and page.locator("#reload").is_hidden()
        start()
        page.wait_for_selector("#reload:visible")
        assert page.inner_text("#indexed") == "3"
        page.click("#reload")
        page.wait_for_selector("#indexing", state="detached")
        assert page.locator(".rows .numbers dd").first.inner_text() != ""
