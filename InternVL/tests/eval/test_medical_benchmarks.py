"""Medical benchmarks in their published formats: readers on small hand-made samples, and their metrics."""

import csv
import io
import json
import logging

import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.preprocessing import MultiLabelBinarizer
from small_sets import noise, write_lines

from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_prompts
from internvl_chat.eval.scoring import score
from internvl_chat.metrics.overlap import normalize_words
from internvl_chat.metrics.suite import Suite
from internvl_chat.utils.errors import DataError

SUITE = Suite(frozenset({"overlap", "macro"}))


def png(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    noise(40, 30, seed).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(file, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def image(seed: int = 0, path: str | None = None) -> dict:
    return {"bytes": png(seed), "path": path}


def frame_row(number: int, images: int, **changes) -> dict:
    shown = {f"image_{n}": image(n) if n <= images else None for n in range(1, 6)}
    return {
        "question_id": f"q{number}",
        "system": "nervous",
        "organ": "brain",
        "keyword": "stroke",
        "modality": "MRI",
        "video_id": "v",
        "question": f"What do the images show ({number})?",
        "options": ["Stroke", "Tumor", "Bleeding"],
        "image_url": [f"{n}.jpg" for n in range(images)],
        "correct_answer": "ABC"[number % 3],
        "reasoning_chain": "First, ...",
        **shown,
        **changes,
    }


@pytest.fixture
def frames(tmp_path):
    rows = [frame_row(0, 3), frame_row(1, 2), frame_row(2, 5), frame_row(3, 2)]
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    return tmp_path


def test_medframeqa(frames):
    benchmark = open_benchmark("medframeqa", frames)
    assert [item.key for item in benchmark.items] == [
        ("2 images", 0),
        ("2 images", 1),
        ("3 images", 0),
        ("5 images", 0),
    ]
    first = benchmark.items[0]
    assert first.text == (
        "Image 1: <image>\nImage 2: <image>\nWhat do the images show (1)?\nA. Stroke\nB. Tumor\nC. Bleeding"
    )
    assert first.reference == "B" and first.choices == ("Stroke", "Tumor", "Bleeding")
    assert [figure.content for figure in first.figures] == [png(1), png(2)]
    assert first.figures[0].decode().size == (40, 30)
    assert benchmark.pooled and "letter alone" in system_prompts(benchmark)["2 images"]
    scores = score(benchmark, {item.key: item.reference for item in benchmark.items}, SUITE)
    assert list(scores.tasks) == ["2 images", "3 images", "5 images", "all"]


def test_equal_embedded_images_share_memory(frames):
    figures = [item.figures[0] for item in open_benchmark("medframeqa", frames).items]
    assert len({id(figure.content) for figure in figures}) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (frame_row(0, 1), "expected 2 to 5 images from image_1 on, found image_1"),
        (frame_row(0, 3, image_1=None), "found image_2, image_3"),
        (frame_row(0, 2, correct_answer="D"), "is not one of the 3 options"),
        (frame_row(0, 2, options=["One"]), "at least two options"),
        (frame_row(0, 2, question=" "), "non-empty string for 'question'"),
    ],
)
def test_medframeqa_problems(tmp_path, row, message):
    write_parquet(tmp_path / "data/test-0.parquet", [frame_row(1, 2), row])
    with pytest.raises(DataError) as caught:
        open_benchmark("medframeqa", tmp_path)
    assert "test-0.parquet, row 2: " in str(caught.value) and message in str(caught.value)


def expert_row(number: int, kind: str, count: int = 1, **changes) -> dict:
    options = {letter: f"Disease {letter.lower()}{number}" for letter in "ABCDE"}
    listed = " ".join(f"({letter}) {text}" for letter, text in options.items())
    return {
        "id": f"MM-{number}",
        "question": f"A patient has a rash ({number}). What is it?\nAnswer Choices: {listed}",
        "options": options,
        "label": "C",
        "images": [f"MM-{number}-{'abc'[n]}.jpeg" for n in range(count)],
        "medical_task": "Diagnosis",
        "body_system": "Skeletal",
        "question_type": kind,
        **changes,
    }


def write_expert(folder, rows):
    (folder / "MM").mkdir()
    (folder / "images").mkdir()
    write_lines(folder / "MM/test.jsonl", rows)
    for row in rows:
        for name in row["images"]:
            noise(30, 30).save(folder / "images" / name)
    return folder


