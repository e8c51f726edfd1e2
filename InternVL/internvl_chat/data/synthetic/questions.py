"""Questions about synthetic compound figures, with balanced answers derived from the figure descriptions."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations

from numpy.random import Generator

from internvl_chat.data.synthetic.figures import (
    KINDS,
    PANEL_COUNTS,
    RADIOLOGY,
    VARIANTS,
    Figure,
    Panel,
    horizontal_relation,
    pick,
    vertical_relation,
)

YES_NO = ("yes", "no")
LETTERS = ("A", "B", "C", "D")
DIRECTIONS = ("left", "right", "above", "below")
FIXED_OPTIONS = ("ultrasound", "X-ray", "histology", "chart")

_LOOK_AHEAD = 4
_IN_A_SENTENCE = {kind: kind for kind in KINDS} | {"X-ray": "an X-ray", "chart": "a chart"}
_ONE_OF_KINDS = f"Answer with one of: {', '.join(KINDS)}."
_ONE_OF_DIRECTIONS = f"Answer with one of: {', '.join(DIRECTIONS)}."


@dataclass(frozen=True)
class Question:
    """A question about a figure (Fig-0) and some of its panels (Fig-1, Fig-2, ...).

    Attributes:
        panels: indices of these panels in the figure.
        choices: all admissible answers; empty for an open question.
    """

    text: str
    panels: tuple[int, ...]
    answer: str
    choices: tuple[str, ...] = ()


# Returns all questions of one type about a figure; the generator chooses wordings and distractors.
Family = Callable[[Figure, Generator], list[Question]]


def image_records(
    category: str, figures: Sequence[Figure], count: int, split: str, rng: Generator
) -> list[dict[str, object]]:
    """Return records of an image category, with closed and open questions.

    Args:
        category: key of `FAMILIES`.
        figures: figures to ask about; `max(count, MIN_FIGURES)` figures always suffice.
        count: number of records.
        split: name of the split, used in the record ids.
        rng: random generator.

    Raises:
        ValueError: there are too few figures for another question of some family.
    """
    families = FAMILIES[category]
    starts = {family: len(figures) * i // len(families) for i, family in enumerate(families)}
    askers = {family: _Asker(family, [*figures[i:], *figures[:i]]) for family, i in starts.items()}
    records = []
    for number in range(count):
        figure, question = askers[families[number % len(families)]].ask(rng)
        records.append(_record(f"{category}-{split}-{number}", figure, question))
    return records


@dataclass
class _Asker:
    """Asks questions of one family with balanced answers.

    Attributes:
        queue: figures, least recently used first.
        tally: number of times that each answer was given.
        asked: (figure name, panels) of each question asked.
    """

    family: Family
    queue: list[Figure]
    tally: Counter[str] = field(default_factory=Counter)
    asked: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)

    def ask(self, rng: Generator) -> tuple[Figure, Question]:
        """Return a question about one of the next figures whose answer has been given least often so far."""
        candidates = self._candidates(rng)
        if not candidates:
            name = self.family.__name__
            raise ValueError(f"{len(self.queue)} figures are too few for another {name} question")
        least = min(self.tally[question.answer] for _, question in candidates)
        rare = [pair for pair in candidates if self.tally[pair[1].answer] == least]
        answer = pick(sorted({question.answer for _, question in rare}), rng)
        figure, question = pick([pair for pair in rare if pair[1].answer == answer], rng)
        self.tally[answer] += 1
        self.asked.add((figure.name, question.panels))
        self.queue.remove(figure)
        self.queue.append(figure)
        return figure, question

    def _candidates(self, rng: Generator) -> list[tuple[Figure, Question]]:
        candidates: list[tuple[Figure, Question]] = []
        figures_seen = 0
        for figure in self.queue:
            questions = [q for q in self.family(figure, rng) if (figure.name, q.panels) not in self.asked]
            candidates += [(figure, question) for question in questions]
            figures_seen += bool(questions)
            if figures_seen == _LOOK_AHEAD:
                break
        return candidates


def _record(name: str, figure: Figure, question: Question) -> dict[str, object]:
    images = [figure.name, *(figure.panel_name(index) for index in question.panels)]
    header = "".join(f"Fig-{number}: <image>\n" for number in range(len(images)))
    messages = [
        {"from": "human", "value": header + question.text},
        {"from": "gpt", "value": question.answer},
    ]
    record: dict[str, object] = {"id": name, "image": images, "conversations": messages}
    return record | {"choices": list(question.choices)} if question.choices else record


def _yes_no(true: bool) -> str:
    return YES_NO[0] if true else YES_NO[1]


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _figs(count: int) -> list[str]:
    return [f"Fig-{number}" for number in range(1, count + 1)]


def _is_left(figure: Figure, rng: Generator) -> list[Question]:
    return _yes_no_position(figure, "left", "to the left of", horizontal_relation, rng)


def _is_above(figure: Figure, rng: Generator) -> list[Question]:
    return _yes_no_position(figure, "above", "above", vertical_relation, rng)


def _yes_no_position(
    figure: Figure, side: str, phrase: str, relation: Callable[[Panel, Panel], str | None], rng: Generator
) -> list[Question]:
    """For each pair of panels without overlap along an axis, ask whether the first is on the given side."""
    text = pick((f"Is Fig-1 {phrase} Fig-2", f"Does Fig-1 lie {phrase} Fig-2"), rng)
    return [
        Question(f"{text} in the compound image? Answer yes or no.", pair, _yes_no(actual == side), YES_NO)
        for pair in permutations(range(len(figure.panels)), 2)
        if (actual := relation(figure.panels[pair[0]], figure.panels[pair[1]]))
    ]


def _relations(figure: Figure, pair: tuple[int, ...]) -> list[str]:
    first, second = (figure.panels[index] for index in pair)
    return [side for side in (horizontal_relation(first, second), vertical_relation(first, second)) if side]


def _direction(figure: Figure, rng: Generator) -> list[Question]:
    text = f"Where in the compound image is Fig-1 relative to Fig-2? {_ONE_OF_DIRECTIONS}"
    return [
        Question(text, pair, sides[0], DIRECTIONS)
        for pair in permutations(range(len(figure.panels)), 2)
        if len(sides := _relations(figure, pair)) == 1
    ]


def _spatial_relationship(figure: Figure, rng: Generator) -> list[Question]:
    phrases = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    questions = []
    for pair in permutations(range(len(figure.panels)), 2):
        first, second = (figure.panels[index].kind for index in pair)
        sides = _relations(figure, pair)
        where = f"to the {sides[0]} and {sides[1]}" if len(sides) == 2 else phrases[sides[0]]
        text = (
            f"What is the spatial relationship between Fig-1 ({first}) and Fig-2 ({second}) "
            "in the compound image based on their bounding box locations?"
        )
        answer = f"Fig-1 ({first}) is positioned {where} Fig-2 ({second}) in the compound image."
        questions.append(Question(text, pair, answer))
    return questions


def _modality(figure: Figure, rng: Generator) -> list[Question]:
    text = pick(("Which imaging modality is Fig-1?", "What type of image is shown in Fig-1?"), rng)
    return [
        Question(f"{text} {_ONE_OF_KINDS}", (index,), panel.kind, KINDS)
        for index, panel in enumerate(figure.panels)
    ]


def _has_lesion(figure: Figure, rng: Generator) -> list[Question]:
    text = "Does Fig-1 contain a round lesion or cyst? Answer yes or no."
    return [
        Question(text, (index,), _yes_no(panel.has_lesion), YES_NO)
        for index, panel in enumerate(figure.panels)
        if panel.kind in RADIOLOGY
    ]


def _what_is_shown(figure: Figure, rng: Generator) -> list[Question]:
    text = pick(("What does Fig-1 show?", "Describe Fig-1 in one sentence.", "What is seen in Fig-1?"), rng)
    return [
        Question(text, (index,), _sentence(panel.description)) for index, panel in enumerate(figure.panels)
    ]


def _groups(figure: Figure, rng: Generator) -> list[tuple[int, ...]]:
    """Return all combinations of 2 to 4 panels, each in random order."""
    indices = range(len(figure.panels))
    groups = [group for size in (2, 3, 4) for group in combinations(indices, size)]
    return [tuple(rng.permutation(group).tolist()) for group in groups]


def _kinds(figure: Figure, group: tuple[int, ...]) -> list[str]:
    return [figure.panels[index].kind for index in group]


def _same_modality(figure: Figure, rng: Generator) -> list[Question]:
    return [
        Question(
            f"Do {_join(_figs(len(group)))} show the same imaging modality? Answer yes or no.",
            group,
            _yes_no(len(set(_kinds(figure, group))) == 1),
            YES_NO,
        )
        for group in _groups(figure, rng)
    ]


def _how_many_modalities(figure: Figure, rng: Generator) -> list[Question]:
    questions = []
    for group in _groups(figure, rng):
        choices = tuple(str(number) for number in range(1, len(group) + 1))
        text = f"How many different imaging modalities do {_join(_figs(len(group)))} show?"
        answer = str(len(set(_kinds(figure, group))))
        questions.append(Question(f"{text} Answer with a number.", group, answer, choices))
    return questions


def _which_one(figure: Figure, rng: Generator) -> list[Question]:
    questions = []
    for group in _groups(figure, rng):
        kinds, names = _kinds(figure, group), tuple(_figs(len(group)))
        if len(set(kinds)) < len(kinds):
            continue
        for kind, name in zip(kinds, names, strict=True):
            text = f"Which of {_join(names)} shows {_IN_A_SENTENCE[kind]}? Answer with its name."
            questions.append(Question(text, group, name, names))
    return questions


def _comparison(figure: Figure, rng: Generator) -> list[Question]:
    questions = []
    for group in _groups(figure, rng):
        names, kinds = _figs(len(group)), _kinds(figure, group)
        text = pick((f"Compare {_join(names)}.", f"How do {_join(names)} differ?"), rng)
        parts = [
            f"{name} shows {figure.panels[index].description}"
            for name, index in zip(names, group, strict=True)
        ]
        verdict = "the same modality" if len(set(kinds)) == 1 else "different modalities"
        if 1 < len(set(kinds)) < len(kinds):
            verdict = f"{len(set(kinds))} different modalities"
        questions.append(Question(text, group, f"{'; '.join(parts)}. They show {verdict}."))
    return questions


def _option_text(question: str, options: Sequence[str]) -> str:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    return f"The question is Based on Fig-1, {question} The candidate options are: {listed}"


def _fixed_options(figure: Figure, rng: Generator) -> list[Question]:
    text = _option_text("which imaging modality is shown?", FIXED_OPTIONS)
    return [
        Question(text, (index,), LETTERS[FIXED_OPTIONS.index(panel.kind)], LETTERS)
        for index, panel in enumerate(figure.panels)
        if panel.kind in FIXED_OPTIONS
    ]


def _shuffled_options(
    question: str, answers: Sequence[str], pool: Sequence[str], rng: Generator
) -> list[Question]:
    """Ask the question about each panel four times, with the correct option at each letter once."""
    questions = []
    for index, answer in enumerate(answers):
        wrong = [option for option in rng.permutation(list(pool)).tolist() if option != answer]
        for position, letter in enumerate(LETTERS):
            options = [*wrong[:position], answer, *wrong[position:]][: len(LETTERS)]
            questions.append(Question(_option_text(question, options), (index,), letter, LETTERS))
    return questions


def _modality_options(figure: Figure, rng: Generator) -> list[Question]:
    kinds = [panel.kind for panel in figure.panels]
    return _shuffled_options("which imaging modality is shown?", kinds, KINDS, rng)


def _description_options(figure: Figure, rng: Generator) -> list[Question]:
    descriptions = [VARIANTS[panel.kind][panel.variant] for panel in figure.panels]
    pool = [phrase for variants in VARIANTS.values() for phrase in variants.values()]
    return _shuffled_options("which description fits the image?", descriptions, pool, rng)


def _panel_count(figure: Figure, rng: Generator) -> list[Question]:
    text = pick(("How many panels does Fig-0 have?", "How many sub-images does Fig-0 contain?"), rng)
    choices = tuple(str(count) for count in PANEL_COUNTS)
    return [Question(f"{text} Answer with a number.", (), str(len(figure.panels)), choices)]


def _first_modality(figure: Figure, rng: Generator) -> list[Question]:
    text = f"Which imaging modality is panel A of Fig-0? {_ONE_OF_KINDS}"
    return [Question(text, (), figure.panels[0].kind, KINDS)]


def _all_same(figure: Figure, rng: Generator) -> list[Question]:
    text = "Do all panels of Fig-0 show the same imaging modality? Answer yes or no."
    return [Question(text, (), _yes_no(len({panel.kind for panel in figure.panels}) == 1), YES_NO)]


def _describe_all(figure: Figure, rng: Generator) -> list[Question]:
    text = pick(("Describe the panels of Fig-0 in order.", "What do the panels of Fig-0 show?"), rng)
    parts = [f"({panel.label}) {panel.description}" for panel in figure.panels]
    return [Question(text, (), f"Fig-0 has {len(figure.panels)} panels: {'; '.join(parts)}.")]


# Category -> families, used in turn; at least two thirds of the records are closed questions.
FAMILIES: dict[str, tuple[Family, ...]] = {
    "bbox": (_is_left, _direction, _spatial_relationship, _is_above),
    "single_subimage": (_modality, _has_lesion, _what_is_shown, _modality, _modality, _what_is_shown),
    "multiple_subimage": (
        _same_modality,
        _which_one,
        _comparison,
        _same_modality,
        _how_many_modalities,
        _comparison,
    ),
    "subimage_option": (_fixed_options, _modality_options, _fixed_options, _description_options),
    "compound_image": (_panel_count, _first_modality, _describe_all, _panel_count, _all_same, _describe_all),
}
