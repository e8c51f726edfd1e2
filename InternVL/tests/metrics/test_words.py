"""BLEU, ROUGE, CIDEr and overlap against computations of their own, on texts of every shape."""

import math
import sys
from collections import Counter
from fractions import Fraction

import pytest

from internvl_chat.metrics.bleu import bleu
from internvl_chat.metrics.cider import cider
from internvl_chat.metrics.overlap import exact_match, word_overlap
from internvl_chat.metrics.rouge import rouge
from internvl_chat.metrics.text import words

# (answer, reference)
PAIRS = [
    ("The scan shows a mass in the left lobe.", "The scan shows a mass in the left lobe."),
    ("The scan shows a mass in the left lobe", "the CT scan shows a small mass in the right lobe."),
    ("a mass a mass a mass", "A mass is seen. The mass is large."),
    ("Fig-1 is to the left of Fig-2.", "Fig-2 is to the right of Fig-1 and below it."),
    ("One. Two words. Three more words.", "Three more words. One."),
    ("mass", "mass"),
    ("mass", "The mass."),
    ("no", "yes"),
    ("", "yes"),
    ("", ""),
    ("yes", ""),
    ("...", "yes."),
    (" \n ", "yes"),
    ("ein Tumor der Größe 3.5 µm – naïve T‑Zellen", "Ein Tumor der Größe 3.5 µm bei naïven T‑Zellen."),
    ("左肺に 腫瘤が 見える。", "右肺に 腫瘤が 見える。"),
    ("The arrow\npoints\tto  the   aorta", "The arrow points to the aorta."),
]
IDS = [f"{answer[:20]!r}" for answer, _ in PAIRS]


def test_how_texts_are_cut():
    assert words("The MRI shows 3.5 mm...") == ["the", "mri", "shows", "3", ".5", "mm", ".", ".", "."]
    assert words(" \n") == []


def bleu_by_hand(answer: str, reference: str, order: int) -> float:
    """Papineni et al. (2002), equation 1 to 3, where every order has a match; else what nltk makes of it."""
    said, expected = words(answer), words(reference)
    logs = []
    for n in range(1, order + 1):
        found = Counter(tuple(said[i : i + n]) for i in range(len(said) - n + 1))
        allowed = Counter(tuple(expected[i : i + n]) for i in range(len(expected) - n + 1))
        clipped = sum(min(count, allowed[ngram]) for ngram, count in found.items())
        if n == 1 and not clipped:
            return 0.0
        precision = Fraction(clipped, max(1, sum(found.values())))
        logs.append(math.log(precision) if precision else math.log(sys.float_info.min))
    penalty = 1 if len(said) > len(expected) else math.exp(1 - len(expected) / len(said))
    return penalty * math.exp(sum(logs) / order)


@pytest.mark.parametrize(("answer", "reference"), PAIRS, ids=IDS)
def test_bleu(answer, reference, recwarn):
    expected = {f"bleu{n}": bleu_by_hand(answer, reference, n) for n in range(1, 5)}
    assert bleu(answer, reference) == pytest.approx(expected, abs=1e-9)
    assert not recwarn.list


