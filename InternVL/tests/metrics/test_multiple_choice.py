"""Parsing of multiple-choice answers, and macro averages."""

from collections import Counter

import pytest

from internvl_chat.metrics.multiple_choice import macro_averages, parse_choice, split_choices

CHOICES = (
    "Altered cellular behavior typical of lobular carcinoma in situ",
    "Blood vessels",
    "Blood vessels and rosette-like structures",
    "C. elegans neurons",
)

ANSWERS = [
    # A letter alone.
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("[c]", "C"),
    ("**D**", "D"),
    ("  C \n", "C"),
    ("A:", "A"),
    ('"A"', "A"),
    ("$B$", "B"),
    ("Ｂ", "B"),
    # A letter and its option.
    ("B. Blood vessels", "B"),
    ("(b) Blood vessels", "B"),
    ("C) Blood vessels and rosette-like structures", "C"),
    ("C: blood vessels and rosette-like structures.", "C"),
    ("B Blood vessels", "B"),
    ("**C.** Blood vessels and rosette-like structures", "C"),
    ("- D. C. elegans neurons", "D"),
    ("B\n\nThe arrow points at a vessel.", "B"),
    ("B.\nOption A is wrong because there is no carcinoma.", "B"),
    # The option's text.
    ("Blood vessels", "B"),
    ("blood vessels and rosette-like structures.", "C"),
    ("C. elegans neurons", "D"),
    ("The staining shows blood vessels and rosette-like structures here.", "C"),
    ("It is seen in the blood vessels.", "B"),
    ("altered cellular behavior, typical of lobular carcinoma in situ", "A"),
    # A declaration.
    ("The answer is B", "B"),
    ("The answer is B.", "B"),
    ("The correct answer is (c).", "C"),
    ("The correct option is D, as the arrow shows.", "D"),
    ("Answer: A", "A"),
    ("answer: b", "B"),
    ("**Answer:** C", "C"),
    ("Answer: **C. Blood vessels and rosette-like structures**", "C"),
    ("Final answer: option B", "B"),
    ("The answer is option C.", "C"),
    ("The best choice would be D", "D"),
    ("So the answer is \\boxed{D}.", "D"),
    ("$\\boxed{\\text{B}}$", "B"),
    ("<answer>B</answer>", "B"),
    ("<think>It could be A.</think><answer> C </answer>", "C"),
    ("First I thought that the answer is A. But the answer is B.", "B"),
    ("A. no carcinoma is seen.\nB. vessels are seen.\nThe answer is B.", "B"),
    ("The answer is A because the cells are altered.", "A"),
    ("The answer is: Blood vessels and rosette-like structures", "C"),
    # A choice in a sentence.
    ("Option B", "B"),
    ("I choose C.", "C"),
    ("I would go with option D because of the neurons.", "D"),
    ("B is correct.", "B"),
    ("I think it is B", "B"),
    ("Option A is incorrect, so I pick option B.", "B"),
    ("Based on Fig-3, option C is the most likely.", "C"),
    # More than one letter, or none.
    ("B or C", None),
    ("A and C", None),
    ("A, C", None),
    ("The answer is B or C.", None),
    ("B. and C.", None),
    ("A. yes\nB. yes", None),
    ("AB", None),
    ("E", None),
    ("The answer is F", None),
    ("", None),
    ("...", None),
    ("I cannot tell.", None),
    ("The answer is a benign lesion.", None),
    ("A benign lesion is shown.", None),
    ("A lesion like hepatitis B or vitamin D deficiency", None),
    ("图中未显示", None),
    ("This figure shows nothing of the kind 12345 !?", None),
]


LUNGS = ("Left lung", "Right lung", "Both lungs", "None of the above")

# Answers that are easily misinterpreted.
PITFALLS = [
    ("<think>The answer is A?</think> B", "B"),
    ("<think>At first the answer is A</think>\n\nB", "B"),
    ("At first the answer is A</think>\n\nThe right lung.", "B"),
    ("The answer is A. Wait, no: B.", "B"),
    ("The answer is A. Actually, the answer is C.", "C"),
    ("I don't think A is correct; B", "B"),
    ("It is not true that A is correct", None),
    ("Neither A nor B is correct", None),
    ("The incorrect answer is A", None),
    ("A is the most unlikely", None),
    ("Option A is wrong", None),
    ("Hepatitis B is likely", None),
    ("Vitamin A, B and C", None),
    ("Grade A is best seen on CT. The right lung.", "B"),
    ("Panel B is the most informative one; therefore the left lung is affected", "A"),
    ("Based on Fig-1, panel A is correct orientation, so the Right lung", "B"),
    ("Not the left lung", None),
    ("Not the left lung but the right lung", "B"),
    ("Answer B", "B"),
    ("Answer (C)", "C"),
    ("ANSWER C", "C"),
    ("Answer - C", "C"),
    ("Correct answer - C", "C"),
    ("The answer's C", "C"),
    ("The letter is B", "B"),
    ("The correct one is B.", "B"),
    ("Therefore, B.", "B"),
    ("C, because", "C"),
    ("C, because the left lung is clear", "C"),
    ("C - both", "C"),
    ("The answer is most likely (C)", "C"),
    ("The answer is likely C", "C"),
    ("The answer must be C", "C"),
    ("The correct choice is clearly C.", "C"),
    ("The answer is not A but B", "B"),
    ("The answer is B, not A.", "B"),
    ("The answer is B because it is not A", "B"),
    ("正确答案是B", "B"),
    ("答案：B", "B"),
    ("None of the above", "D"),
    ("It is none of the above.", "D"),
    ("The answer is D. None of the above", "D"),
]


