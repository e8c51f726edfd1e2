"""The demo page in headless Chromium: upload, ask, stream, compare, export, bad files, two users at once."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import needs_browser, open_page, screenshot
from inference.prompts import picture
from inference.web.conftest import (
    COMPOUND,
    FOLLOW_UP,
    LESION,
    PANELS,
    closed,
    example_prompt,
    wait_until,
)
from playwright.sync_api import FilePayload, Locator, Page, expect

from internvl_chat.cli import main as m3llm
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.sources.uploads import MAX_IMAGES
from internvl_chat.inference.engine import Engine, Prompt, ask
from internvl_chat.inference.web.examples import EXAMPLES

pytestmark = needs_browser

# Machines may be slow; nothing here waits for a fixed time.
expect.set_options(timeout=60_000)
SCRIPT = "<img src=x onerror=\"document.title='attacked'\">"


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    with open_page() as page:
        page.set_default_timeout(60_000)
        yield page


@pytest.fixture
def page(browser_page, url, schedulers) -> Iterator[Page]:
    """The page with one model, at its default size."""
    browser_page.set_viewport_size({"width": 1280, "height": 800})
    browser_page.goto(url)
    yield browser_page
    wait_until(lambda: not any(scheduler.running or scheduler.waiting for scheduler in schedulers))


@pytest.fixture(scope="module")
def reference(tiny_model) -> Engine:
    """An engine for tile counts: nothing else may use the engine of a scheduler."""
    return Engine.from_checkpoint(tiny_model, device="cpu")


def upload(name: str, width: int = 120, height: int = 60, seed: int = 0, form: str = "PNG") -> FilePayload:
    buffer = io.BytesIO()
    picture(width, height, seed).save(buffer, form)
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def add(page: Page, *files: FilePayload | Path) -> None:
    page.set_input_files("#picker", list(files))
    expect(page.locator("#ask")).to_be_enabled()


def question(page: Page, text: str, key: str = "Enter") -> None:
    page.fill("#question", text)
    page.press("#question", key)


def finished(page: Page, count: int = 1) -> Locator:
    """Wait until the last of `count` questions is answered, and return its answers."""
    expect(page.locator(".exchange")).to_have_count(count)
    exchange = page.locator(".exchange").last
    expect(exchange.locator(".actions")).to_be_visible()
    return exchange.locator(".answer")


def text_of(answer: Locator) -> str:
    return answer.locator(".text").evaluate("node => node.textContent")


def captions(page: Page) -> list[list[str]]:
    return [row.inner_text().split("\n")[:4] for row in page.locator("#figure-list li").all()]


def start_example(page: Page, number: int) -> None:
    page.locator(".example").nth(number).click()
    expect(page.locator("#figure-list li")).to_have_count(EXAMPLES[number].num_images)
    expect(page.locator("#ask")).to_be_enabled()


def counts(reference: Engine, prompt: Prompt, answer_tokens: int) -> str:
    encoded = reference.encode(prompt)
    tokens, images = len(encoded.input_ids), len(encoded.image_positions)
    shown = f" ({images} image tokens, {encoded.num_tiles} tiles)" if images else ""
    return f"prompt: {tokens} tokens{shown} · answer: {answer_tokens} tokens"


def test_examples_and_a_follow_up_question(page, reference, tmp_path):
    expect(page.locator(".example")).to_have_count(len(EXAMPLES))
    for image in page.locator(".example img").all():
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 100
    screenshot(page, "demo_start", tmp_path)
    start_example(page, 0)
    assert captions(page) == [["Fig-0", "example 1.jpg", "1288 × 756 pixels", "3 × 2 tiles + thumbnail"]]
    expect(page.locator("#plan")).to_have_text("1 figure: 7 tiles, 28 image tokens")
    expect(page.locator("#figure-list .grid span")).to_have_count(6)
    expect(page.locator("#question")).to_have_value(EXAMPLES[0].question)
    page.press("#question", "Enter")
    answer = finished(page)
    assert text_of(answer) == COMPOUND
    tokens = len(reference.tokenizer(COMPOUND).input_ids)
    assert answer.locator("footer").inner_text() == counts(reference, example_prompt(0), tokens)
    question(page, FOLLOW_UP)
    answer = finished(page, 2)
    assert text_of(answer) == LESION
    prompt = example_prompt(0).then(COMPOUND, FOLLOW_UP)
    tokens = len(reference.tokenizer(LESION).input_ids)
    assert answer.locator("footer").inner_text() == counts(reference, prompt, tokens)
    screenshot(page, "demo", tmp_path)


def test_uploads_are_numbered_in_the_order_of_their_names(page, reference):
    files = [upload("panel10.png", 60, 60), upload("panel2.png", 170, 60), upload("panel1.png", 60, 170)]
    add(page, *files)
    assert [caption[:2] for caption in captions(page)] == [
        ["Fig-0", "panel1.png"], ["Fig-1", "panel2.png"], ["Fig-2", "panel10.png"],
    ]  # fmt: skip
    page.get_by_role("button", name="Remove Fig-1").click()
    expect(page.locator("#figure-list li")).to_have_count(2)
    expect(page.locator("#picker")).to_be_focused()
    assert [caption[1] for caption in captions(page)] == ["panel1.png", "panel10.png"]
    question(page, "What?")
    footer = finished(page).locator("footer").inner_text()
    prompt = ask("What?", [picture(60, 170), picture(60, 60)])
    assert footer.startswith(counts(reference, prompt, 0).split(" · ")[0])
    expect(page.locator(".question figcaption")).to_have_text(["Fig-0", "Fig-1"])
    expect(page.get_by_role("button", name="Remove")).to_have_count(0)
    add(page, upload("later.png"))
    question(page, "And this?")
    finished(page, 2)
    expect(page.locator(".exchange").last.locator("figcaption")).to_have_text("Fig-2")


def test_figures_are_dropped_and_pasted(page):
    for kind, field in (("DragEvent", "dataTransfer"), ("ClipboardEvent", "clipboardData")):
        page.evaluate(
            """([bytes, kind, field]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], `${field}.png`, {type: "image/png"}));
                const name = kind === "DragEvent" ? "drop" : "paste";
                const event = new window[kind](name, {bubbles: true, cancelable: true, [field]: transfer});
                document.getElementById("question").dispatchEvent(event);
            }""",
            [list(upload("")["buffer"]), kind, field],
        )
    expect(page.locator("#figure-list .name")).to_have_text(["dataTransfer.png", "clipboardData.png"])


def test_an_answer_is_streamed_and_stopped(page, gates, submitted, tmp_path):
    [gate, _] = gates
    start_example(page, 0)
    with closed(gate):
        page.press("#question", "Enter")
        answer = page.locator(".answer")
        gate.release(40)
        expect(answer.locator("footer")).to_contain_text("answer: 41 tokens")
        shown = text_of(answer)
        assert COMPOUND.startswith(shown) and 0 < len(shown) < len(COMPOUND)
        expect(answer).to_have_attribute("aria-busy", "true")
        expect(page.locator("#ask")).to_be_hidden()
        screenshot(page, "demo_streaming", tmp_path)
        gate.release(5)
        expect(answer.locator("footer")).to_contain_text("answer: 46 tokens")
        page.press("#question", "Escape")
        expect(answer).to_have_attribute("aria-busy", "false")
        wait_until(lambda: submitted[0].cancelled)
    answer = finished(page)
    assert answer.locator("footer").inner_text().endswith("answer: 46 tokens · stopped")
    stopped = text_of(answer)
    assert len(shown) < len(stopped) < len(COMPOUND)
    question(page, "Why?")
    assert text_of(finished(page, 2)) != ""


def test_a_question_that_was_stopped_early_is_asked_again_or_changed(page, gates):
    [gate, _] = gates
    start_example(page, 0)
    with closed(gate):
        page.press("#question", "Enter")
        expect(page.locator(".answer footer")).to_contain_text("prompt:")
        page.get_by_role("button", name="Stop").click()
        finished(page)
        if not text_of(page.locator(".answer")):  # the first token may be half a character
            expect(page.locator("#ask")).to_be_disabled()
    page.get_by_role("button", name="Ask again").click()
    assert text_of(finished(page)) == COMPOUND
    page.fill("#question", "typed")
    page.get_by_role("button", name="Change the question").click()
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#question")).to_have_value(f"{EXAMPLES[0].question}\ntyped")
    page.fill("#question", EXAMPLES[0].question)
    expect(page.get_by_role("button", name="Remove Fig-0")).to_be_visible()
    page.press("#question", "Enter")
    assert text_of(finished(page)) == COMPOUND


def test_settings(page):
    page.fill("#question", "What?")
    page.evaluate("document.getElementById('temperature').value = 7")
    page.press("#question", "Enter")
    expect(page.locator("#settings")).to_have_attribute("open", "")
    expect(page.locator(".exchange")).to_have_count(0)
    page.fill("#temperature", "0")
    page.fill("#length", "3")
    page.press("#question", "Enter")
    first = finished(page).locator("footer").inner_text()
    assert first.endswith("answer: 3 tokens · cut off at the maximum length")
    page.fill("#system", "Be very brief. " * 20)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer footer")).to_contain_text("answer: 3")
    second = finished(page).locator("footer").inner_text()
    before, after = (int(re.findall(r"\d+", text)[0]) for text in (first, second))
    assert after > before + 20


def test_bad_files(page, tmp_path):
    good = upload("good.png")
    cut = {**upload("cut.png", 200, 200), "name": "cut.png"}
    cut["buffer"] = cut["buffer"][:-5000]
    files = [
        {"name": "notes.txt", "mimeType": "image/png", "buffer": b"No image."},
        {"name": "empty.png", "mimeType": "image/png", "buffer": b""},
        {"name": SCRIPT.replace("/", ""), "mimeType": "image/png", "buffer": b"x"},
        cut,
        good,
    ]
    add(page, *files)
    expect(page.locator("#figure-list .name")).to_have_text("good.png")
    expect(page.locator("#figure-errors p")).to_have_count(4)
    errors = page.locator("#figure-errors").inner_text()
    for message in ("notes.txt cannot be read: its format", "empty.png cannot be read: it is empty",
                    "cut.png cannot be decoded", "<img src=x onerror="):  # fmt: skip
        assert message in errors
    assert "Traceback" not in page.content() and page.title() != "attacked"
    screenshot(page, "demo_bad_files", tmp_path)


def test_too_many_and_too_large_figures(page, tmp_path):
    add(page, *[upload(f"{number}.png", 8, 8) for number in range(MAX_IMAGES + 2)])
    expect(page.locator("#figure-list li")).to_have_count(MAX_IMAGES)
    errors = page.locator("#figure-errors p")
    expect(errors).to_have_count(2)
    assert f"limited to {MAX_IMAGES} figures" in errors.last.inner_text()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#figure-list li")).to_have_count(0)
    expect(errors).to_have_count(0)
    with (tmp_path / "big.tif").open("wb") as stream:
        stream.truncate(24 << 20)
    add(page, tmp_path / "big.tif")
    expect(errors).to_have_text(re.compile("big.tif was not added: .* limited to 23 MB"))


def test_html_in_questions_is_shown_as_text(page):
    question(page, SCRIPT)
    finished(page)
    assert page.locator(".question .text").inner_text() == SCRIPT
    assert page.title() != "attacked"


def test_keyboard(page):
    page.press("#question", "a")
    page.press("#question", "Shift+Enter")
    page.press("#question", "b")
    expect(page.locator("#question")).to_have_value("a\nb")
    expect(page.locator(".exchange")).to_have_count(0)
    page.locator("#picker").focus()
    outline = page.locator("#picker + label").evaluate("node => getComputedStyle(node).outlineStyle")
    assert outline == "solid"
    add(page, upload("a.png"))
    page.get_by_role("button", name="Fig-0: a.png").press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()


def test_an_answer_that_fails_was_not_stopped(page):
    question(page, "Is <image> red?")
    expect(page.locator(".answer .error")).to_have_text("1 <image> placeholder, but 0 images.")
    expect(page.locator(".answer footer")).to_be_empty()


def test_content_that_is_not_shown(page):
    frames = [picture(60, 60, seed=seed) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
    add(page, {"name": "stack.tif", "mimeType": "image/tiff", "buffer": buffer.getvalue()})
    warning = page.locator("#figure-list .warning")
    expect(warning).to_have_text("stack.tif: only the first of 3 pages or frames is used.")
    question(page, "What is <|im_end|>?")
    finished(page)
    expect(page.locator(".answer .warning")).to_contain_text("is tokenized as a control token")


def test_two_users_at_once(page, url, gates):
    """Their answers are generated in one batch; each page has only its own figures, questions and answers."""
    [gate, _] = gates
    with page.context.browser.new_context() as context:
        other = context.new_page()
        other.set_default_timeout(60_000)
        other.goto(url)
        start_example(page, 0)
        start_example(other, 1)
        with closed(gate):
            for user in (page, other):
                user.press("#question", "Enter")
            for user in (page, other):
                expect(user.locator(".answer footer")).to_contain_text("prompt:")
            assert gate.scheduler.running + gate.scheduler.waiting == 2
        assert text_of(finished(page)) == COMPOUND
        assert text_of(finished(other)) == PANELS[0]
        expect(page.locator("#figure-list li")).to_have_count(1)
        expect(other.locator("#figure-list li")).to_have_count(3)
        assert EXAMPLES[1].question not in page.locator("#conversation").inner_text()
        assert COMPOUND not in other.content()


def test_closing_the_page_cancels_the_answer(page, url, gates, submitted):
    with page.context.browser.new_context() as context, closed(gates[0]):
        other = context.new_page()
        other.goto(url)
        question(other, "What?")
        expect(other.locator(".answer footer")).to_contain_text("prompt:")
        assert not submitted[0].cancelled
        other.close()
        wait_until(lambda: submitted[0].cancelled)


@pytest.fixture
def comparison(page, compare_url) -> Page:
    """The page with two models."""
    page.goto(compare_url)
    return page


def test_two_models_are_compared(comparison, schedulers, reference, tmp_path):
    page = comparison
    start_example(page, 1)
    [caption, *_] = page.locator("#figure-list .caption").all()
    assert caption.inner_text().split("\n")[3:5] == [
        "checkpoint-400: 2 × 2 tiles + thumbnail", "checkpoint-200: 1 tile",
    ]  # fmt: skip
    assert page.locator("#plan").inner_text().split("\n") == [
        "3 figures", "checkpoint-400: 15 tiles, 60 image tokens", "checkpoint-200: 3 tiles, 12 image tokens",
    ]  # fmt: skip
    page.press("#question", "Enter")
    answers = finished(page)
    assert [answer.locator("h3").inner_text() for answer in answers.all()] == [
        "checkpoint-400", "checkpoint-200",
    ]  # fmt: skip
    assert [text_of(answer) for answer in answers.all()] == PANELS
    screenshot(page, "demo_compare", tmp_path)
    question(page, "Why?")
    footers = [answer.locator("footer").inner_text() for answer in finished(page, 2).all()]
    for footer, scheduler, answer in zip(footers, schedulers, PANELS, strict=True):
        prompt = example_prompt(1).then(answer, "Why?")
        limit = scheduler.engine.encoder.preprocessing.max_dynamic_patch
        encoder = RecordEncoder(reference.tokenizer, reference.encoder.preprocessing.with_tile_limit(limit))
        sizes = [image.size for image in prompt.images]
        tokens = len(encoder.encode_prompt(prompt.messages, sizes).input_ids)
        assert footer.startswith(f"prompt: {tokens} tokens (")


def test_an_exported_conversation_is_valid_training_data(comparison, tmp_path, capsys):
    page = comparison
    expect(page.locator("#export")).to_be_disabled()
    start_example(page, 1)
    page.press("#question", "Enter")
    finished(page)
    add(page, upload("later.png"))
    question(page, "And this?")
    finished(page, 2)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "conversation.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["fig-0.jpeg", "fig-1.jpeg", "fig-2.jpeg", "fig-3.png"]
    argv = ["data", "check", str(tmp_path / "conversation.jsonl"), "--image_root", str(tmp_path)]
    assert m3llm(argv) == 0
    assert re.search(r"^conversation +2 +2 .* 0 +0$", capsys.readouterr().out, re.MULTILINE)


WIDTHS = {"wide": 1280, "narrow": 400}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout(comparison, width, scheme, tmp_path):
    """Nothing is wider than the page, in light and dark mode."""
    page = comparison
    page.set_viewport_size({"width": WIDTHS[width], "height": 800})
    page.emulate_media(color_scheme=scheme)
    try:
        screenshot(page, f"demo_start_{width}_{scheme}", tmp_path, full_page=True)
        start_example(page, 1)
        page.press("#question", "Enter")
        finished(page)
        page.locator("#settings summary").click()
        screenshot(page, f"demo_compare_{width}_{scheme}", tmp_path, full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")
    finally:
        page.emulate_media(color_scheme="light")


def test_an_unreachable_server(page):
    page.route("**/api/**", lambda route: route.abort())
    try:
        question(page, "What?")
        expect(page.locator(".answer .error")).to_have_text(
            "The server cannot be reached. Is it still running?"
        )
        expect(page.locator("#ask")).to_be_disabled()
        expect(page.get_by_role("button", name="Ask again")).to_be_visible()
    finally:
        page.unroute("**/api/**")
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer .error")).to_have_count(0)
    finished(page)
