"""Benchmark readers: questions, images, references, and rejected input."""

import io
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from small_sets import noise, write_lines

from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.records import Message
from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_prompts
from internvl_chat.eval.benchmarks.item import Figure, Item, log_lost_content
from internvl_chat.eval.benchmarks.mmmu import SUBJECTS
from internvl_chat.eval.benchmarks.mmmu import _parse as parse_mmmu
from internvl_chat.eval.benchmarks.omnimed import short_modality
from internvl_chat.eval.benchmarks.pmc_mi import FILES
from internvl_chat.utils.errors import DataError, UsageError

# Task -> file of training records with the same questions.
TRAINING = {
    "bboxVQA": "boundingboxVQA",
    "compoundVQA": "compound_image",
    "multisubimageVQA": "multiple_subimage",
    "puretext": "puretext",
    "single-subimageVQA": "single_subimage",
    "multi-choice": "subimage_option",
}
OPTIONS = "The candidate options are: A. One\nB. Two\nC. Three"


@pytest.fixture(params=[".", "benchmark"])
def published(request, shared):
    return open_benchmark("pmc-mi", shared / "pmc_mi" / request.param)


def test_published_files(published, shared):
    assert published.tasks == tuple(FILES)
    assert Counter(item.task for item in published.items) == dict.fromkeys(FILES, 25)
    for item in published.items:
        assert [figure.decode().mode for figure in item.figures[:1]] == ["RGB"] * bool(item.figures)
        assert bool(item.choices) == (item.task == "multi-choice")
    letters = [item.reference for item in published.items if item.choices]
    raw = json.loads((shared / "pmc_mi/benchmark" / FILES["multi-choice"]).read_text())
    assert letters == [one["gt"] for one in raw]
    assert all(len(item.choices) == 4 for item in published.items if item.choices)


def test_prompts_match_the_training_data(published, shared):
    """Compare the messages and images with training records of the same questions."""
    compared = 0
    for task, name in TRAINING.items():
        records = map(json.loads, (shared / f"pmc_mi/jsonl/{name}.jsonl").read_text().splitlines())
        asked = {record["conversations"][0]["value"]: record for record in records}
        for item in published.items:
            if item.task == task and (record := asked.get(item.text)):
                assert item.reference == record["conversations"][1]["value"]
                assert [figure.name for figure in item.figures] == record.get("image", [])
                compared += 1
    assert compared >= 6 * 5


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        noise(30, 20).save(tmp_path / "images" / name)
    return tmp_path


def item(**values) -> dict:
    return {"question": "What?", "gt": "That.", "images": ["a.png"], "image_indices": ["Fig-0"], **values}


def write(folder: Path, records: list, name: str = "own_benchmark.json") -> Path:
    (folder / name).write_text(json.dumps(records))
    return folder


def test_custom_folder(folder):
    two = {"images": ["b.png", "a.png"], "image_indices": ["Fig-3", "Fig-1"]}
    write(folder, [item(), item(**two), item(question=OPTIONS, gt="b")])
    write_lines(folder / "more.jsonl", [{"question": "Only text?", "gt": "Yes"}])
    write(folder, [item()], FILES["bboxVQA"])
    benchmark = open_benchmark(str(folder), None)
    assert benchmark.name == folder.name and benchmark.tasks == ("more", "own", "bboxVQA")
    found = {i.key: i for i in benchmark.items}
    assert found["own", 0].text == "Fig-0: <image>\nWhat?"
    assert found["own", 1].text == "Fig-3: <image>\nFig-1: <image>\nWhat?"
    assert [f.path.name for f in found["own", 1].figures] == ["b.png", "a.png"]
    assert (found["own", 2].choices, found["own", 2].reference) == (("One", "Two", "Three"), "B")
    assert found["more", 0].text == "Only text?" and not found["more", 0].figures
    assert found["own", 0].messages("Be brief.") == (
        Message("system", "Be brief."),
        Message("user", found["own", 0].text),
    )
    assert [t.role for t in found["own", 0].messages(None)] == ["user"]