def test_bleu_of_known_texts():
    # Unigrams 4 of 5, pairs 2 of 4, no brevity penalty.
    scores = bleu("the cat sat on mat", "The cat sat near mat")
    assert scores["bleu1"] == pytest.approx(4 / 5, abs=1e-9)
    assert scores["bleu2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4), abs=1e-9)
    assert bleu("a b c d", "a b c d e f")["bleu4"] == pytest.approx(math.exp(1 - 6 / 4), abs=1e-9)
    assert 0 < bleu("no match of four words", "words of four match no")["bleu4"] < 1e-70


def lcs(first: list[str], second: list[str]) -> set[str]:
    """The words of a longest common subsequence; the last one found from the end, as the package walks."""
    rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            rows[i][j] = rows[i - 1][j - 1] + 1 if a == b else max(rows[i - 1][j], rows[i][j - 1])
    found, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.add(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def f_score(common: int, said: int, expected: int) -> float:
    # The package adds 1e-8 below the line.
    precision, recall = (common / said if said else 0), (common / expected if expected else 0)
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_by_hand(answer: str, reference: str) -> dict[str, float]:
    """Sets of n-grams over all sentences; for L the union of each sentence's common subsequences."""
    sentences = [[s.split() for s in text.lower().split(".") if s] for text in (answer, reference)]
    said, expected = ([word for s in side for word in s] for side in sentences)
    if not said or not expected:
        return {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    scores = {}
    for n in (1, 2):
        grams = [{tuple(side[i : i + n]) for i in range(len(side) - n + 1)} for side in (said, expected)]
        scores[f"rouge{n}"] = f_score(len(grams[0] & grams[1]), len(grams[0]), len(grams[1]))
    union = {word for r in sentences[1] for s in sentences[0] for word in lcs(r, s)}
    scores["rougeL"] = f_score(len(union), len(set(said)), len(set(expected)))
    return scores


@pytest.mark.parametrize(("answer", "reference"), PAIRS, ids=IDS)
def test_rouge(answer, reference):
    assert rouge(answer, reference) == pytest.approx(rouge_by_hand(answer, reference), abs=1e-6)


def test_rouge_of_a_sentence_longer_than_pythons_recursion():
    text = " ".join(f"word{i}" for i in range(1500))
    limit = sys.getrecursionlimit()
    assert rouge(text, text)["rougeL"] == pytest.approx(1, abs=1e-6)
    assert sys.getrecursionlimit() == limit


def cider_by_hand(predictions: list[str], references: list[str]) -> list[float]:
    """Equations 1 to 3 and 6 of Vedantam et al. (2015), written out for one reference an item."""
    total = len(references)

    def grams(text, n):
        tokens = words(text)
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        cosines = []
        for n in range(1, 5):
            said, expected = Counter(grams(prediction, n)), Counter(grams(reference, n))
            idf = {
                g: math.log(total / max(1, sum(g in grams(other, n) for other in references)))
                for g in {*said, *expected}
            }
            norm = math.sqrt(sum((c * idf[g]) ** 2 for g, c in said.items()))
            norm *= math.sqrt(sum((c * idf[g]) ** 2 for g, c in expected.items()))
            dot = sum(min(said[g], expected[g]) * expected[g] * idf[g] ** 2 for g in said)
            cosines.append(dot / norm if norm else 0)
        length = len(grams(prediction, 2)) - len(grams(reference, 2))
        scores.append(10 * sum(cosines) / 4 * math.exp(-(length**2) / 72))
    return scores


def test_cider():
    predictions, references = zip(*PAIRS, strict=True)
    expected = cider_by_hand(list(predictions), list(references))
    assert cider(predictions, references) == pytest.approx(expected, abs=1e-9)
    assert max(expected) > 5 and min(expected) == 0


def test_cider_is_that_of_the_coco_captions_evaluation():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")
    predictions, references = zip(*PAIRS, strict=True)
    named = [{i: [" ".join(words(t))] for i, t in enumerate(side)} for side in (references, predictions)]
    _, expected = scorer.Cider(n=4, sigma=6.0).compute_score(*named)
    assert cider(predictions, references) == pytest.approx(list(expected), abs=1e-6)


def test_cider_of_few():
    assert cider([], []) == []
    assert cider(["same"], ["same"]) == [0.0]  # with one reference no word tells anything


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a b c", "B c d e", (2 / 3, 2 / 4)),
        ("a a a", "a", (1, 1)),
        ("Same text.", "same TEXT.", (1, 1)),
        ("left", "left.", (0, 0)),
        ("", "a", (0, 0)),
        ("a", "", (0, 0)),
        ("", "", (0, 0)),
        ("größe Ä", "Größe ä b", (1, 2 / 3)),
    ],
)
def test_word_overlap(answer, reference, expected):
    precision, recall = expected
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    found = word_overlap(answer, reference)
    assert found == pytest.approx({"precision": precision, "recall": recall, "f1": f1}, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (" Yes\n", "yes", 1),
        ("yes.", "yes", 0),
        ("", "", 1),
        ("", "a", 0),
        ("GRÖSSE", "größe", 0),
        ("Ä", "ä", 1),
    ],
)
def test_exact_match(answer, reference, expected):
    assert exact_match(answer, reference) == expected
