"""Evaluation report: metrics, tables, plots and HTML page."""

import json
from html.parser import HTMLParser

import pytest
from matplotlib.colors import to_hex
from PIL import Image
from small_sets import noise

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.report.comparison import ComparedRecord, comparison_page
from internvl_chat.eval.report.files import write_report
from internvl_chat.eval.report.items import Evaluation
from internvl_chat.eval.report.plots import bar_figure, radar_axes, radar_figure
from internvl_chat.eval.report.published import PUBLISHED, TITLES, published
from internvl_chat.eval.report.table import markdown
from internvl_chat.eval.scoring import Scores, score
from internvl_chat.metrics.suite import CHOICE_METRICS, OPEN_METRICS, Suite
from internvl_chat.utils.html import read_json_script
from internvl_chat.utils.plotting import AMBER, BLUE, GRAY

EVIL = "<script>alert('x')</script> & \"quoted\" <b>bold</b>"


def tasks(value: float | None = 12.345) -> dict:
    found = {name: {"items": 50, **dict.fromkeys(OPEN_METRICS, value)} for name in TITLES}
    found["multi-choice"] = {"items": 50, "unreadable": 3, **dict.fromkeys(CHOICE_METRICS, value)}
    return found


def test_table_has_the_layout_and_rows_of_the_paper():
    lines = markdown(tasks(), benchmark="pmc-mi", model="run|1").splitlines()
    assert "| multi-image VQA | InternVL3-8B | published | 3.8 | 22.5 | 55.7 | 71.4 |" in lines
    assert "| multi-image VQA | M3LLM-8B | published | 15.0 | 37.8 | 70.1 | 78.2 |" in lines
    assert "| single-image VQA | InternVL3-8B | published | 6.8 | 29.5 | 58.7 | 78.6 |" in lines
    assert "| text-only QA | M3LLM-8B | published | 13.0 | 38.5 | 73.4 | 86.4 |" in lines
    assert "| multi-choice VQA | InternVL3-8B | published | 78.0 | 78.0 | 80.9 | 79.2 |" in lines
    assert "| multi-choice VQA | M3LLM-8B | published | 90.0 | 89.9 | 91.2 | 89.8 |" in lines
    assert r"| multi-image VQA | **run\|1** | standard | 12.3 | 12.3 | 12.3 | 12.3 |" in lines
    header = lines.index("| task | model | protocol | BLEU@4 | ROUGE-L | BERTScore | STS |")
    assert lines[header + 4].startswith(r"| multi-image VQA | **run")
    assert "| task | model | protocol | accuracy | F1 | recall | precision |" in lines


def test_missing_metric_is_a_dash():
    text = markdown(tasks(None), benchmark="pmc-mi", model="run")
    assert "| text-only QA | **run** | standard | - | - | - | - |" in text and "None" not in text


def test_other_benchmarks_have_no_published_rows():
    text = markdown({"CT": tasks()["multi-choice"]}, benchmark="omnimedvqa", model="run")
    assert "M3LLM-8B" not in text and "| CT | 50 | 3 | 12.3 | 12.3 | 12.3 | 12.3 |" in text


def test_partial_task_is_marked_next_to_published_rows():
    some = tasks()
    some["puretext"] |= {"items": 5, "total": 50}
    lines = markdown(some, benchmark="pmc-mi", model="run").splitlines()
    row = "| text-only QA | **run** (partial: 5 of 50 items) | standard | 12.3 | 12.3 | 12.3 | 12.3 |"
    assert row in lines and sum("partial" in line for line in lines) == 1
    assert any(line.startswith("| puretext | 5 of 50 | 12.3") for line in lines)


def test_totals_of_scores():
    items = tuple(Item("only", n, "?", "a") for n in range(3))
    benchmark = Benchmark("own", items[:2], totals={"only": 3, "other": 4})
    scores = score(benchmark, {item.key: "a" for item in items}, Suite(frozenset({"overlap"})))
    assert (scores.tasks["only"]["items"], scores.tasks["only"]["total"]) == (2, 3)
    complete = score(
        Benchmark("own", items, totals={"only": 3}), {i.key: "a" for i in items}, Suite(frozenset())
    )
    assert "total" not in complete.tasks["only"]


def test_table_states_the_protocol_of_each_row():
    lines = markdown(tasks(), benchmark="pmc-mi", model="run", protocol="published").splitlines()
    rows = [line for line in lines if line.startswith("| text-only QA |")]
    assert [row.split(" | ")[2] for row in rows] == ["published"] * 3
    assert any("compare only rows of the same protocol" in line for line in lines)