@pytest.mark.parametrize(
    "extra",
    [
        {"options": ["One", "Two"]},
        {"options": {"A": "One", "B": "Two"}},
        {"A": "One", "B": "Two"},
        {"option_a": "One", "option_b": "Two"},
        {"Choices": ["One", "Two"]},
        {"candidates": ["One", "Two"]},
        {"opa": "One", "opb": "Two"},
        {"context": "A 5-year-old child."},
        {"system_prompt": "Be brief."},
    ],
)
def test_parts_of_the_question_under_other_keys(folder, extra):
    [key, *_] = extra
    write(folder, [item(**extra)])
    file = write_lines(folder / "set.jsonl", [{"question": "Which?", "answer": "One", **extra}])
    for name, data in ((str(folder), None), ("vqa", file)):
        with pytest.raises(DataError, match=f"'{key}'.* would be ignored; put (them|it) in"):
            open_benchmark(name, data)
    file.unlink()
    write(folder, [item(**dict.fromkeys(extra), answer_type="open", id=3, explanation="It is.")])
    assert open_benchmark(str(folder), None).items


def test_choices_under_their_key_in_a_folder(folder):
    with pytest.raises(DataError, match=r"'choices' would be ignored; put them in the question"):
        open_benchmark(str(write(folder, [item(choices=["One", "Two"])])), None)


@pytest.mark.parametrize("choices", ["A. One B. Two", ["One"]])
def test_fewer_than_two_options(folder, choices):
    file = write_lines(folder / "set.jsonl", [{"question": "Which?", "answer": "A", "choices": choices}])
    with pytest.raises(DataError, match="'choices' must be a list of at least two options"):
        open_benchmark("vqa", file)


@pytest.mark.parametrize("gt", ["B", "b", "B.", "(B)", "B: Two", "B. two", "Two"])
def test_forms_of_the_correct_option(folder, gt):
    write(folder, [item(question=OPTIONS, gt="A"), item(question=OPTIONS, gt=gt)])
    found = open_benchmark(str(folder), None).items
    assert [(i.task, i.reference, len(i.choices)) for i in found] == [("own", "A", 3), ("own", "B", 3)]


def test_open_answer_to_a_question_with_options(folder):
    write(folder, [item(question=OPTIONS, gt="Two, because of the arrow")])
    assert not open_benchmark(str(folder), None).items[0].choices


def test_different_images_of_the_same_name(folder):
    (folder / "benchmark_images").mkdir()
    copy = folder / "benchmark_images/a.png"
    copy.write_bytes((folder / "images/a.png").read_bytes())
    write(folder, [item()])
    assert open_benchmark(str(folder), None).items
    noise(30, 21).save(copy)
    with pytest.raises(DataError, match=r"images/a\.png and .*benchmark_images/a\.png are different images"):
        open_benchmark(str(folder), None)
    assert open_benchmark(str(folder), None, images=False).items


def test_references_in_decomposed_unicode(questions, folder):
    [item] = questions((("cafe\u0301", "tea"), "caf\u00e9")).items
    assert item.reference == "A"
    file = write_lines(folder / "open.jsonl", [{"question": "Where?", "answer": "cafe\u0301"}])
    assert open_benchmark("vqa", file).items[0].is_correct("caf\u00e9")


def test_letter_without_options_is_an_open_answer(folder):
    write(folder, [item(question="Which blood group?", gt="A")])
    [found] = open_benchmark(str(folder), None).items
    assert not found.choices and found.reference == "A"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be a JSON object, found list"),
        (item(gt=3), "string for 'gt'"),
        (item(question=" "), "string for 'question'"),
        (item(images=["none.png"]), "the image none.png is not in"),
        (item(images="a.png", image_indices=[]), "1 'images', but 0 'image_indices'"),
        (item(images=[1]), "'images' must be a list of non-empty strings"),
        (item(question="<image> what?"), "its images are inserted before it"),
        (item(question="<IMG_CONTEXT>?"), "reserved token"),
        (item(question=OPTIONS, gt="D"), "the correct answer 'D' is not one of the 3 options"),
    ],
)
def test_invalid_item(folder, record, message):
    (folder / "own.json").write_text("[\n" + json.dumps(item()) + ",\n" + json.dumps(record) + "\n]")
    with pytest.raises(DataError) as error:
        open_benchmark(str(folder), None)
    assert message in str(error.value) and "own.json, line 3: " in str(error.value)


def test_all_problems_are_reported_up_to_a_limit(folder):
    write(folder, [item(gt="")] * 30)
    with pytest.raises(DataError, match=r"21 problems(.|\n)*and 10 more"):
        open_benchmark(str(folder), None)


