"""Tests of the synthetic questions: correct answers, balance and format."""

import re
from collections import Counter

import numpy as np
import pytest

from internvl_chat.data.synthetic.figures import (
    KINDS,
    MIN_FIGURES,
    RADIOLOGY,
    VARIANTS,
    Figure,
    Panel,
    plan_figures,
)
from internvl_chat.data.synthetic.questions import FAMILIES, FIXED_OPTIONS, image_records
from internvl_chat.data.synthetic.text_questions import FACTS, text_records

IMAGE_CATEGORIES = tuple(FAMILIES)
OPTION = re.compile(r"^(?:.*are: )?([A-D])\. (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    planned = plan_figures(60, 1, np.random.default_rng(3))
    return {figure.name: figure for figure in planned}


def ask(figures: dict[str, Figure], category: str, count: int = 60) -> list[dict]:
    return image_records(category, list(figures.values()), count, "train", np.random.default_rng(4))


def prompt(record: dict) -> str:
    return record["conversations"][0]["value"]


def answer(record: dict) -> str:
    return record["conversations"][1]["value"]


def shown_panels(record: dict, figures: dict[str, Figure]) -> list[Panel]:
    """Return the panels of a record, identified by the numbers in their file names."""
    figure, *crops = record["image"]
    return [figures[figure].panels[int(re.search(r"_(\d)\.\w+$", crop)[1])] for crop in crops]


@pytest.mark.parametrize(
    ("category", "counts"),
    [
        ("bbox", {3}),
        ("single_subimage", {2}),
        ("multiple_subimage", {3, 4, 5}),
        ("subimage_option", {2}),
        ("compound_image", {1}),
    ],
)
def test_number_of_images_per_category(figures: dict[str, Figure], category: str, counts: set[int]) -> None:
    assert {len(record["image"]) for record in ask(figures, category)} == counts


@pytest.mark.parametrize("category", IMAGE_CATEGORIES)
@pytest.mark.parametrize("count", [1, 2, 3, 20, 60])
def test_most_questions_are_closed_and_list_their_choices(category: str, count: int) -> None:
    planned = plan_figures(max(count, MIN_FIGURES), 1, np.random.default_rng(count))
    records = image_records(category, planned, count, "train", np.random.default_rng(count))
    closed = [record for record in records if "choices" in record]
    assert len(closed) >= 0.6 * count
    for record in closed:
        assert answer(record) in record["choices"]
        assert len(set(record["choices"])) == len(record["choices"]) > 1


def test_held_out_text_questions_ask_for_trained_facts() -> None:
    order = list(range(len(FACTS)))
    trained, held_out = text_records(80, "train", order), text_records(20, "held_out", order)
    assert not {prompt(r) for r in trained} & {prompt(r) for r in held_out}
    assert {answer(r) for r in held_out} <= {answer(r) for r in trained}
    assert all("choices" not in r and answer(r).count(".") == 1 for r in trained + held_out)
    wordings = [wording for _, *questions in FACTS for wording in questions]
    assert len(set(wordings)) == len(wordings) == 4 * len(FACTS)


def test_text_questions_do_not_repeat() -> None:
    order = list(range(len(FACTS)))
    for split, available in (("train", 3 * len(FACTS)), ("held_out", len(FACTS))):
        records = text_records(1000, split, order)
        assert len({prompt(record) for record in records}) == len(records) == available


def offset(record: dict, figures: dict[str, Figure]) -> tuple[set[str], set[str]]:
    """Return where Fig-1 is relative to Fig-2, for each axis along which they do not overlap."""
    a, b = (np.array(panel.box) for panel in shown_panels(record, figures))
    sides = set()
    if a[2] <= b[0] or b[2] <= a[0]:
        sides.add("left" if a[0] + a[2] < b[0] + b[2] else "right")
    if a[3] <= b[1] or b[3] <= a[1]:
        sides.add("above" if a[1] + a[3] < b[1] + b[3] else "below")
    return sides


def test_positions(figures: dict[str, Figure]) -> None:
    checked = Counter()
    for record in ask(figures, "bbox"):
        sides, text = offset(record, figures), prompt(record)
        if record.get("choices") == ["yes", "no"]:
            asked = "left" if "left of" in text else "above"
            assert sides & ({"left", "right"} if asked == "left" else {"above", "below"})
            assert answer(record) == ("yes" if asked in sides else "no")
            checked[asked] += 1
        elif "choices" in record:
            assert {answer(record)} == sides
            checked["direction"] += 1
        else:
            first, second = (panel.kind for panel in shown_panels(record, figures))
            assert set(re.findall(r"\b(?:left|right|above|below)\b", answer(record))) == sides
            assert answer(record).startswith(f"Fig-1 ({first}) is ") and f"Fig-2 ({second})" in answer(record)
            checked["open"] += 1
    assert min(checked[name] for name in ("left", "above", "direction", "open")) >= 10


def test_single_panel_answers(figures: dict[str, Figure]) -> None:
    lesions = Counter()
    for record in ask(figures, "single_subimage"):
        (panel,) = shown_panels(record, figures)
        if record.get("choices") == list(KINDS):
            assert answer(record) == panel.kind
        elif "choices" in record:
            lesion = panel.finding is not None and panel.finding.name == "lesion"
            assert panel.kind in RADIOLOGY and answer(record) == ("yes" if lesion else "no")
            lesions[answer(record)] += 1
        else:
            assert VARIANTS[panel.kind][panel.variant].lower() in answer(record).lower()
            assert ("half" in answer(record)) == (panel.finding is not None)
    assert min(lesions["yes"], lesions["no"]) >= 3


def test_comparisons(figures: dict[str, Figure]) -> None:
    checked = Counter()
    for record in ask(figures, "multiple_subimage"):
        kinds = [panel.kind for panel in shown_panels(record, figures)]
        if record.get("choices") == ["yes", "no"]:
            assert answer(record) == ("yes" if len(set(kinds)) == 1 else "no")
            checked["same"] += 1
        elif "How many" in prompt(record):
            assert answer(record) == str(len(set(kinds)))
            assert record["choices"] == ["1", "2", "3", "4"][: len(kinds)]
            checked["how many"] += 1
        elif "choices" in record:
            wanted = re.search(r"shows (?:an? )?(\S+)\?", prompt(record))[1]
            assert [f"Fig-{n}" for n, kind in enumerate(kinds, 1) if kind == wanted] == [answer(record)]
            checked["which"] += 1
        else:
            for number, panel in enumerate(shown_panels(record, figures), 1):
                assert f"Fig-{number} shows {panel.description}" in answer(record)
            assert ("the same modality" in answer(record)) == (len(set(kinds)) == 1)
            checked["open"] += 1
    assert min(checked[name] for name in ("same", "how many", "which", "open")) >= 10


def test_options_contain_the_answer_once(figures: dict[str, Figure]) -> None:
    fixed = 0
    for record in ask(figures, "subimage_option"):
        (panel,) = shown_panels(record, figures)
        options = dict(OPTION.findall(prompt(record)))
        assert list(options) == record["choices"] == ["A", "B", "C", "D"]
        assert len(set(options.values())) == 4
        right = VARIANTS[panel.kind][panel.variant] if "description" in prompt(record) else panel.kind
        assert options[answer(record)] == right
        fixed += tuple(options.values()) == FIXED_OPTIONS
    assert 25 <= fixed <= 35


def test_compound_figure_answers(figures: dict[str, Figure]) -> None:
    for record in ask(figures, "compound_image"):
        panels = figures[record["image"][0]].panels
        if record.get("choices") == ["2", "3", "4", "5", "6"]:
            assert answer(record) == str(len(panels))
        elif record.get("choices") == list(KINDS):
            assert answer(record) == panels[0].kind
        elif "choices" in record:
            assert answer(record) == ("yes" if len({panel.kind for panel in panels}) == 1 else "no")
        else:
            assert re.findall(r"\(([A-F])\)", answer(record)) == list("ABCDEF"[: len(panels)])
            assert answer(record).startswith(f"Fig-0 has {len(panels)} panels")
            assert all(panel.description in answer(record) for panel in panels)


@pytest.mark.parametrize("category", IMAGE_CATEGORIES)
def test_closed_answers_are_balanced(figures: dict[str, Figure], category: str) -> None:
    by_choices: dict[tuple[str, ...], Counter] = {}
    for record in ask(figures, category):
        if "choices" in record:
            by_choices.setdefault(tuple(record["choices"]), Counter())[answer(record)] += 1
    for choices, tally in by_choices.items():
        if tally.total() >= 5 * len(choices):
            assert max(tally.values()) - min(tally[choice] for choice in choices) <= 3, tally


@pytest.mark.parametrize("category", IMAGE_CATEGORIES)
def test_questions_are_unique(figures: dict[str, Figure], category: str) -> None:
    asked = [(prompt(record), *record["image"]) for record in ask(figures, category)]
    assert len(set(asked)) == len(asked)


def test_too_few_figures(figures: dict[str, Figure]) -> None:
    with pytest.raises(ValueError, match="too few for another _panel_count question"):
        image_records("compound_image", list(figures.values())[:1], 60, "train", np.random.default_rng(0))
