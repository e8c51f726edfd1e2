"""Pages of an evaluation and of a comparison in a browser: filters, order, dialog, large and hostile data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import needs_browser, open_page, screenshot

from internvl_chat.cli import main as m3llm
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.report.files import write_report
from internvl_chat.eval.report.items import Evaluation, ReportItem, items_page
from internvl_chat.eval.scoring import score
from internvl_chat.metrics.multiple_choice import split_choices
from internvl_chat.metrics.suite import Suite

pytestmark = needs_browser
SUITE = Suite(frozenset({"bleu", "rouge", "overlap", "macro"}))
EVIL = "<img src=x onerror=\"document.title='hacked'\"></script><b>bold</b> & \u2028"
FILES = {"multi-choice": "subimage_option", "single-subimageVQA": "single_subimage", "puretext": "puretext"}


def synthetic_items(data: Path) -> list[Item]:
    """Items made from the synthetic records, several times."""
    items = []
    for task, name in FILES.items():
        rows = [json.loads(line) for line in (data / f"train/{name}.jsonl").read_text().splitlines()]
        for index in range(10 * len(rows)):
            raw = rows[index % len(rows)]
            question = raw["conversations"][0]["value"].split("<image>\n")[-1]
            names = raw.get("image", [])
            figures = tuple(Figure(name, f"Fig-{n}", data / "images" / name) for n, name in enumerate(names))
            choices = split_choices(question) if task == "multi-choice" else ()
            reference = raw["conversations"][1]["value"]
            items.append(Item(task, index, question, reference, figures, choices))
    return items


def answer(item: Item, right: str) -> str:
    """An answer that is right if the last digit of the index is in `right`."""
    digit = str(item.index % 10)
    if digit in right:
        return item.reference if item.choices else f"{item.reference} This is what the figure shows."
    if digit == "9":
        return "I cannot tell."
    return "The answer is A." if item.choices else "Multiple panels, with an arrow in the left half."


@pytest.fixture(scope="module")
def folders(sample_data, tmp_path_factory) -> list[Path]:
    """Reports of two models on the same items."""
    out = tmp_path_factory.mktemp("pages")
    items = synthetic_items(sample_data)
    benchmark = Benchmark("synthetic", tuple(items))
    for name, right in (("base", "0158"), ("fine-tuned", "0123457")):
        answers = {item.key: answer(item, right) for item in items}
        scores = score(benchmark, answers, SUITE)
        write_report(out / name, benchmark, answers, scores, model=name)
    names = [out / "base", out / "fine-tuned"]
    assert m3llm(["eval", "compare", *map(str, names), "--out", str(out / "both")]) == 0
    return [*names, out / "both"]


@pytest.fixture(scope="module")
def tab():
    with open_page() as page:
        yield page


@pytest.fixture
def report(tab, folders):
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light")
    tab.goto((folders[1] / "report.html").as_uri())
    return tab


@pytest.fixture
def both(tab, folders):
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light")
    tab.goto((folders[2] / "comparison.html").as_uri())
    return tab


def status(page) -> str:
    return page.locator("#status").inner_text()


def titles(page) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(".item h3").all_inner_texts()]


def data(folder: Path, name: str = "report.json") -> dict:
    return json.loads((folder / name).read_text())


def test_first_page(report, folders, tmp_path):
    items = data(folders[1])["items"]
    assert status(report) == f"1–25 of {len(items)}"
    assert report.locator(".item").count() == 25 and titles(report)[0] == "multi-choice #0"
    cards = report.locator(".card")
    assert cards.count() == 3
    scores = [item["answer"]["scores"]["accuracy"] for item in items if item["task"] == "multi-choice"]
    assert f"{100 * sum(scores) / len(scores):.1f}" in cards.first.inner_text()
    screenshot(report, "eval_report", tmp_path, full_page=False)


def test_filter_by_task_result_score_and_text(report, folders):
    items = data(folders[1])["items"]
    wrong = [item for item in items if item["answer"]["scores"].get("accuracy") == 0]
    report.locator(".card", has_text="multi-choice").click()
    assert report.locator("[name=task]").input_value() == "multi-choice"
    assert report.locator(".card[aria-pressed=true]").count() == 1
    report.select_option("[name=show]", "wrong")
    assert status(report).startswith(f"1–{len(wrong)} of {len(wrong)}")
    assert (
        report.locator(".answer.wrong").count() == len(wrong) and not report.locator(".answer.right").count()
    )
    report.select_option("[name=show]", "unreadable")
    unreadable = [item for item in wrong if item["answer"]["parsed"] == ""]
    assert report.locator(".item").count() == len(unreadable) > 0
    report.locator("button[type=reset]").click()
    report.wait_for_function(f"document.getElementById('status').textContent === '1–25 of {len(items)}'")
    report.select_option("[name=metric]", "rougeL")
    report.fill("[name=most]", "50")
    low = [item for item in items if item["answer"]["scores"].get("rougeL", 1) <= 0.5]
    assert f"of {len(low)} (" in status(report)
    report.fill("[name=most]", "")
    report.fill("[name=search]", "CANNOT tell")
    assert f"of {sum('cannot tell' in item['answer']['text'] for item in items)} (" in status(report)
    report.fill("[name=search]", "nothing like this")
    assert status(report).startswith("No item matches") and report.locator(".item").count() == 0


def test_worst_first(report, folders, tmp_path):
    report.select_option("[name=task]", "single-subimageVQA")
    report.select_option("[name=metric]", "rougeL")
    report.select_option("[name=order]", "worst")
    scores = [
        (item["answer"]["scores"]["rougeL"], item["index"])
        for item in data(folders[1])["items"]
        if item["task"] == "single-subimageVQA"
    ]
    worst = [f"single-subimageVQA #{index}" for _, index in sorted(scores)[:25]]
    assert titles(report) == worst
    report.evaluate("document.getElementById('browse').scrollIntoView()")
    screenshot(report, "eval_report_items", tmp_path)
    report.select_option("[name=order]", "best")
    assert titles(report)[0] not in worst


def test_pages(report, folders):
    items = data(folders[1])["items"]
    report.locator("#next").click()
    assert status(report) == f"26–50 of {len(items)}" and titles(report)[0].endswith("#25")
    assert report.locator("#position").inner_text() == f"page 2 of {-(-len(items) // 25)}"
    report.locator("#previous").click()
    assert report.locator("#previous").is_disabled()


def test_thumbnails_enlarge(report):
    report.select_option("[name=task]", "single-subimageVQA")
    thumbnail = report.locator(".thumbnail").first
    assert thumbnail.locator("img").get_attribute("alt").startswith("Fig-0 SYN")
    thumbnail.focus()
    report.keyboard.press("Enter")
    viewer = report.locator("#viewer")
    assert viewer.is_visible() and viewer.locator("figcaption").inner_text().endswith("(1 of 2)")
    report.keyboard.press("ArrowRight")
    assert viewer.locator("figcaption").inner_text().startswith("Fig-1")
    report.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert thumbnail.evaluate("node => node === document.activeElement")
    thumbnail.click()
    viewer.locator(".close").click()
    assert not viewer.is_visible()


@pytest.mark.parametrize("page", ["report", "both"])
def test_narrow_and_dark(page, request, tmp_path):
    shown = request.getfixturevalue(page)
    shown.emulate_media(color_scheme="dark")
    shown.set_viewport_size({"width": 400, "height": 900})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 400
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(20, 24, 29)"
    screenshot(shown, f"eval_{page}_narrow", tmp_path)
    shown.evaluate("document.getElementById('browse').scrollIntoView()")
    screenshot(shown, f"eval_{page}_narrow_items", tmp_path)


def test_images_are_embedded_once(folders):
    page = (folders[1] / "report.html").read_text()
    used = {image["id"] for item in data(folders[1])["items"] for image in item["images"]}
    assert page.count("data:image/jpeg;base64,") == len(used) and None not in used
    assert "http://" not in page and "https://" not in page


def test_comparison_shows_gains_and_losses(both, folders, tmp_path):
    scores = [{(i["task"], i["index"]): i["answer"]["scores"] for i in data(f)["items"]} for f in folders[:2]]
    keys = [key for key in scores[0] if key[0] == "multi-choice"]
    worse = [k for k in keys if scores[1][k]["accuracy"] < scores[0][k]["accuracy"]]
    better = [k for k in keys if scores[1][k]["accuracy"] > scores[0][k]["accuracy"]]
    both.select_option("[name=task]", "multi-choice")
    both.select_option("[name=show]", "worse")
    assert titles(both) == [f"multi-choice #{index}" for _, index in worse]
    both.select_option("[name=show]", "better")
    assert titles(both) == [f"multi-choice #{index}" for _, index in better] and better and worse
    assert both.locator(".item").first.locator(".answer").count() == 2
    both.evaluate("document.getElementById('browse').scrollIntoView()")
    screenshot(both, "eval_compare_items", tmp_path)
    both.select_option("[name=show]", "")
    both.select_option("[name=task]", "puretext")
    both.select_option("[name=metric]", "rougeL")
    both.select_option("[name=order]", "gain")
    task, index = max(
        (key for key in scores[0] if key[0] == "puretext"),
        key=lambda key: scores[1][key]["rougeL"] - scores[0][key]["rougeL"],
    )
    assert titles(both)[0] == f"{task} #{index}"
    both.locator("button[type=reset]").click()
    both.evaluate("scrollTo(0, 0)")
    screenshot(both, "eval_compare", tmp_path)


def test_two_answers_take_the_whole_width(both):
    both.select_option("[name=task]", "puretext")
    reference, *answers = both.locator(".item").first.locator(".reference, .answer").all()
    boxes = [answer.bounding_box() for answer in (reference, *answers)]
    assert len({box["y"] for box in boxes[1:]}) == 1
    assert boxes[2]["x"] + boxes[2]["width"] == pytest.approx(boxes[0]["x"] + boxes[0]["width"], abs=1)


def test_5000_items(tab, tmp_path):
    """The page draws one page of items, however many there are."""
    answers = [{"text": f"answer {n}", "parsed": None, "truncated": False, "scores": {"f1": n % 97 / 97}}
               for n in range(5000)]  # fmt: skip
    items = [ReportItem("t", n, f"What is {n}?", "that", [], value) for n, value in enumerate(answers)]
    page = items_page("large", "", [], [Evaluation("b", "m", "standard", items)], {})
    (tmp_path / "large.html").write_text(page)
    tab.goto((tmp_path / "large.html").as_uri())
    assert status(tab) == "1–25 of 5,000" and tab.locator(".item").count() == 25
    tab.select_option("[name=order]", "best")
    assert titles(tab)[0] == "t #96"
    tab.fill("[name=search]", "answer 4999")
    assert titles(tab) == ["t #4999"]


def test_text_is_never_markup(tab, sample_data, tmp_path):
    picture = next((sample_data / "images").glob("*.jpg"))
    item = Item(f"task {EVIL}", 0, f"Why? {EVIL}", f"So. {EVIL}", (Figure(f"{EVIL}.png", EVIL, picture),))
    missing = replace(item, index=1, figures=(Figure("lost.png", "Fig-0", tmp_path / "lost.png"),))
    broken = replace(item, index=2, figures=(Figure("bad.png", "Fig-0", tmp_path / "bad.png"),))
    (tmp_path / "bad.png").write_bytes(b"no image")
    benchmark = Benchmark(f"own {EVIL}", (item, missing, broken))
    answers = {found.key: f"Because {EVIL}" for found in benchmark.items}
    scores = score(benchmark, answers, Suite(frozenset({"overlap"})))
    write_report(tmp_path / "out", benchmark, answers, scores, model=f"run {EVIL}", protocol=EVIL)
    tab.goto((tmp_path / "out/report.html").as_uri())
    for text in (item.question, f"Because {EVIL}", item.reference):
        assert tab.locator(".item").first.get_by_text(text.strip(), exact=False).count() >= 1
    assert tab.title().startswith("own <img") and not tab.get_by_text("bold", exact=True).count()
    assert tab.get_by_text("the image is not available").count() == 2
    assert tab.locator(".thumbnail").count() == 1