def test_metrics_state_a_published_protocol(tmp_path):
    item = Item("puretext", 0, "?", "a")
    benchmark, answers = Benchmark("pmc-mi", (item,)), {item.key: "a"}
    scores = score(benchmark, answers, Suite(frozenset({"overlap"})))
    for protocol, expected in (("standard", None), ("published", "published")):
        write_report(tmp_path, benchmark, answers, scores, model="run", protocol=protocol)
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics["puretext"].get("protocol") == expected
        assert json.loads((tmp_path / "report.json").read_text())["protocol"] == protocol


def test_judge_column_states_unreadable_verdicts():
    some = {name: tasks()[name] for name in ("puretext", "bboxVQA")}
    some["puretext"] |= {"judge": 75.0, "judge_unreadable": 2}
    lines = markdown(some, benchmark="own", model="run").splitlines()
    assert any(line.startswith("| task | items | judge | BLEU@1") for line in lines)
    assert any(line.startswith("| puretext | 50 | 75.0 (2 unreadable) | 12.3") for line in lines)
    assert any(line.startswith("| bboxVQA | 50 | - | 12.3") for line in lines)


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


def bars(axes) -> list[tuple[float, str, float]]:
    """Return the bars of a panel from top to bottom: their color and the number on their label."""
    texts = {round(text.get_position()[1], 3): float(text.get_text()) for text in axes.texts}
    return [
        (round(bar.get_width(), 1), to_hex(bar.get_facecolor()), texts[round(bar.get_y() + 0.45, 3)])
        for bar in axes.patches
    ]


class TestBars:
    GRAY, AMBER, BLUE = (color.lower() for color in (GRAY, AMBER, BLUE))

    def test_published_bars_are_next_to_ours(self):
        axes = bar_figure(tasks(), benchmark="pmc-mi", model="run").axes[0]
        assert axes.get_title("left") == "multi-image VQA (50 items)"
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "BLEU@1", "BLEU@4", "ROUGE-L", "F1", "BERTScore", "STS"
        ]  # fmt: skip
        drawn = bars(axes)
        ours = (12.3, self.BLUE, 12.3)
        assert drawn[:4] == [ours, (3.8, self.GRAY, 3.8), (15.0, self.AMBER, 15.0), ours]
        assert len(drawn) == 4 * 3 + 2
        assert [value for value, _, _ in drawn[-3:]] == [71.4, 78.2, 12.3]

    def test_every_panel_ends_at_100(self):
        figure = bar_figure(tasks(100.0), benchmark="pmc-mi", model="run")
        assert len(figure.axes) == len(TITLES)
        assert all(axes.get_xlim() == (0, 100) for axes in figure.axes)
        assert all(value == label for axes in figure.axes for value, _, label in bars(axes))

    def test_labels_are_inside_the_picture_and_do_not_overlap(self):
        figure = bar_figure(tasks(100.0), benchmark="pmc-mi", model="m" * 60)
        figure.draw_without_rendering()
        texts = [text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]
        texts += [*figure.legends[0].get_texts(), figure.legends[0].get_title()]
        texts += [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert all(
            figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            for box in boxes
        )
        for number, box in enumerate(boxes):
            assert box.count_overlaps(boxes[number + 1 :]) == 0

    def test_legend_lists_the_models(self):
        [legend] = bar_figure(tasks(), benchmark="pmc-mi", model="_run$").legends
        names = [text.get_text().strip() for text in legend.get_texts()]
        assert names == ["InternVL3-8B (published)", "M3LLM-8B (published)", r"_run\$"]
        assert legend.get_title().get_text() == r"pmc-mi: _run\$, in percent"
        colors = [to_hex(handle.get_facecolor()) for handle in legend.get_patches()]
        assert colors == [self.GRAY, self.AMBER, self.BLUE]

    def test_benchmark_without_published_rows(self):
        known = {f"task {n}": tasks()["puretext"] for n in range(8)}
        figure = bar_figure(known, benchmark="own", model="run")
        assert len(figure.axes) == 8 and not figure.legends
        assert figure.get_suptitle() == "own: run, in percent"
        assert {color for axes in figure.axes for _, color, _ in bars(axes)} == {self.BLUE}

    def test_odd_number_of_tasks_leaves_no_empty_panel(self):
        known = {name: tasks()[name] for name in ("puretext", "multi-choice", "bboxVQA")}
        assert len(bar_figure(known, benchmark="pmc-mi", model="run").axes) == 3

    def test_one_task(self):
        [axes] = bar_figure({"multi-choice": tasks()["multi-choice"]}, benchmark="pmc-mi", model="run").axes
        assert [value for value, _, _ in bars(axes)][:3] == [78.0, 90.0, 12.3]

    def test_metrics_that_were_not_computed_have_no_bars(self):
        some = tasks()
        some["puretext"]["bertscore"] = None
        axes = bar_figure({"puretext": some["puretext"]}, benchmark="pmc-mi", model="run").axes[0]
        assert "BERTScore" not in [label.get_text() for label in axes.get_yticklabels()]
        [axes] = bar_figure({"own": tasks(None)["puretext"]}, benchmark="own", model="run").axes
        assert axes.texts[0].get_text() == "no metrics computed"


def test_radar_shows_our_and_the_published_values():
    figure = radar_figure(tasks(), benchmark="pmc-mi", model="run")
    lines = {each.get_label().strip(): each for each in figure.axes[0].lines}
    assert list(lines) == ["InternVL3-8B (published)", "M3LLM-8B (published)", "run"]
    assert lines["run"].get_ydata() == pytest.approx([12.345] * 17)
    assert list(lines["InternVL3-8B (published)"].get_ydata()[:4]) == [3.8, 22.5, 55.7, 71.4]
    bar_colors = [color for _, color, _ in bars(bar_figure(tasks(), benchmark="pmc-mi", model="run").axes[3])]
    assert [each.get_color().lower() for each in lines.values()] == bar_colors[:3]
    assert figure.axes[0].get_ylim() == (0, 100)


def test_radar_labels_are_inside_the_picture():
    known = {f"task {n} with a very long name of $many$ words": tasks()["puretext"] for n in range(12)}
    figure = radar_figure(known, benchmark="own", model="run")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(box.count_overlaps(boxes[n + 1 :]) == 0 for n, box in enumerate(boxes))


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
        "report.json",
        "table.md",
    ]
    assert json.loads((folder / "metrics.json").read_text()) == scores.tasks
    for name in ("bars.png", "radar.png"):
        assert len(Image.open(folder / name).convert("RGB").getcolors(1 << 24)) > 50