def test_incomplete_benchmark(folder):
    write(folder, [item()], FILES["bboxVQA"])
    with pytest.raises(DataError, match="incomplete: missing puretextQA_benchmark"):
        open_benchmark("pmc-mi", folder)


def test_selection(published):
    chosen = published.select(["puretext", "bboxVQA"], 2)
    assert [i.key for i in chosen.items] == [(t, i) for t in ("puretext", "bboxVQA") for i in range(2)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pmcmi", None, "did you mean pmc-mi"),
        ("pmc-mi", None, "requires --data"),
        ("pmc-mi", "none", "no such file or folder"),
        (".", ".", "remove --data"),
    ],
)
def test_unknown_or_missing_benchmark(tmp_path, monkeypatch, name, data, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_benchmark(name, data and Path(data))


@pytest.fixture
def questions(folder):
    """Return a function that writes questions with options to a file and reads them."""

    def read(*rows: tuple, **options):
        lines = [{"question": "Which?", "choices": list(c), "answer": a} for c, a in rows]
        return open_benchmark("vqa", write_lines(folder / "set.jsonl", lines), **options)

    return read


DENSITY, BLOOD = ("D", "C", "B", "A"), ("A", "B", "AB", "O")


@pytest.mark.parametrize(
    ("rows", "letters"),
    [
        ([(DENSITY, "A"), (("Yes", "No"), "No")], "DB"),  # all other answers are option text
        ([(DENSITY, "A"), (("Yes", "No"), "b")], "AB"),  # all other answers are letters
        ([(BLOOD, "A"), (BLOOD, "O")], "AD"),  # both interpretations are the same option
        ([(DENSITY, "D. A"), (DENSITY, "(B) C")], "DB"),
        ([(("One", "Two"), "B. Two"), (("One", "Two"), "A.")], "BA"),
        ([(("1", "2", "3"), "2")], "B"),
        ([(("A. Yes", "B. No"), "B. No"), (("A) Yes", "B) No"), "A")], "BA"),
    ],
)
def test_answers_as_letters_or_text(questions, rows, letters):
    items = questions(*rows).items
    assert "".join(item.reference for item in items) == letters


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(DENSITY, "A")], "'A' is ambiguous: it is the letter of option A and the text of option D"),
        ([(DENSITY, "A"), (("Yes", "No"), "No"), (("Yes", "No"), "A")], 'for example "D. A"'),
        ([(DENSITY, "D. B")], "is not one of the 4 options"),
        ([(("2", "1", "0"), 2)], "the text of one option and the 0-based index of a different one"),
        ([(("B. Yes", "A. No"), "A")], "begin with the letters B, A; list them in alphabetical order"),
    ],
)
def test_ambiguous_answers_are_rejected(questions, rows, message):
    with pytest.raises(DataError) as caught:
        questions(*rows)
    assert message in str(caught.value) and "set.jsonl, line 1: " in str(caught.value)


def test_options_keep_their_text_without_their_letter(questions):
    [item] = questions((("A. Yes", "B. No"), "A")).items
    assert item.choices == ("Yes", "No") and item.text == "Which?\nA. Yes\nB. No"
    [item] = questions((("A. fumigatus", "C. albicans"), "B")).items
    assert item.choices == ("A. fumigatus", "C. albicans")


def test_options_that_look_like_letters_are_reported(questions, caplog):
    questions((DENSITY, "D. A"), (BLOOD, "O"))
    assert (
        "1 item with an option whose text is the letter of a different option (for example set 0)"
        in caplog.text
    )
    caplog.clear()
    questions((BLOOD, "O"))
    assert not caplog.records


def test_repeated_correct_options_are_reported(questions, caplog):
    questions((("CT", "CT ", "MRI"), "MRI"))
    assert not caplog.records
    questions((("CT", "ct ", "MRI"), "CT"))
    assert "1 item with a repeated correct option (for example set 0)" in caplog.text


def omnimed(folder: Path, *changes: dict) -> Path:
    """Write OmniMedVQA questions; None removes a key."""
    options = {"option_A": "CT", "option_B": "MR", "option_C": "X-Ray"}
    one = {
        "question": "Which?",
        "gt_answer": "CT",
        "image_path": "images/a.png",
        "modality_type": "CT",
        **options,
    }
    rows = [{k: v for k, v in {**one, **change}.items() if v is not None} for change in changes]
    (folder / "QA_information").mkdir(exist_ok=True)
    return write(folder / "QA_information", rows).parent


