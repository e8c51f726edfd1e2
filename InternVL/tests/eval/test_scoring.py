"""Scores of items and tasks: metrics, means, and unavailable metrics with their log messages."""

import json
import logging

import pytest
from encoders import write_bert, write_sentence_encoder

from internvl_chat.eval.benchmarks.item import Benchmark, Item
from internvl_chat.eval.report.table import LABELS
from internvl_chat.eval.scoring import score
from internvl_chat.metrics import suite as suites
from internvl_chat.metrics.bleu import bleu
from internvl_chat.metrics.cider import cider
from internvl_chat.metrics.rouge import rouge
from internvl_chat.metrics.suite import CHOICE_METRICS, FAMILIES, JUDGE, OPEN_METRICS, Suite, build_suite
from internvl_chat.utils.errors import UsageError

OPEN = [
    ("a", "the left lobe of the lung", "the left lobe"),
    ("a", "nothing of the kind", "a small mass"),
    ("b", "yes", "Yes"),
    ("b", "", "No"),
]
CHOICES = [("A", "A."), ("B", "The answer is B"), ("B", "A"), ("C", "I cannot say")]
WITHOUT_MODELS = Suite(frozenset({"bleu", "rouge", "overlap", "cider", "macro"}))


def open_benchmark() -> tuple[Benchmark, dict]:
    numbers = [0, 1, 0, 1]
    items = [Item(t, n, "?", reference) for n, (t, _, reference) in zip(numbers, OPEN, strict=True)]
    return Benchmark("own", tuple(items)), {
        i.key: answer for i, (_, answer, _) in zip(items, OPEN, strict=True)
    }


def choice_benchmark(**values) -> tuple[Benchmark, dict]:
    items = [Item("c", n, "?", letter, choices=("x", "y", "z")) for n, (letter, _) in enumerate(CHOICES)]
    return Benchmark("own", tuple(items), **values), {
        ("c", n): answer for n, (_, answer) in enumerate(CHOICES)
    }


def test_open_answers():
    benchmark, answers = open_benchmark()
    scores = score(benchmark, answers, WITHOUT_MODELS)
    assert list(scores.tasks) == ["a", "b"]
    assert list(scores.tasks["a"]) == ["items", *OPEN_METRICS]
    for name, metric in (("bleu2", bleu), ("rougeL", rouge)):
        for task in ("a", "b"):
            values = [metric(answer, reference)[name] for t, answer, reference in OPEN if t == task]
            assert scores.tasks[task][name] == pytest.approx(100 * sum(values) / 2, abs=1e-9)
    assert scores.tasks["b"]["em"] == 50 and scores.items["b", 0]["em"] == 1
    # Document frequencies are computed from the references of the task.
    expected = cider(["the left lobe of the lung", "nothing of the kind"], ["the left lobe", "a small mass"])
    assert [scores.items["a", n]["cider"] for n in range(2)] == pytest.approx(expected)
    assert scores.tasks["a"]["cider"] == pytest.approx(50 * sum(expected))
    assert scores.tasks["a"]["bertscore"] is None and scores.tasks["a"]["sts"] is None


def test_multiple_choice():
    benchmark, answers = choice_benchmark()
    metrics = score(benchmark, answers, WITHOUT_MODELS).tasks["c"]
    assert set(metrics) == {"items", "unreadable", *CHOICE_METRICS}
    assert (metrics["items"], metrics["unreadable"], metrics["accuracy"]) == (4, 1, 50)
    # A: precision 1/2, recall 1; B: 1, 1/2; C: 0, 0.
    assert metrics["precision"] == pytest.approx(100 * (0.5 + 1) / 3)
    assert metrics["recall"] == pytest.approx(100 * (1 + 0.5) / 3)
    assert metrics["f1"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 3)


def test_missing_metrics_are_none():
    benchmark, answers = choice_benchmark()
    metrics = score(benchmark, answers, Suite(frozenset())).tasks["c"]
    assert metrics["accuracy"] == 50 and metrics["f1"] is None
    benchmark, answers = open_benchmark()
    metrics = score(benchmark, answers, Suite(frozenset({"bleu"}))).tasks["a"]
    assert [name for name, value in metrics.items() if value is not None] == ["items", *FAMILIES["bleu"]]


def test_open_question_in_a_multiple_choice_task_counts_by_exact_match():
    benchmark, answers = choice_benchmark(pooled=True)
    items = (
        *benchmark.items,
        Item("c", 4, "?", "two", accepted=("2",)),
        Item("d", 0, "?", "A", choices=("x", "y")),
    )
    answers |= {("c", 4): "2", ("d", 0): "A"}
    tasks = score(Benchmark("own", items, pooled=True), answers, WITHOUT_MODELS).tasks
    assert tasks["c"]["accuracy"] == 60 and tasks["c"]["items"] == 5
    assert list(tasks) == ["c", "d", "all"] and tasks["all"]["accuracy"] == pytest.approx(100 * 4 / 6)