def test_page_and_data_have_every_item(evaluated):
    folder, benchmark, answers, scores = evaluated
    evaluation = Evaluation.read(folder / "report.json")
    assert [item.key for item in evaluation.items] == [item.key for item in benchmark.items]
    first, second = evaluation.items[0], evaluation.items[2]
    assert (first.question, first.answer["text"]) == (benchmark.items[0].question, answers[first.key])
    assert first.answer["scores"]["bleu1"] == pytest.approx(scores.items[first.key]["bleu1"], abs=1e-6)
    assert (second.reference, second.answer["parsed"]) == ("B. y", "B. y")
    assert first.answer["parsed"] is None and not first.answer["truncated"]
    page = (folder / "report.html").read_text()
    data = read_json_script(page, "data")
    assert [item["answers"] for item in data["items"]] == [[item.answer] for item in evaluation.items]
    images = read_json_script(page, "images")  # the items share one image
    assert len(images) == 1 and {image["id"] for item in evaluation.items for image in item.images} == {
        *images
    }
    assert EVIL not in page


def test_images_are_optional(evaluated, tmp_path):
    """A missing or damaged image does not stop the scoring of existing answers."""
    folder, benchmark, answers, scores = evaluated
    for damage in (lambda file: file.write_bytes(b"no image"), lambda file: file.unlink()):
        damage(tmp_path / "a.png")
        write_report(folder, benchmark, answers, scores, model="run")
        shown = [
            image["id"] for item in Evaluation.read(folder / "report.json").items for image in item.images
        ]
        assert shown == [None] * 5 and read_json_script((folder / "report.html").read_text(), "images") == {}


def test_scores_that_are_not_finite_are_omitted(tmp_path):
    item = Item("only", 0, "?", "a")
    scores = Scores({"only": {"items": 1, "f1": None}}, {item.key: {"f1": float("nan"), "em": 1.0}})
    write_report(tmp_path, Benchmark("own", (item,)), {item.key: "a"}, scores, model="run")
    assert Evaluation.read(tmp_path / "report.json").items[0].answer["scores"] == {"em": 1.0}


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


def test_comparison_page_shows_images_questions_and_all_answers():
    images = [noise(400, 300, seed) for seed in range(3)]
    record = ComparedRecord(
        "positions", f"Fig-0: <image>\nFig-1: <image>\nFig-2: <image>\n{EVIL}", images, "left",
        {"base": (EVIL, False), "full": ("left", True), "empty": (" ", False)},
    )  # fmt: skip
    page = comparison_page("demo", ["<p>start</p>"], [record, record], ["<p>end</p>"])
    assert page.count("<h2>positions</h2>") == 1
    assert page.index("<p>start</p>") < page.index("<h2>positions</h2>") < page.index("<p>end</p>")
    assert page.count("src='data:image/jpeg;base64,") == 6 and page.count(">Fig-2</figcaption>") == 2
    assert "http" not in page and "<script>" not in page and "&lt;image&gt;" not in page
    assert page.count("✓ correct") == 2 and page.count("✗ wrong") == 4 and "(no answer)" in page
    HTMLParser().feed(page)