BAD = {
    "non-empty string for 'modality_type'": {"modality_type": None},
    "the image images/none.png is not in": {"image_path": "images/none.png"},
    "the correct answer 'CT.' is not one of the 3 options": {"gt_answer": "CT."},
    "non-empty string for 'gt_answer', because other items of the task have one": {"gt_answer": None},
    "non-empty string for 'question'": {"question": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_items_can_be_skipped_by_name(folder, caplog, message):
    data = omnimed(folder, {}, BAD[message], {"gt_answer": "MR"})
    with pytest.raises(DataError) as caught:
        open_benchmark("omnimedvqa", data)
    assert message in str(caught.value) and str(caught.value).endswith("--on_bad_record skip")
    benchmark = open_benchmark("omnimedvqa", data, on_bad_record="skip")
    assert [item.reference for item in benchmark.items] == ["A", "B"] and len(benchmark.excluded) == 1
    assert "skipped 1 of 3 items:" in caplog.text and message in caplog.text
    if "modality_type" not in message:  # the task is known, so that the others keep their indices
        assert [item.key for item in benchmark.items] == [("CT", 0), ("CT", 2)]
        assert benchmark.totals == {"CT": 3}


def test_nothing_left_after_skipping(folder):
    with pytest.raises(DataError, match="no usable items"):
        open_benchmark("omnimedvqa", omnimed(folder, {"question": ""}), on_bad_record="skip")


def test_omnimed_answers_are_never_letters(folder):
    options = dict(zip(("option_A", "option_B", "option_C", "option_D"), DENSITY, strict=True))
    [item] = open_benchmark("omnimedvqa", omnimed(folder, {**options, "gt_answer": "A"})).items
    assert item.reference == "D" and item.is_correct("D. A")


def test_omnimed_options_beyond_d(folder):
    [item] = open_benchmark(
        "omnimedvqa", omnimed(folder, {"option_D": "US", "option_E": "OCT", "gt_answer": "OCT"})
    ).items
    assert item.reference == "E" and item.choices[4] == "OCT"
    with pytest.raises(DataError, match=r"the options in 'option_1' would be ignored"):
        open_benchmark("omnimedvqa", omnimed(folder, {"option_1": "OCT"}))


def test_images_are_not_needed_to_score_answers(folder):
    data = omnimed(folder, {}, {"image_path": "images/none.png"})
    assert len(open_benchmark("omnimedvqa", data, images=False).items) == 2
    write(folder, [item(images=["none.png"])])
    assert len(open_benchmark(str(folder), None, images=False).items) == 1
    file = write_lines(folder / "set.jsonl", [{"question": "?", "answer": "no", "image": "none.png"}])
    assert len(open_benchmark("vqa", file, images=False).items) == 1


def test_only_the_requested_tasks_are_read(folder, tmp_path):
    data = omnimed(folder, {}, {"modality_type": "MR", "image_path": "images/none.png"})
    benchmark = open_benchmark("omnimedvqa", data, tasks=["CT"])
    assert benchmark.tasks == ("CT",) and not benchmark.excluded
    (folder / "own.json").write_text("[broken")
    write(folder, [{"question": "Only text?", "gt": "Yes"}], FILES["puretext"])
    assert open_benchmark("pmc-mi", folder, tasks=["puretext"]).tasks == ("puretext",)
    custom = open_benchmark(str(folder), None, tasks=["puretext"])
    assert custom.tasks == ("puretext",)
    prompts = folder / "prompts.yaml"
    prompts.write_text("own: Look.\npuretext: Read.")
    assert system_prompts(custom, prompts) == {"puretext": "Read."}
    for name, location, known in (
        ("omnimedvqa", data, "CT, MR"),
        ("pmc-mi", folder, ", ".join(FILES)),
        (str(folder), None, "own, puretext"),
        ("mmmu-med", folder, ", ".join(SUBJECTS)),
    ):
        with pytest.raises(UsageError, match=f"--tasks none: unknown; .* are {known}"):
            open_benchmark(name, location, tasks=["none"])


def test_items_without_references(folder):
    rows = [
        {"question": "What?"},
        {"question": "Which?", "choices": ["A", "B"], "answer": None, "task": "choice"},
    ]
    benchmark = open_benchmark("vqa", write_lines(folder / "set.jsonl", rows))
    assert [item.reference for item in benchmark.items] == ["", ""] and not benchmark.labeled.items
    assert benchmark.items[1].text == "Which?\nA. A\nB. B"
    with pytest.raises(DataError, match=r"line 2: expected a non-empty string for 'answer', because other"):
        open_benchmark("vqa", write_lines(folder / "set.jsonl", [{**rows[0], "answer": "a"}, rows[0]]))
    assert not open_benchmark("omnimedvqa", omnimed(folder, {"gt_answer": None})).items[0].reference
    custom = {key: value for key, value in item(question=OPTIONS).items() if key != "gt"}
    write(folder, [custom])
    (folder / "set.jsonl").unlink()
    assert not open_benchmark(str(folder), None).labeled.items


def test_omnimed(folder):
    options = {"option_A": "CT", "option_B": "MR", "option_C": "X-Ray"}
    one = {"question": "Which modality?", "gt_answer": "MR", "image_path": "images/a.png", **options}
    (folder / "QA_information/Open-access").mkdir(parents=True)
    (folder / "QA_information/Restricted-access").mkdir()
    (folder / "QA_information/Restricted-access/closed.json").write_text("[")
    write(
        folder / "QA_information/Open-access",
        [
            {**one, "modality_type": "MR (Mag-netic Resonance Imaging)"},
            {**one, "modality": "Endoscopy", "gt_answer": "ct "},
            {**one, "modality_type": "CT(Computed Tomography)"},
        ],
    )
    benchmark = open_benchmark("omnimedvqa", folder)
    assert [(i.key, i.reference) for i in benchmark.items] == [
        (("CT", 0), "B"),
        (("MR", 0), "B"),
        (("Endoscopy", 0), "A"),
    ]
    assert benchmark.items[0].text == "<image>\nWhich modality?\nA. CT\nB. MR\nC. X-Ray"
    assert benchmark.pooled


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("CT(Computed Tomography)", "CT"),
        ("MR (Mag-netic Resonance Imaging)", "MR"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        ("Optical Coherence Tomography", "OCT"),
        ("Fundus Photography", "FP"),
        ("Dermoscopy", "Der"),
        ("Microscopy Images", "Mic"),
        ("X-Ray", "X-Ray"),
        ("x_ray", "X-Ray"),
        ("ultrasound", "US"),
        ("MRI", "MR"),
        ("CT-scan", "CT"),
        ("Digital X-ray", "X-Ray"),
        ("Color fundus image", "FP"),
        ("ctDNA plot", "ctDNA plot"),
        ("Mrs. Smith's images", "Mrs. Smith's images"),
        ("Octopus", "Octopus"),
        (" Infrared Reflectance Imaging ", "Infrared Reflectance Imaging"),
    ],
)
def test_modalities(name, short):
    assert short_modality(name) == short


def test_mmmu(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    stream = io.BytesIO()
    noise(20, 30).save(stream, "PNG")
    picture = {"bytes": stream.getvalue(), "path": "1.png"}
    row = {
        "id": "validation_1",
        "question": "What is <image 1>?",
        "options": "['a', '<image 2>']",
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": picture,
        "image_2": picture,
    }
    another = {
        **row,
        "question": "How many?",
        "options": "[]",
        "answer": "['2', 'two']",
        "question_type": "open",
        "image_2": None,
    }
    for subject in SUBJECTS:
        (tmp_path / subject).mkdir()
        table = pyarrow.Table.from_pylist([row, another])
        parquet.write_table(table, tmp_path / subject / "validation-00000-of-00001.parquet")
    benchmark = open_benchmark("mmmu-med", tmp_path)
    assert benchmark.tasks == SUBJECTS and len(benchmark.items) == 10
    first, second = benchmark.items[:2]
    assert first.text == "Fig-1: <image>\nFig-2: <image>\nWhat is Fig-1?\nA. a\nB. Fig-2"
    assert first.reference == "B" and first.figures[1].decode().size == (20, 30)
    assert second.text == "Fig-1: <image>\nHow many?" and second.accepted == ("two",)

    assert second.is_correct(" Two ") and second.is_correct("2") and not second.is_correct("3")
    (tmp_path / SUBJECTS[0] / "validation-00000-of-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a parquet file"):
        open_benchmark("mmmu-med", tmp_path)
    (tmp_path / SUBJECTS[0] / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=f"no validation-.*{SUBJECTS[0]}"):
        open_benchmark("mmmu-med", tmp_path)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"question": "What is <image 2>?"}, "image_2"),
        ({"options": "['<image 3>', '<image 4>']"}, "image_3, image_4"),
        ({"question": "What is <Image1>?", "image_1": None}, "image_1"),
        ({"question": "What is <image 1>?", "image_1": {"bytes": None, "path": "x"}}, "image_1"),
        ({"question": "What is <image1> or <Image 1>?"}, None),
        ({"image_1": None}, None),
    ],
)
def test_mmmu_references_to_missing_images(change, missing):
    row = {"id": "1", "question": "Which?", "options": "['a', 'b']", "answer": "B",
           "question_type": "multiple-choice", "image_1": {"bytes": b"x"}} | change  # fmt: skip
    if missing:
        with pytest.raises(DataError, match=f"refers to {missing}, but the row has no such image"):
            parse_mmmu("Pharmacy", row)
    else:
        assert "<" not in parse_mmmu("Pharmacy", row).question


