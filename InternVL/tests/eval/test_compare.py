"""`m3llm eval compare`: alignment of items, significance tests, page, and rejected input."""

import json
from dataclasses import replace

import pytest
from small_sets import noise

from internvl_chat.cli import main as m3llm
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.compare import compare, read_evaluations
from internvl_chat.eval.report.files import write_report
from internvl_chat.eval.scoring import score
from internvl_chat.eval.significance import compare_scores
from internvl_chat.metrics.suite import Suite
from internvl_chat.utils.html import read_json_script

SUITE = Suite(frozenset({"overlap", "rouge"}))
CHOICES = ("left", "right")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png"):
        noise(120, 80).save(folder / name)
    return folder


def items(images, count: int = 12) -> list[Item]:
    figures = [(Figure(name, "Fig-0", images / name),) for name in ("a.png", "b.png")]
    return [
        *(Item("side", n, f"Which side {n}?", "AB"[n % 2], figures[n % 2], CHOICES) for n in range(count)),
        *(Item("open", n, f"What is {n}?", f"It is lesion {n}", figures[0]) for n in range(count)),
    ]


def evaluate(folder, items, answer, *, model: str, protocol: str = "standard", benchmark: str = "own"):
    """Write the report of a model that gives `answer(item)`."""
    answers = {item.key: answer(item) for item in items}
    known = Benchmark(benchmark, tuple(items))
    write_report(folder, known, answers, score(known, answers, SUITE), model=model, protocol=protocol)
    return folder


ITEM = {"task": "t", "index": 0, "question": "?", "reference": "a", "images": [], "answer": {}}


def scored(em: object = 0.0, **changes) -> dict:
    answer = {"text": "b", "parsed": None, "truncated": False, "scores": {"em": em}}
    return ITEM | {"answer": answer} | changes


def write(folder, item, model: str | None = "m"):
    folder.mkdir()
    report = {"benchmark": "own", "model": model, "protocol": "standard", "items": [item]}
    (folder / "report.json").write_text(json.dumps(report))


def right(item: Item) -> str:
    return item.reference


def half(item: Item) -> str:
    return item.reference if item.index % 3 == 0 else "A" if item.choices else "It is a scar"


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory):
    """Evaluations of a weak and a strong model."""
    out = tmp_path_factory.mktemp("out")
    rows = items(images)
    return [evaluate(out / "weak", rows, half, model="weak"),
            evaluate(out / "strong", rows, right, model="strong")]  # fmt: skip


def test_rows_match_the_scores(folders, capsys):
    assert m3llm(["eval", "compare", *map(str, folders), "--json"]) == 0
    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("side", "accuracy"), ("open", "em"), ("open", "recall"), ("open", "rougeL")
    ]  # fmt: skip
    correct = [half(item) == item.reference for item in items(folders[0]) if item.choices]
    expected = compare_scores(correct, [1] * 12)
    assert rows[0]["baseline_score"] == sum(correct) / 12 and rows[0]["score"] == 1
    assert rows[0]["difference"]["p_value"] == expected.p_value
    assert [row["difference"]["test"] for row in rows] == ["mcnemar", "mcnemar", "bootstrap", "bootstrap"]
    assert all(row["p_holm"] >= row["difference"]["p_value"] for row in rows)
    assert last == {"comparisons": 4, "correction": "holm", "bootstrap_resamples": 9999, "seed": 0}


