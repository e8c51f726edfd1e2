"""Report of an evaluation: metrics, tables, plots and HTML page."""

import json
from html.parser import HTMLParser

import pytest
from PIL import Image
from small_sets import noise

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.report import page as pages
from internvl_chat.eval.report.files import write_report
from internvl_chat.eval.report.plots import radar_axes
from internvl_chat.eval.report.published import PUBLISHED, TITLES, published
from internvl_chat.eval.report.table import markdown
from internvl_chat.eval.scoring import Scores, score
from internvl_chat.metrics.suite import CHOICE_METRICS, OPEN_METRICS, Suite

EVIL = "<script>alert('x')</script> & \"quoted\" <b>bold</b>"


def tasks(value: float | None = 12.345) -> dict:
    found = {name: {"items": 50, **dict.fromkeys(OPEN_METRICS, value)} for name in TITLES}
    found["multi-choice"] = {"items": 50, "unreadable": 3, **dict.fromkeys(CHOICE_METRICS, value)}
    return found


def test_table_has_the_layout_and_rows_of_the_paper():
    lines = markdown(tasks(), benchmark="pmc-mi", model="run|1").splitlines()
    assert "| multi-image VQA | InternVL3-8B | 3.8 | 22.5 | 55.7 | 71.4 |" in lines
    assert "| multi-image VQA | M3LLM-8B | 15.0 | 37.8 | 70.1 | 78.2 |" in lines
    assert "| single-image VQA | InternVL3-8B | 6.8 | 29.5 | 58.7 | 78.6 |" in lines
    assert "| text-only QA | M3LLM-8B | 13.0 | 38.5 | 73.4 | 86.4 |" in lines
    assert "| multi-choice VQA | InternVL3-8B | 78.0 | 78.0 | 80.9 | 79.2 |" in lines
    assert "| multi-choice VQA | M3LLM-8B | 90.0 | 89.9 | 91.2 | 89.8 |" in lines
    assert r"| multi-image VQA | **run\|1** | 12.3 | 12.3 | 12.3 | 12.3 |" in lines
    header = lines.index("| task | model | BLEU@4 | ROUGE-L | BERTScore | STS |")
    assert lines[header + 4].startswith(r"| multi-image VQA | **run")
    assert "| task | model | accuracy | F1 | recall | precision |" in lines


def test_missing_metric_is_a_dash():
    text = markdown(tasks(None), benchmark="pmc-mi", model="run")
    assert "| text-only QA | **run** | - | - | - | - |" in text and "None" not in text


def test_other_benchmarks_have_no_published_rows():
    text = markdown({"CT": tasks()["multi-choice"]}, benchmark="omnimedvqa", model="run")
    assert "M3LLM-8B" not in text and "| CT | 50 | 3 | 12.3 | 12.3 | 12.3 | 12.3 |" in text


def test_task_name_is_escaped():
    text = markdown({"C|T": tasks()["multi-choice"]}, benchmark="omnimedvqa", model="run")
    assert r"| C\|T | 50 | 3 | 12.3 |" in text


def test_published_metrics():
    assert published("M3LLM-8B", "multi-choice", "recall") == 91.2
    assert published("M3LLM-8B", "puretext", "sts") == 86.4
    assert published("M3LLM-8B", "bboxVQA", "sts") is None
    assert published("M3LLM-8B", "puretext", "bleu1") is None
    assert all(set(rows) <= set(TITLES) for rows in PUBLISHED.values())


def test_radar_axes():
    assert len(radar_axes(tasks(), "pmc-mi")) == 16
    some = tasks()
    some["puretext"]["sts"] = None
    assert len(radar_axes(some, "pmc-mi")) == 15
    assert radar_axes({"CT": some["multi-choice"], "x": some["puretext"]}, "own") == [
        ("CT", "accuracy"),
        ("x", "rougeL"),
    ]


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.text, self.titles = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def evaluated(tmp_path):
    noise(600, 300).save(tmp_path / "a.png")
    figure = Figure(f"{EVIL}.png", f"Fig-0{EVIL}", tmp_path / "a.png")
    items = [
        Item(f"open {EVIL}", 0, f"Why? {EVIL}", f"Because. {EVIL}", (figure, figure)),
        *(Item("$choice_$", n, "Which?", "B", (figure,), ("x", "y")) for n in range(3)),
        Item("_third", 0, "And?", "Nothing."),
    ]
    answers = {item.key: f"B {EVIL}" if n % 2 else "B" for n, item in enumerate(items)}
    benchmark = Benchmark(f"own {EVIL}", tuple(items))
    scores = score(benchmark, answers, Suite(frozenset({"bleu", "rouge", "overlap", "cider", "macro"})))
    write_report(tmp_path / "out", benchmark, answers, scores, model=f"run {EVIL}")
    return tmp_path / "out", benchmark, answers, scores


def test_files(evaluated):
    folder, _, _, scores = evaluated
    assert sorted(f.name for f in folder.iterdir()) == [
        "bars.png",
        "metrics.json",
        "radar.png",
        "report.html",
        "table.md",
    ]
    assert json.loads((folder / "metrics.json").read_text()) == scores.tasks
    for name in ("bars.png", "radar.png"):
        assert len(Image.open(folder / name).convert("RGB").getcolors(1 << 24)) > 50


def test_page_shows_every_item_without_scripts(evaluated):
    folder, benchmark, answers, scores = evaluated
    page = Page((folder / "report.html").read_text())
    assert not {"script", "b", "link", "iframe"} & set(page.tags)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert page.tags.count("figure") == 5 and page.tags.count("dl") == len(benchmark.items)
    for item in benchmark.items:
        for text in (item.question, item.reference, answers[item.key], f"{item.task} {item.index}"):
            assert text in page.text
    assert f"BLEU@1 {scores.items[benchmark.items[0].key]['bleu1']:.3f}" in page.text
    assert "(read as B)" in page.text


def test_page_shows_the_first_items_of_a_large_task(evaluated, monkeypatch, tmp_path):
    _, benchmark, answers, scores = evaluated
    monkeypatch.setattr(pages, "MAX_ITEMS_PER_TASK", 2)
    text = pages.evaluation_page(benchmark, answers, scores, model="run", pictures={})
    page = Page(text)
    assert page.tags.count("dl") == 4 and "and 1 more in predictions.jsonl" in page.text


def test_no_radar_with_two_axes(tmp_path):
    item = Item("only", 0, "?", "a")
    benchmark, answers = Benchmark("own", (item,)), {item.key: "a"}
    scores = score(benchmark, answers, Suite(frozenset({"overlap"})))
    (tmp_path / "radar.png").write_bytes(b"from an earlier evaluation")
    write_report(tmp_path, benchmark, answers, scores, model="run")
    assert not (tmp_path / "radar.png").exists() and (tmp_path / "bars.png").exists()


def test_report_without_metrics(tmp_path):
    item = Item("only", 0, "?", "a")
    benchmark, answers = Benchmark("own", (item,)), {item.key: "a"}
    scores = score(benchmark, answers, Suite(frozenset()))
    assert isinstance(scores, Scores)
    write_report(tmp_path, benchmark, answers, scores, model="run")
    assert "| only | 1 | - |" in (tmp_path / "table.md").read_text()