def test_problems_in_a_single_line_file_have_object_numbers(folder):
    file = folder / "set.json"
    right, wrong = {"question": "What?", "answer": "This."}, {"question": "What?"}
    file.write_text(json.dumps([wrong, right, wrong]))
    with pytest.raises(DataError) as caught:
        open_benchmark("vqa", file)
    for number in (1, 3):
        assert f"{file}, line 1: object {number} of the file: expected a non-empty string" in str(
            caught.value
        )
    assert "object 2" not in str(caught.value)


def test_vqa(folder):
    file = write_lines(
        folder / "set.jsonl",
        [
            {"question": "What?", "answer": "That", "image": "images/a.png"},
            {
                "question": "Is <image> like <image>?",
                "answer": "no",
                "image": ["images/a.png", "images/b.png"],
            },
            {"question": "Both?", "answer": "yes", "images": ["images/a.png", "images/b.png"], "task": "two"},
            {"question": "Which?", "answer": "Two", "choices": ["One", "Two"], "task": "choice"},
            {"question": "And?", "answer": "Nothing"},
        ],
    )
    benchmark = open_benchmark("vqa", file)
    assert [i.key for i in benchmark.items] == [("set", 0), ("set", 1), ("set", 2), ("two", 0), ("choice", 0)]
    assert [i.text for i in benchmark.items] == [
        "<image>\nWhat?",
        "Is <image> like <image>?",
        "And?",
        "Fig-0: <image>\nFig-1: <image>\nBoth?",
        "Which?\nA. One\nB. Two",
    ]
    assert benchmark.items[4].reference == "B"
    write_lines(file, [{"question": "Which?", "answer": "A", "choices": [str(n) for n in range(27)]}])
    with pytest.raises(DataError, match="27 options; at most 26"):
        open_benchmark("vqa", file)
    write_lines(file, [{"question": "Is <image>?", "answer": "no"}])
    with pytest.raises(DataError, match=r"line 1: 1 <image> in the question, but 0 images"):
        open_benchmark("vqa", file)