def test_page_has_the_answers_of_all_models(folders, tmp_path, capsys):
    assert m3llm(["eval", "compare", *map(str, folders), "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "corrected for all 4 comparisons" in out and "seed 0" in out
    page = (tmp_path / "c/comparison.html").read_text()
    data, thumbnails = read_json_script(page, "data"), read_json_script(page, "images")
    assert data["models"] == ["weak", "strong"] and len(data["items"]) == 24
    assert [answer["text"] for answer in data["items"][1]["answers"]] == ["A", "B"]
    used = {image["id"] for item in data["items"] for image in item["images"]}
    assert len(thumbnails) == 2 and used == {*thumbnails}
    assert "<td class='n better'>" in page and "<td class='n worse'>" not in page


def test_images_of_another_evaluation_are_used(folders, images, tmp_path, capsys):
    missing = (Figure("a.png", "Fig-0", images / "none.png"),)
    lost = [replace(item, figures=missing) for item in items(images)]
    first = evaluate(tmp_path / "no-images", lost, half, model="no images")
    assert m3llm(["eval", "compare", str(first), str(folders[1]), "--out", str(tmp_path)]) == 0
    assert len(read_json_script((tmp_path / "comparison.html").read_text(), "images")) == 2


def test_three_models_are_compared_with_the_first(folders, images, tmp_path):
    third = evaluate(tmp_path / "third", items(images), right, model="strong")
    evaluations = read_evaluations([*folders, third], common=False)
    assert [e.model for e in evaluations][1:] == [f"strong ({folders[1]})", f"strong ({third})"]
    rows = compare(evaluations, ["accuracy"])
    assert [(row.baseline, row.model) for row in rows] == [
        (evaluations[0].model, evaluation.model) for evaluation in evaluations[1:]
    ]
    p_value = rows[0].difference.p_value
    assert [row.p_holm for row in rows] == [2 * p_value] * 2


def test_pooled_accuracy_of_several_choice_tasks(images, tmp_path):
    rows = [item for item in items(images) if item.choices]
    rows += [Item("other", n, "Which?", "A", (), CHOICES) for n in range(4)]
    folders = [evaluate(tmp_path / name, rows, answer, model=name) for name, answer in
               (("half", half), ("right", right))]  # fmt: skip
    found = compare(read_evaluations(folders, common=False))
    assert [(row.task, row.items) for row in found] == [("side", 12), ("other", 4), ("all", 16)]


def test_other_items_need_common(folders, images, tmp_path, capsys):
    fewer = evaluate(tmp_path / "fewer", items(images, 10), right, model="fewer")
    command = ["eval", "compare", str(folders[0]), str(fewer)]
    assert m3llm(command) == 2
    error = capsys.readouterr().err
    assert f"{folders[0]}: 4 items that the others do not have" in error
    assert "word differently; --common compares the 20 items that all have" in error
    assert m3llm([*command, "--common", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["items"] == 10


def test_changed_question_is_another_item(folders, images, tmp_path):
    first, *others = items(images)
    changed = [replace(first, question="Which?"), *others]
    folder = evaluate(tmp_path / "changed", changed, right, model="changed")
    evaluations = read_evaluations([folders[0], folder], common=True)
    assert [len(evaluation.items) for evaluation in evaluations] == [23, 23]


def test_other_protocol_needs_common(folders, images, tmp_path, capsys):
    published = evaluate(tmp_path / "p", items(images), half, model="weak", protocol="published")
    command = ["eval", "compare", str(folders[0]), str(published)]
    assert m3llm(command) == 2
    assert "different protocols (standard; published)" in capsys.readouterr().err
    assert m3llm([*command, "--common"]) == 0
    assert "weak (published)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "more", "code", "message"),
    [
        (lambda folder: folder.mkdir(), (), 1, "not an evaluation; run m3llm eval --bench"),
        (lambda folder: None, (), 1, "no report.json"),
        (lambda folder: write(folder, ITEM), (), 1, "not the report"),
        (lambda folder: write(folder, ITEM | {"answer": {"scores": 1}}), (), 1, "not the report"),
        (lambda folder: write(folder, scored(task=["t"])), (), 1, "the wrong type"),
        (lambda folder: write(folder, scored(index="0")), (), 1, "the wrong type"),
        (lambda folder: write(folder, scored("1")), (), 1, "the wrong type"),
        (lambda folder: write(folder, scored(1e999)), (), 1, "the wrong type"),
        (lambda folder: write(folder, scored(), model=None), (), 1, "the wrong type"),
        (lambda folder: (folder.mkdir(), (folder / "report.json").write_text("[" * 99_999)), (), 1,
         "not the report"),
        (lambda folder: (folder.mkdir(), (folder / "report.json").write_text("[]")), (), 1, "not the report"),
        (lambda folder: (folder.mkdir(), (folder / "report.json").write_text('{"items": [{"a": 1}]}')), (), 1,
         "not the report"),
        (lambda folder: None, ("--metrics", "blue"), 2, "--metrics blue: unknown; the choices are"),
    ],
)  # fmt: skip
def test_bad_input(folders, tmp_path, capsys, make, more, code, message):
    make(tmp_path / "bad")
    assert m3llm(["eval", "compare", str(folders[0]), str(tmp_path / "bad"), *more]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_no_metric_in_common(folders, capsys):
    assert m3llm(["eval", "compare", *map(str, folders), "--metrics", "bertscore"]) == 2
    assert "no scores in common for bertscore" in capsys.readouterr().err


def test_command_line_problems(folders, images, tmp_path, capsys):
    assert m3llm(["eval", "compare", str(folders[0])]) == 2
    assert "at least two output folders" in capsys.readouterr().err
    assert m3llm(["eval", "compare", *[str(folders[0])] * 2]) == 2
    assert "given twice" in capsys.readouterr().err
    other = evaluate(tmp_path / "other", items(images), right, model="m", benchmark="other")
    assert m3llm(["eval", "compare", str(folders[0]), str(other), "--common"]) == 2
    assert "different benchmarks cannot be compared: own, other" in capsys.readouterr().err
