"""Tests of the HTML fragments."""

from internvl_chat.utils.html import html_image, html_page, html_table


def test_text_is_escaped():
    page = html_page("<b>", [html_table(["<i>"], [["<u>"]]), html_image(b"x", "png", "'<s>'")])
    for tag in ("<b>", "<i>", "<u>", "<s>"):
        assert tag not in page
    assert "src='data:image/png;base64,eA=='" in page


def test_numbers_are_right_aligned():
    table = html_table(["n"], [["1,234.5"], [7], ["-"], ["1 of 2"], ["v1"]])
    assert table.count("class='n'") == 3
    assert table.count("class='m'") == 2