def test_corrupt_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    for figure in (Figure("a", path=tmp_path / "a.png"), Figure("a", content=b"nothing")):
        with pytest.raises(DataError, match="cannot be read"):
            figure.decode()


def test_system_prompts(folder, published):
    texts = system_prompts(published)
    assert len(set(texts.values())) == 6 and all(texts.values())
    own = folder / "prompts.yaml"
    own.write_text("puretext: Be brief.\npmc-mi: >-\n  Look\n  closely.\n")
    assert system_prompts(published, own)["puretext"] == "Be brief."
    assert system_prompts(published, own)["bboxVQA"] == "Look closely."
    own.write_text('{"puretext": "Be brief."}')
    assert system_prompts(published, own)["bboxVQA"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("puretxt: a", "unknown tasks: puretxt; the tasks of pmc-mi are puretext, multi-choice"),
        ("- a", "must map"),
        ("puretext: 3", "must map"),
        ("a: [", "cannot be read as YAML"),
        (None, "cannot be read as YAML"),
    ],
)
def test_invalid_system_prompts(tmp_path, published, content, message):
    if content:
        (tmp_path / "prompts.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        system_prompts(published, tmp_path / "prompts.yaml")


def test_correct_answers():
    choice = Item("t", 0, "?", "B", choices=("One", "Two"))
    assert choice.is_correct("B.") and choice.is_correct("two") and not choice.is_correct("A or B")
    assert Item("t", 0, "?", "Größe").is_correct(" größe\n") and not Item("t", 0, "?", "a").is_correct("a.")


def test_mixed_task_is_split(folder):
    """Open answers in a multiple-choice task would have no metrics except accuracy."""
    rows = [
        {"question": "Which?", "answer": "A", "choices": ["One", "Two"]},
        {"question": "How many?", "answer": 3},
        {"question": "Which then?", "answer": "Two", "choices": ["One", "Two"]},
    ]
    items = open_benchmark("vqa", write_lines(folder / "set.jsonl", rows)).items
    assert [(item.task, item.index, item.reference) for item in items] == [
        ("set", 0, "A"), ("set", 1, "B"), ("set (open)", 0, "3"),
    ]  # fmt: skip


def test_error_of_a_corrupt_image_contains_its_item(folder):
    (folder / "images/truncated.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    file = write_lines(
        folder / "set.jsonl", [{"question": "?", "answer": "no", "image": "images/truncated.jpg"}]
    )
    [item] = open_benchmark("vqa", file).items
    with pytest.raises(DataError) as caught:
        item.prompt(None)
    assert str(caught.value).startswith("set, item 0: ")
    assert str(caught.value).count("truncated.jpg") == 1


class TestUnsupportedImages:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"image_path": "images/a.png"}, "unsupported key 'image_path' refers to 'images/a.png'"),
            ({"img": "images/a.png"}, "'img' refers to"),
            ({"video": "a.mp4"}, "'video' refers to"),
            ({"image": "images/a.png", "question": "<image 1> What?"}, "unsupported placeholder '<image 1>'"),
            ({"question": "<|image_pad|> What?"}, "unsupported placeholder '<|image_pad|>'"),
            ({"image": "https://example.org/a.png"}, "is a URL (https://), which is not supported"),
            ({"image": "data:image/png;base64,iVBORw0KGgo="}, "embedded as base64"),
            ({"image": "images/A.PNG"}, "the folder contains a.png"),
        ],
    )
    def test_vqa(self, folder, values, message):
        file = write_lines(folder / "set.jsonl", [{"question": "What?", "answer": "That", **values}])
        with pytest.raises(DataError) as caught:
            open_benchmark("vqa", file)
        assert message in str(caught.value)

    @pytest.mark.parametrize("values", [{"image_path": "c.png"}, {"question": "See <image1>"}])
    def test_custom_folder(self, folder, values):
        write(folder, [item(**values)])
        with pytest.raises(DataError, match=r"unsupported (key|placeholder)"):
            open_benchmark(str(folder), None)