@pytest.mark.parametrize(("answer", "letter"), PITFALLS, ids=[repr(answer) for answer, _ in PITFALLS])
def test_easily_misinterpreted_answers(answer, letter):
    assert parse_choice(answer, LUNGS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("D. A", "D"),
        ("(D) A", "D"),
        ("The answer is D. A", "D"),
        ("A", "A"),  # a single letter is the letter of an option
        ("Density category A is shown", "D"),
        ("C: B", "C"),
    ],
)
def test_option_text_that_is_the_letter_of_a_different_option(answer, letter):
    assert parse_choice(answer, ("D", "C", "B", "A")) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("It is a benign lesion", None),  # an article is not a blood group
        ("A benign lesion is shown", None),
        ("The patient has type O blood, a rare finding", "A"),
        ("The blood type shown is A.", "B"),
        ("blood group AB", "D"),
        ("a type b sample", "C"),
    ],
)
def test_single_letter_option_text_is_not_an_article_or_pronoun(answer, letter):
    assert parse_choice(answer, ("O", "A", "B", "AB")) == letter


def test_roman_numerals_are_not_pronouns():
    assert parse_choice("I think it is II", ("I", "II", "III")) == "B"
    assert parse_choice("Grade I", ("I", "II", "III")) == "A"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("Yes, there is no doubt", "A"), ("No, it is not.", "B"), ("yes", "A"), ("There is none", None)],
)
def test_yes_no_options(answer, letter):
    assert parse_choice(answer, ("Yes", "No")) == letter


MODALITIES = ("CT", "MRI", "Ultrasound", "X-ray")
YES_NO = ("Yes", "No")


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot see an image. No image was provided.",
        "I have no idea",
        "There is no image",
        "No information is given.",
        "No clinical information is available.",
        "Unable to determine. No image was provided.",
        "I cannot say yes or no",
        "I'm not sure, but there is no evidence either way",
        "As an AI, I have no access to images.",
        "There is no doubt about it.",
        "It is no longer visible",
        "There is no way to tell",
        "I don't know. No fracture line could be assessed.",
    ],
)
def test_refusals_do_not_select_no(answer):
    assert parse_choice(answer, YES_NO) is None


@pytest.mark.parametrize(
    "answer", ["There is no fracture", "I think no.", "No, I cannot see a fracture", "no"]
)
def test_answers_that_select_no(answer):
    assert parse_choice(answer, YES_NO) == "B"


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("The lesion is non-malignant.", "malignant"),
        ("Non malignant", "malignant"),
        ("Non‑Hodgkin lymphoma", "Hodgkin lymphoma"),
        ("non-small cell carcinoma", "small cell carcinoma"),
        ("ER-negative", "ER"),
        ("COVID-19 negative", "COVID-19"),
        ("pre-diabetes", "diabetes"),
        ("anti-CD20", "CD20"),
        ("An extra-articular lesion", "articular"),
        ("Absence of carcinoma", "carcinoma"),
        ("The biopsy was negative for carcinoma", "carcinoma"),
        ("HER2-", "HER2+"),
        ("It is HER2−", "HER2+"),
        ("<5 cm", ">5 cm"),
        ("-5", "5"),
        ("2.5 cm", "5 cm"),
        ("1.15", "1.1"),
        ("1,5", "15"),
        ("The T-score is -2.5", "2.5"),
    ],
)
def test_different_words_do_not_select_an_option(answer, choice):
    assert parse_choice(answer, (choice, "something else")) is None


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("A non small cell carcinoma is shown.", "Non-small cell carcinoma"),
        ("5 cm", ">5 cm"),
        ("It measures > 5 cm", ">5 cm"),
        ("2.5 cm, because of the scale", "2.5 cm"),
        ("The tumor is HER2-positive.", "HER2 positive"),
        ("E cadherin", "E-cadherin"),
        ("An ultrasound rather than a CT", "Ultrasound"),
    ],
)
def test_different_spellings_select_an_option(answer, choice):
    assert parse_choice(answer, ("CT", choice)) == "B"