def test_medxpertqa(tmp_path):
    rows = [expert_row(0, "Understanding"), expert_row(1, "Reasoning", 2), expert_row(2, "Reasoning")]
    plain = expert_row(3, "Reasoning", question="Which organ?")
    benchmark = open_benchmark("medxpertqa-mm", write_expert(tmp_path, [*rows, plain]))
    assert [item.key for item in benchmark.items] == [
        ("Reasoning", 0),
        ("Reasoning", 1),
        ("Reasoning", 2),
        ("Understanding", 0),
    ]
    first = benchmark.items[0]
    assert first.question == rows[1]["question"] and first.text.startswith(
        "Fig-0: <image>\nFig-1: <image>\nA pat"
    )
    assert first.reference == "C" and first.choices[2] == "Disease c1"
    assert first.selected_letter("(C) Disease c1") == "C"
    assert benchmark.items[2].question.endswith(
        "?\nA. Disease a3\nB. Disease b3\nC. Disease c3\nD. Disease d3\nE. Disease e3"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "expected file names for 'images'"),
        ({"images": ["none.jpeg"]}, "the image none.jpeg is not in"),
        ({"options": ["a", "b"]}, "'options' must map the letters"),
        ({"options": {"A": "a", "C": "b"}}, "'options' must map the letters"),
        ({"label": "F"}, "is not one of the 5 options"),
        ({"question_type": None}, "non-empty string for 'question_type'"),
    ],
)
def test_medxpertqa_problems(tmp_path, changes, message):
    folder = write_expert(tmp_path, [expert_row(0, "Reasoning"), expert_row(1, "Reasoning")])
    rows = [expert_row(0, "Reasoning"), expert_row(1, "Reasoning", **changes)]
    write_lines(folder / "MM/test.jsonl", rows)
    with pytest.raises(DataError) as caught:
        open_benchmark("medxpertqa-mm", folder)
    assert "test.jsonl, line 2" in str(caught.value) and message in str(caught.value)


FIRST = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]
SECOND = [
    "",
    "Figure_path",
    "Caption",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "split",
]


