"""The report in a browser: charts, figures, hostile texts, themes, overlays and refreshing."""

import json
import re
from pathlib import Path

import pytest
from browser import needs_browser, open_page, screenshot
from playwright.sync_api import expect
from run_files import NAME, SCRIPT, complete_run, sample, session, write_lines

from benchmarks.run_report import SETS, write_run
from internvl_chat.train.report.charts import validation_charts
from internvl_chat.train.report.page import unique_names, write_report
from internvl_chat.train.report.run import read_run

DRAWN = "n => document.querySelectorAll('.canvas[data-drawn]').length === n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return complete_run(tmp_path_factory.mktemp("runs") / "lora")


def written(*folders: Path, **options) -> str:
    """Write a report next to the first run and return it without plotly.js."""
    file = folders[0].parent / "report.html"
    write_report(folders, file, **options)
    text = file.read_text(encoding="utf-8")
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def open_report(page, file: Path) -> int:
    """Open a report and wait until its charts are drawn; return their number."""
    page.goto(file.as_uri())
    count = page.locator(".canvas").count()
    page.wait_for_function(DRAWN, arg=count)
    return count


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light")])
def test_charts_are_drawn_and_texts_are_shown(run, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    write_report([run], file)
    with open_page(width) as page:
        page.emulate_media(color_scheme=scheme)
        assert open_report(page, file) == 11
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title() == "lora"
        shown = page.locator("#chart-sets .legendtext").all_text_contents()
        assert shown == [f"{NAME[:24]}…{NAME[-15:]}", *sorted(SETS[:3])]
        shown = page.locator("#chart-loss .legendtext").all_text_contents()
        assert shown == ["each step", "mean", "validation"]
        for text in (f"bottom {SCRIPT}", f"no image {SCRIPT}", NAME):
            assert page.get_by_text(text).count() > 0
        curves = page.locator("#chart-loss .js-line").last
        assert curves.evaluate("e => getComputedStyle(e).stroke") == (
            "rgb(242, 136, 75)" if scheme == "dark" else "rgb(213, 94, 0)"
        )
        screenshot(page, f"report-{scheme}-{width}", tmp_path, full_page=True)


@needs_browser
def test_pictures_of_the_documentation(sample_data, tmp_path):
    folder = tmp_path / "lora"
    complete_run(folder, 1200, sets=SETS)
    (folder / "samples.jsonl").unlink()
    record = json.loads((sample_data / "held_out/single_subimage.jsonl").read_text().splitlines()[0])
    images = [str(sample_data / "images" / name) for name in record["image"]]
    question, reference = (message["value"] for message in record["conversations"][:2])
    for step, answer in ((300, "chart"), (600, "MRI"), (1200, reference)):
        row = sample(step, answer, images=images, question=question, reference=reference)
        write_lines(folder / "samples.jsonl", row | {"dataset": "qa-single_subimage"})
    write_report([folder], tmp_path / "report.html")
    with open_page(1280, 1010) as page:
        open_report(page, tmp_path / "report.html")
        screenshot(page, "report", tmp_path)
        page.set_viewport_size({"width": 1280, "height": 420})
        page.locator("#answers").evaluate("element => scrollTo(0, element.offsetTop - 60)")
        screenshot(page, "report_answers", tmp_path)


@needs_browser
def test_figures_are_enlarged_with_the_keyboard(run, tmp_path):
    file = tmp_path / "report.html"
    write_report([run], file)
    with open_page() as page:
        open_report(page, file)
        figure = page.get_by_role("button", name="Fig-0: figure.png")
        figure.press("Enter")
        assert figure.get_attribute("aria-pressed") == "true"
        figure.press("Enter")
        assert figure.get_attribute("aria-pressed") == "false"
        assert page.locator(".figure.missing").inner_text() == "Fig-1\nnot available"


@needs_browser
def test_colors_follow_the_theme(run, tmp_path):
    file = tmp_path / "report.html"
    write_report([run], file)
    with open_page() as page:
        open_report(page, file)
        tick = page.locator("#chart-loss .xtick text").first
        colors = [tick.evaluate("e => getComputedStyle(e).fill")]
        page.evaluate("document.querySelectorAll('.canvas').forEach(e => delete e.dataset.drawn)")
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(DRAWN, arg=page.locator(".canvas").count())
        colors.append(tick.evaluate("e => getComputedStyle(e).fill"))
        assert colors == ["rgb(89, 99, 110)", "rgb(154, 165, 177)"]


@needs_browser
def test_several_runs_are_overlaid(run, tmp_path):
    other = complete_run(tmp_path / "full", 60, seed=1, level=0.7)
    (other / "config.yaml").write_text("learning_rate: 1.0e-05\n")
    file = tmp_path / "comparison.html"
    write_report([run, other], file)
    with open_page() as page:
        open_report(page, file)
        assert page.title() == "lora and full"
        assert page.locator("#chart-loss .legendtext").all_text_contents() == [
            "lora", "lora, validation", "full", "full, validation",
        ]  # fmt: skip
        differences = page.locator("#configuration table").first.inner_text()
        assert re.search(r"--learning_rate\s+5e-06\s+1e-05", differences)
        assert re.search(r"--use_llm_lora\s+16\s+0", differences)
        assert "--seed" not in differences
        assert page.locator(".question dt").all_inner_texts() == [
            "reference",
            "lora, step 40",
            "full, step 60",
        ]
        screenshot(page, "report-comparison", tmp_path, full_page=True)


@needs_browser
def test_page_refreshes_itself_until_paused(run, tmp_path):
    file = tmp_path / "report.html"
    write_report([run], file, refresh=3600)
    with open_page() as page:
        page.clock.install()
        open_report(page, file)
        page.locator("#configuration summary", has_text="All flags").click()
        page.evaluate("window.loaded = true")
        page.clock.fast_forward("01:00:00")
        page.wait_for_function("() => window.loaded === undefined")
        expect(page.locator("#configuration details[open]")).to_have_count(1)
        page.get_by_label("refresh every 3600 s").uncheck()
        page.evaluate("window.loaded = true")
        page.clock.fast_forward("01:00:00")
        page.wait_for_timeout(500)
        assert page.evaluate("window.loaded") is True
    assert 'id="refresh"' not in written(run)


def test_texts_cannot_end_a_script(run):
    text = written(run)
    assert SCRIPT not in text
    assert text.count("</script>") == 2


def test_finished_run(run):
    text = written(run)
    assert "finished</span>" in text and "resumed 1 time" in text
    assert "(cut off)" in text and "(exact match)" in text
    assert "3 similar messages" not in text and "2 similar messages, the last one at 09:30:04" in text
    assert "18 records with fewer tiles" in text
    assert "End of the log" not in text


def test_unfinished_run_with_an_error(run, tmp_path):
    folder = tmp_path / "crashed"
    complete_run(folder)
    (folder / "train_results.json").unlink()
    write_lines(folder / "sessions.jsonl", session(20, 100))
    write_lines(
        folder / "training_log.txt", "Traceback (most recent call last):\n  File\nValueError: <b>bad</b>\n"
    )
    text = written(folder)
    assert "unfinished: step 40 of 100" in text
    assert '<p class="alert error">ValueError: &lt;b&gt;bad&lt;/b&gt;</p>' in text
    assert "End of the log" in text and "left</span>" in text


@pytest.mark.parametrize("steps", [0, 1, 2, 15])
def test_short_run_without_validation(tmp_path, steps):
    folder = tmp_path / "run"
    write_run(folder, steps)
    (folder / "validation.jsonl").unlink()
    text = written(folder)
    assert "No validation results" in text and "No sample answers" in text
    assert ("No step has been logged yet" in text) == (steps == 0)
    assert ('id="chart-loss"' in text) == (steps > 0)


def test_steps_without_a_finite_loss(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"step": 1, "loss": None, "grad_norm": None, "skipped_because": "the loss is nan <b>"}
    write_lines(folder / "metrics.jsonl", row, row | {"step": 2})
    text = written(folder)
    assert "the loss is nan &lt;b&gt;" in text and "skipped (2)" in text


def test_many_datasets_and_validations(tmp_path):
    folder = tmp_path / "run"
    names = [f"set-{number}" for number in range(40)]
    write_run(folder, 120, sets=names)
    write_lines(folder / "samples.jsonl", *(sample(step, f"answer {step}") for step in range(1, 121)))
    text = written(folder)
    assert all(f"<td>{name}</td>" in text for name in names)
    answers = re.findall(r"<dt>step (\d+)</dt>", text)
    assert len(answers) == 6 and (answers[0], answers[-1]) == ("1", "120")


def test_axis_of_percentages_begins_at_zero(tmp_path):
    scores = {"records": 4, "loss": 2.0, "em": 0.0, "rougeL": 50.0}
    write_lines(tmp_path / "validation.jsonl", *({"step": n, "sets": {}, **scores} for n in (5, 10)))
    charts = {chart.key: json.loads(chart.figure) for chart in validation_charts({"a": read_run(tmp_path)})}
    limits = {key: figure["layout"]["yaxis"].get("range") for key, figure in charts.items()}
    assert limits == {"eval-loss": None, "eval-em": [0, 1], "eval-rougeL": [0, 54]}


def test_names_are_unique_and_short():
    folders = [Path("/runs/a/lora"), Path("/runs/b/lora"), Path("/runs/full")]
    assert unique_names(folders) == ["a/lora", "b/lora", "full"]


def test_runs_without_a_common_dataset(run, tmp_path):
    write_run(tmp_path / "other", 5, sets=["only"])
    text = written(run, tmp_path / "other")
    assert "Loss of only" in text and f"Loss of {SETS[0]}" in text


def test_surrogates_are_written(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, 1)
    write_lines(folder / "samples.jsonl", sample(1, "\ud800", dataset="\udcff"))
    assert "?, record 3" in written(folder)
