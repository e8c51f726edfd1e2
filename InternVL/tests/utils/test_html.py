"""Tests of the HTML fragments."""

import io

from PIL import Image

from internvl_chat.utils.html import html_image, html_page, html_table, jpeg_thumbnail


def test_text_is_escaped():
    page = html_page("<b>", [html_table(["<i>"], [["<u>"]]), html_image(b"x", "png", "'<s>'")])
    for tag in ("<b>", "<i>", "<u>", "<s>"):
        assert tag not in page
    assert "src='data:image/png;base64,eA=='" in page


def test_numbers_are_right_aligned():
    table = html_table(["n"], [["1,234.5"], [7], ["-"], ["42%"], ["1 of 2"], ["v1"]])
    assert table.count("class='n'") == 4
    assert table.count("<td>") == 2


def test_only_long_cells_break_within_words():
    table = html_table(["n"], [["short/path.jsonl"], ["long " * 20]])
    assert table.count("class='long'") == 1


def test_page_fits_phones_and_dark_screens():
    page = html_page("t", [])
    assert "width=device-width" in page
    assert "color-scheme: light dark" in page


def test_jpeg_thumbnail():
    with Image.open(io.BytesIO(jpeg_thumbnail(Image.new("RGB", (400, 100), "red"), 80))) as image:
        assert (image.format, image.size) == ("JPEG", (80, 20))