@pytest.mark.parametrize(
    "choices",
    [
        ("5", "-5", "0"),
        ("Na+", "Na-", "K"),
        ("ER+/HER2-", "ER-/HER2+", "ER-/HER2-"),
        ("2.5", "25", "2 5"),
        ("<5", ">5", "≥5", "5"),
        ("5%", "5", "5 cm"),
        ("A+", "A-", "B+", "B-"),
        ("+", "-"),
    ],
)
def test_options_that_differ_in_signs(choices):
    assert [parse_choice(choice, choices) for choice in choices] == list("ABCD"[: len(choices)])
    assert parse_choice("The answer is B.", choices) == "B"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A. CT is incorrect. The image shows an MRI.", "B"),
        ("A. CT is not correct because of soft tissue; the modality is MRI", "B"),
        ("A) CT: incorrect.\nB) MRI: correct.", "B"),
        ("A. Incorrect.\nB. MRI is right.", "B"),
        ("B. MRI. The CT is not shown.", "B"),
        ("B. There is no radiation.", "B"),
        ("The answer is B. This is actually typical, unlike option A.", "B"),
        ("The answer is B. Actually, A was my first idea.", "B"),
        ("B\n\nNote: wait for the contrast phase in option C.", "B"),
        ("The correct answer is B (MRI). Correction for motion artifacts is needed with X-ray.", "B"),
        ("The answer is B. Wait, option A would show bone.", "B"),
        ("The answer is A. Actually, it is MRI.", "B"),
        ("The answer is A. Wait, no. The answer must be (b).", "B"),
        ("A. On second thought, I choose B because of the soft tissue.", "B"),
        ("A. Actually, option B is correct.", "B"),
        ("The answer is A, no wait, B.", "B"),
        ("<think>the answer is A", None),
        ("The answer is most likely to be B", "B"),
    ],
)
def test_rejected_options_and_corrections(answer, letter):
    assert parse_choice(answer, MODALITIES) == letter


def test_none_of_the_above_except():
    assert parse_choice("None of the above options fits except the right lung", LUNGS) is None
    assert parse_choice("None of the lungs is affected", ("Left lung", "None")) is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B. cereus is the cause", "D"), ("The answer is B. cereus", "D"), ("B. cereus", "D"), ("B.", "B")],
)
def test_option_text_that_starts_like_a_letter(answer, letter):
    assert parse_choice(answer, ("B. anthracis", "E. coli", "S. aureus", "B. cereus")) == letter


@pytest.mark.parametrize(("answer", "letter"), ANSWERS, ids=[repr(answer) for answer, _ in ANSWERS])
def test_parse_choice(answer, letter):
    assert parse_choice(answer, CHOICES) == letter


def test_answers_are_distinct_and_cover_all_letters():
    assert len({answer for answer, _ in ANSWERS}) == len(ANSWERS) >= 60
    assert min(Counter(letter for _, letter in ANSWERS).values()) >= 4


def test_letter_beyond_the_options():
    assert parse_choice("D", CHOICES[:3]) is None
    assert parse_choice("D", CHOICES) == "D"


def test_without_options():
    assert parse_choice("A", ()) is None


def test_long_repetitive_answers():
    for text in ("answer: " + "*" * 50_000, "(" * 50_000, "option " * 10_000, "A. " * 10_000, "\n" * 50_000):
        parse_choice(text, CHOICES)


def test_options_without_words():
    assert parse_choice("what", ("+", "-")) is None
    assert parse_choice("B", ("+", "-")) == "B"


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        (
            "Which? The candidate options are: A. One\nB.Two  \n  C) Three\nD:  Four",
            ("One", "Two", "Three", "Four"),
        ),
        (
            "Which?\nA. A. fumigatus\nB. B. subtilis\nC. C. elegans",
            ("A. fumigatus", "B. subtilis", "C. elegans"),
        ),
        ("Which? (A) One (B) Two", ("One", "Two")),
        ("Which? A. One B. Two C. Three", ("One", "Two", "Three")),
        ("Which?A. One\nB. Two of\ntwo lines", ("One", "Two of\ntwo lines")),
        ("What is shown in A. thaliana?", ()),
        ("What?", ()),
    ],
)
def test_split_choices(question, choices):
    assert split_choices(question) == choices


def test_macro_averages_by_hand():
    expected = ["A", "A", "B", "B", "C"]
    predicted = ["A", "B", "B", None, "D"]
    # precision: A 1, B 1/2, C 0, D 0; recall: A 1/2, B 1/2, C 0, D 0; F1: A 2/3, B 1/2.
    scores = macro_averages(expected, predicted)
    assert scores == pytest.approx(
        {"precision": 1.5 / 4, "recall": 1 / 4, "f1": (2 / 3 + 1 / 2) / 4}, abs=1e-12
    )


def test_macro_averages_match_scikit_learn_if_all_answers_are_readable():
    from sklearn.metrics import f1_score, precision_score, recall_score

    expected, predicted = list("ABCDABCDDC"), list("ABCDBBADCC")
    scores = macro_averages(expected, predicted)
    assert scores["f1"] == pytest.approx(f1_score(expected, predicted, average="macro"), abs=1e-12)
    assert scores["precision"] == pytest.approx(
        precision_score(expected, predicted, average="macro"), abs=1e-12
    )
    assert scores["recall"] == pytest.approx(recall_score(expected, predicted, average="macro"), abs=1e-12)


def test_only_unreadable_answers():
    assert macro_averages(["A", "B"], [None, None]) == {"f1": 0, "precision": 0, "recall": 0}