def write_csv(file, *rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return file


@pytest.fixture
def pmc(tmp_path):
    (tmp_path / "images").mkdir()
    noise(30, 30).save(tmp_path / "images/PMC1_F1.jpg")
    return tmp_path


def test_pmc_vqa_version_1(pmc):
    row = [
        "PMC1_F1.jpg",
        "What is the uptake pattern in the breast? ",
        "Focal uptake",
        " A:Diffuse uptake ",
        " B:Focal uptake",
        " C:No uptake ",
        "D:Cannot be determined, at all ",
        "B",
    ]
    benchmark = open_benchmark("pmc-vqa", write_csv(pmc / "test_clean.csv", FIRST, row, row))
    assert [item.key for item in benchmark.items] == [("test_clean", 0), ("test_clean", 1)]
    item = benchmark.items[0]
    assert item.text == (
        "<image>\nWhat is the uptake pattern in the breast?\n"
        "A. Diffuse uptake\nB. Focal uptake\nC. No uptake\nD. Cannot be determined, at all"
    )
    assert item.reference == "B" and item.figures[0].path == pmc / "images/PMC1_F1.jpg"


def test_pmc_vqa_version_2(pmc):
    row = [
        "0",
        "PMC1_F1.jpg",
        "A caption,\nwith a line break",
        "Which view?",
        "A: Axial",
        "B: Sagittal",
        "C: Coronal",
        "D: Oblique",
        "D",
        "test",
    ]
    [item] = open_benchmark("pmc-vqa", write_csv(pmc / "test_2.csv", SECOND, row)).items
    assert item.key == ("test_2", 0) and item.reference == "D" and item.choices[0] == "Axial"


def test_pmc_vqa_problems(pmc):
    with pytest.raises(DataError, match=r"--data must be a CSV file of PMC-VQA, such as test_clean\.csv"):
        open_benchmark("pmc-vqa", pmc)
    with pytest.raises(
        DataError, match="no column Answer, Choice A, Choice B, Choice C, Choice D, Figure_path"
    ):
        open_benchmark("pmc-vqa", write_csv(pmc / "a.csv", ["Question"], ["Why?"]))
    short = write_csv(pmc / "b.csv", FIRST, ["PMC1_F1.jpg", "Why?"], ["PMC2.jpg", "Why?", "a", *"abcd", "A"])
    with pytest.raises(DataError) as caught:
        open_benchmark("pmc-vqa", short)
    assert "b.csv, line 2: expected a non-empty string for 'Choice A'" in str(caught.value)
    assert "b.csv, line 3: the image PMC2.jpg is not in" in str(caught.value)
    (pmc / "c.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        open_benchmark("pmc-vqa", pmc / "c.csv")


def rad_row(number: int, answer, kind: str, phrase: str = "test_freeform") -> dict:
    return {
        "qid": str(number),
        "phrase_type": phrase,
        "qid_linked_id": "03f4",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552-46ad",
        "image_name": "synpic1.jpg",
        "image_organ": "CHEST",
        "evaluation": "evaluated",
        "question": f"Is it {number}?",
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": answer,
        "answer_type": kind,
    }


def write_rad(folder, rows):
    (folder / "VQA_RAD Image Folder").mkdir()
    noise(30, 30).save(folder / "VQA_RAD Image Folder/synpic1.jpg")
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    return folder


def test_vqa_rad_original_release(tmp_path):
    rows = [
        rad_row(0, "Yes", "CLOSED"),
        rad_row(1, "Cardiomegaly", "OPEN"),
        rad_row(2, "PA", "CLOSED ", "test_para"),
        rad_row(3, 2, "OPEN"),
        rad_row(4, "no", "CLOSED", "freeform"),
    ]
    benchmark = open_benchmark("vqa-rad", write_rad(tmp_path, rows))
    assert [(item.key, item.reference, item.choices) for item in benchmark.items] == [
        (("closed", 0), "A", ("yes", "no")),
        (("closed", 1), "PA", ()),
        (("open", 0), "Cardiomegaly", ()),
        (("open", 1), "2", ()),
    ]
    assert benchmark.items[0].text == "<image>\nIs it 0?"
    assert "yes or no" in system_prompts(benchmark)["open"]


def test_vqa_rad_problems(tmp_path):
    with pytest.raises(DataError, match=r"no VQA_RAD Dataset Public\.json or test-\*\.parquet"):
        open_benchmark("vqa-rad", tmp_path)
    rows = [rad_row(0, "yes", "CLOSED"), rad_row(1, "yes", "BOTH"), rad_row(2, "", "OPEN")]
    rows[0]["image_name"] = "none.jpg"
    with pytest.raises(DataError) as caught:
        open_benchmark("vqa-rad", write_rad(tmp_path, rows))
    for text in ("the image none.jpg", "'answer_type' must be OPEN or CLOSED, found 'BOTH'", "for 'answer'"):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["vqa-rad", "pathvqa"])
def test_parquet_of_the_hub(tmp_path, name):
    rows = [
        {"image": image(1), "question": "where is the lesion?", "answer": "left lobe"},
        {"image": image(2), "question": "is there a lesion?", "answer": "Yes"},
        {"image": image(1), "question": "is it cystic?", "answer": "no"},
    ]
    write_parquet(tmp_path / "data/train-0.parquet", rows)
    write_parquet(tmp_path / "data/test-00000-of-00001-e5bc3d208bb4deeb.parquet", rows)
    benchmark = open_benchmark(name, tmp_path)
    assert [(item.key, item.reference, item.choices) for item in benchmark.items] == [
        (("closed", 0), "A", ("yes", "no")),
        (("closed", 1), "B", ("yes", "no")),
        (("open", 0), "left lobe", ()),
    ]
    assert benchmark.items[0].figures[0].decode().size == (40, 30)


def test_parquet_problems(tmp_path):
    rows = [
        {"image": None, "question": "why?", "answer": "b"},
        {"image": image(), "question": "a", "answer": None},
    ]
    write_parquet(tmp_path / "test-0.parquet", rows)
    with pytest.raises(DataError) as caught:
        open_benchmark("pathvqa", tmp_path)
    assert "row 1: expected an embedded image for 'image'" in str(caught.value)
    assert "row 2: expected a non-empty string for 'answer'" in str(caught.value)
    (tmp_path / "test-0.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a parquet file"):
        open_benchmark("pathvqa", tmp_path)


def slake_row(number: int, answer: str, kind: str, language: str = "en") -> dict:
    return {
        "img_id": 102,
        "img_name": "xmlab102/source.jpg",
        "question": f"Which organ {number}?",
        "answer": answer,
        "q_lang": language,
        "location": "Lung",
        "modality": "CT",
        "answer_type": kind,
        "base_type": "vqa",
        "triple": ["vhead", "_", "_"],
        "qid": number,
        "content_type": "Organ",
    }


def test_slake(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
    caplog.set_level(logging.INFO)
    (tmp_path / "imgs/xmlab102").mkdir(parents=True)
    noise(30, 30).save(tmp_path / "imgs/xmlab102/source.jpg")
    rows = [
        slake_row(0, "Lung, Liver", "OPEN"),
        slake_row(1, "No", "CLOSED"),
        slake_row(2, "Lung", "CLOSED"),
        slake_row(3, "肺", "OPEN", "zh"),
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    items = open_benchmark("slake", tmp_path).items
    assert [(item.key, item.reference) for item in items] == [
        (("closed", 0), "B"),
        (("closed", 1), "Lung"),
        (("open", 0), "Lung, Liver"),
    ]
    assert "1 question not in English excluded" in caplog.text
    (tmp_path / "test.json").unlink()
    with pytest.raises(DataError, match=r"no test\.json"):
        open_benchmark("slake", tmp_path)


@pytest.fixture
def scored(tmp_path):
    """A closed and an open task with references, answers and scores."""
    references = ["yes", "no", "no", "yes", "left", "The left lobe.", "two lesions", "ct", "pleural effusion"]
    replies = [
        "Yes, there is.",
        "No",
        "yes",
        "maybe",
        "Left.",
        "left lobe of the liver",
        "2 lesions",
        "MRI",
        "effusion",
    ]
    rows = [rad_row(n, text, "CLOSED" if n < 5 else "OPEN") for n, text in enumerate(references)]
    benchmark = open_benchmark("vqa-rad", write_rad(tmp_path, rows))
    answers = {item.key: reply for item, reply in zip(benchmark.items, replies, strict=True)}
    return references, replies, score(benchmark, answers, SUITE)


def test_closed_accuracy_matches_scikit_learn(scored):
    references, _, scores = scored
    read = ["yes", "no", "yes", "none", "left"]
    closed = scores.tasks["closed"]
    assert closed["accuracy"] == pytest.approx(100 * accuracy_score(references[:5], read))
    # The macro averages are over the yes-or-no questions.
    assert closed["f1"] == pytest.approx(
        100 * f1_score(references[:4], read[:4], labels=["yes", "no"], average="macro")
    )
    assert closed["unreadable"] == 1 and closed["items"] == 5


def test_open_recall_matches_scikit_learn(scored):
    references, replies, scores = scored
    words = [[set(normalize_words(text).split()) for text in texts[5:]] for texts in (references, replies)]
    binarizer = MultiLabelBinarizer().fit(words[0] + words[1])
    expected, predicted = map(binarizer.transform, words)
    task = scores.tasks["open"]
    assert task["recall"] == pytest.approx(100 * recall_score(expected, predicted, average="samples"))
    assert task["f1"] == pytest.approx(100 * f1_score(expected, predicted, average="samples"))
    exact = [
        normalize_words(a) == normalize_words(b) for a, b in zip(references[5:], replies[5:], strict=True)
    ]
    assert task["em"] == pytest.approx(100 * accuracy_score([True] * 4, exact)) and sum(exact) == 1


def test_choice_accuracy_matches_scikit_learn(frames):
    benchmark = open_benchmark("medframeqa", frames)
    read = ["A", "B", "A", "C"]
    answers = {
        item.key: f"The answer is {letter}." for item, letter in zip(benchmark.items, read, strict=True)
    }
    expected = [item.reference for item in benchmark.items]
    pooled = score(benchmark, answers, SUITE).tasks["all"]
    assert pooled["accuracy"] == pytest.approx(100 * accuracy_score(expected, read))
    assert pooled["f1"] == pytest.approx(100 * f1_score(expected, read, average="macro"))


def test_images_are_not_needed_to_score_answers(tmp_path):
    folder = write_rad(tmp_path, [rad_row(0, "yes", "CLOSED")])
    (folder / "VQA_RAD Image Folder/synpic1.jpg").unlink()
    assert len(open_benchmark("vqa-rad", folder, images=False).items) == 1