def test_with_encoders(tmp_path):
    bert, sentences = write_bert(tmp_path / "bert"), write_sentence_encoder(tmp_path / "sentences")
    suite = build_suite(None, bertscore_model=str(bert), sts_model=str(sentences), device="cpu")
    assert suite.families == set(FAMILIES) and suite.bertscore_layer == 2
    benchmark, answers = open_benchmark()
    answers["b", 0] = "Yes"
    scores = score(benchmark, answers, suite)
    assert scores.items["b", 0]["bertscore"] == pytest.approx(1, abs=1e-5)
    assert scores.items["b", 0]["sts"] == pytest.approx(1, abs=1e-5)
    assert all(value is not None for metrics in scores.tasks.values() for value in metrics.values())
    json.dumps(scores.tasks, allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_computed(tmp_path, family):
    encoders = write_bert(tmp_path / "bert"), write_sentence_encoder(tmp_path / "sentences")
    suite = Suite(frozenset({family}), bertscore_model=encoders[0], bertscore_layer=2, sts_model=encoders[1])
    benchmark, answers = open_benchmark() if FAMILIES[family] else choice_benchmark()
    names = FAMILIES[family] or set(CHOICE_METRICS) - {"accuracy"}
    for metrics in score(benchmark, answers, suite).tasks.values():
        assert [name for name in names if metrics.get(name) is None] == []


def test_every_metric_has_a_label():
    assert {*OPEN_METRICS, *CHOICE_METRICS, JUDGE} == set(LABELS)


@pytest.fixture
def no_hub(monkeypatch):
    """Make the hub unreachable."""
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def test_unavailable_metrics_are_logged_by_default(no_hub, caplog):
    logging.getLogger("internvl_chat").propagate = True
    suite = build_suite(None)
    assert suite.families == set(FAMILIES) - {"bertscore", "sts"}
    assert "bertscore is not computed: microsoft/deberta-xlarge-mnli: neither" in caplog.text
    assert "sts is not computed" in caplog.text and "--sts_model" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "models", "messages"),
    [
        (
            ["bleu", "bertscore", "sts"],
            {},
            ["bertscore: microsoft/deberta-xlarge-mnli", "sts: sentence-transformers"],
        ),
        (None, {"bertscore_model": "/none"}, ["bertscore: /none: no such model folder"]),
        (["bleu"], {"sts_model": "/none"}, ["sts: /none: no such model folder"]),
        (["sts"], {"sts_model": "EMPTY"}, ["contains no weights", "--sts_model"]),
    ],
)
def test_requested_metrics_must_be_available(no_hub, tmp_path, wanted, models, messages):
    models = {name: str(tmp_path) if folder == "EMPTY" else folder for name, folder in models.items()}
    with pytest.raises(UsageError) as error:
        build_suite(wanted, **models)
    assert all(message in str(error.value) for message in messages)


def test_missing_packages(monkeypatch, no_hub, caplog):
    real = suites.importlib.util.find_spec
    absent = {"nltk", "sklearn", "bert_score"}
    monkeypatch.setattr(suites.importlib.util, "find_spec", lambda n: None if n in absent else real(n))
    logging.getLogger("internvl_chat").propagate = True
    assert build_suite(None).families == {"rouge", "overlap", "cider"}
    assert "bleu is not computed: the package nltk is not installed (pip install '.[eval]')" in caplog.text
    with pytest.raises(UsageError, match=r"2 problems(.|\n)*nltk(.|\n)*sklearn"):
        build_suite(["bleu", "macro"])
    assert build_suite(["rouge"]).families == {"rouge"}


def test_open_metrics_are_not_needed_without_open_questions(no_hub, caplog):
    logging.getLogger("internvl_chat").propagate = True
    assert build_suite(None, has_open=False).families == {"macro"}
    assert not caplog.text


def test_answer_tokens_are_not_scored():
    tagged, plain = "<ref>the heart</ref><box>[[1, 2, 3, 4]]</box>", "the heart[[1, 2, 3, 4]]"
    items = (Item("a", 0, "?", tagged), Item("a", 1, "?", plain), Item("a", 2, "?", "x", accepted=(tagged,)))
    answers = {("a", 0): tagged, ("a", 1): tagged, ("a", 2): plain}
    scores = score(Benchmark("own", items), answers, WITHOUT_MODELS)
    for n in (0, 1):
        assert [scores.items["a", n][name] for name in ("em", "f1", "rougeL")] == pytest.approx(
            [1, 1, 1], abs=1e-6
        )
    assert items[2].is_correct(plain)
    choice = Item("c", 0, "?", "B", choices=("x", "y"))
    assert choice.selected_letter("<ref>B</ref>") == "B"