def test_control_tokens_in_an_answer(folder, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
    rows = [{"question": "What?", "answer": answer} for answer in ("That", "A nodule.<|im_end|>")]
    open_benchmark("vqa", write_lines(folder / "set.jsonl", rows))
    [message] = set(caplog.messages)
    assert "1 questions or answers contain control tokens such as <|im_end|>, e.g. in line 2" in message


def test_reading_options(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(30, 20).save(folder / "turned.jpg", exif=exif)
    one = Item("t", 0, "q", "a", (Figure("turned.jpg", path=folder / "turned.jpg"),))
    assert one.prompt(None).images[0].size == (30, 20)
    assert one.prompt(None, ImageOptions(exif_transpose=True)).images[0].size == (20, 30)


def test_lost_content_is_logged_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
    for name in ("a.gif", "b.gif"):
        noise(9, 9).save(folder / name, save_all=True, append_images=[noise(9, 9, seed=1)])
    figures = tuple(Figure(name, path=folder / name) for name in ("a.gif", "b.gif", "missing.gif"))
    log_lost_content([Item("t", i, "q", "a", figures) for i in range(3)], ImageOptions())
    [message] = set(caplog.messages)
    assert message == "multiple frames: 2 images, e.g. a.gif: only the first of 2 pages or frames is used"
