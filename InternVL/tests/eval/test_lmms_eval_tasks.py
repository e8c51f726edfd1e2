"""lmms-eval tasks: prompts, and metrics that match `m3llm eval`."""

import fnmatch
import json
import tomllib
from pathlib import Path
from pydoc import locate

import pytest
import yaml
from conftest import REPOSITORY
from encoders import write_bert, write_sentence_encoder
from small_sets import noise

from internvl_chat.eval import lmms_eval_tasks
from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_prompts
from internvl_chat.eval.benchmarks.pmc_mi import FILES
from internvl_chat.eval.lmms_eval_tasks import functions
from internvl_chat.eval.scoring import score
from internvl_chat.metrics.suite import CHOICE_METRICS, OPEN_METRICS, Suite, build_suite
from internvl_chat.utils.errors import UsageError

FOLDER = Path(lmms_eval_tasks.__file__).parent
TEMPLATE = FOLDER / "_default_template.yaml"
OPTIONS = "Which one? The candidate options are: A. One\nB. Two\nC. Three"
OPEN_ANSWERS = ["the left lobe of the lung", "nothing of the kind", ""]
CHOICE_ANSWERS = ["A.", "The answer is A", "I cannot say"]


class Loader(yaml.SafeLoader):
    """YAML loader that resolves `!function module.name` as lmms-eval does."""


def import_named(loader, node):
    function = locate(loader.construct_scalar(node))
    assert function is not None, f"{node.value} does not exist"
    return function


Loader.add_constructor("!function", import_named)


def read(file: Path) -> dict:
    config = yaml.load(file.read_text(), Loader)
    return read(FOLDER / config.pop("include")) | config if "include" in config else config


@pytest.fixture
def configs() -> dict[str, dict]:
    """Task configurations, keyed by the task name in `m3llm eval`."""
    read_all = [read(file) for file in sorted(FOLDER.glob("*.yaml")) if file != TEMPLATE]
    return {config["dataset_name"]: config for config in read_all if isinstance(config.get("task"), str)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    bert, sentences = write_bert(folder / "bert"), write_sentence_encoder(folder / "sentences")
    return {"bertscore_model": str(bert), "sts_model": str(sentences)}


@pytest.fixture
def suite(encoders, monkeypatch):
    """Suite of all metrics, with random encoders."""
    monkeypatch.setenv(functions.BERTSCORE_MODEL, encoders["bertscore_model"])
    monkeypatch.setenv(functions.STS_MODEL, encoders["sts_model"])
    functions._suite.cache_clear()
    yield build_suite(None, **encoders)
    functions._suite.cache_clear()


def record(reference: str, **values) -> dict:
    return {"question": "What is shown?", "gt": reference, **values}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Folder of the six files, with three questions each and two images per question (text-only QA: none)."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        noise(30, 20).save(tmp_path / "images" / name)
    shown = {"images": ["b.png", "a.png"], "image_indices": ["Fig-3", "Fig-1"]}
    for task, name in FILES.items():
        records = [record(text) for text in ("The left lobe.", "A small mass", "No")]
        if task == "multi-choice":
            records = [record(letter, question=OPTIONS) for letter in "ABC"]
        images = {} if task == "puretext" else shown
        (tmp_path / name).write_text(json.dumps([one | images for one in records]))
    monkeypatch.setenv(functions.DATA, str(tmp_path))
    return tmp_path


def answers_to(task: str) -> list[str]:
    return CHOICE_ANSWERS if task == "multi-choice" else OPEN_ANSWERS


def evaluate(config: dict, documents: list[dict], answers: list[str]) -> dict[str, float]:
    """Aggregate the results as lmms-eval does."""
    rows = [config["process_results"](doc, [answer]) for doc, answer in zip(documents, answers, strict=True)]
    metrics = {}
    for metric in config["metric_list"]:
        values = [row[metric["metric"]] for row in rows if metric["metric"] in row]
        if not values:
            continue
        mean = metric["aggregation"] == "mean"
        metrics[metric["metric"]] = sum(values) / len(values) if mean else metric["aggregation"](values)
    return metrics


def test_task_for_each_file_and_their_group(configs):
    assert set(configs) == set(FILES)
    group = read(FOLDER / "pmc_mi_bench.yaml")
    assert group["task"] == [configs[task]["task"] for task in FILES]
    assert group["group"] == "pmc_mi_bench"
    for task, config in configs.items():
        assert (FOLDER / f"{config['task']}.yaml").is_file()
        names = [metric["metric"] for metric in config["metric_list"]]
        expected = [*CHOICE_METRICS, "unreadable"] if task == "multi-choice" else list(OPEN_METRICS)
        assert names == expected


def test_task_files_are_packaged():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["internvl_chat"]
    files = [f"eval/lmms_eval_tasks/{f.name}" for f in FOLDER.iterdir() if f.is_file() and f.suffix != ".py"]
    assert len(files) == 9
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in files)
    for name in read(TEMPLATE)["dataset_kwargs"]["data_files"].values():
        assert (FOLDER / name).read_text().strip()


def test_prompts(data):
    benchmark = open_benchmark("pmc-mi", data)
    system = system_prompts(benchmark)
    for task in FILES:
        documents = functions.read_documents(task, data)
        items = [item for item in benchmark.items if item.task == task]
        assert json.loads(json.dumps(documents)) == documents and len(documents) == 3
        for doc, item in zip(documents, items, strict=True):
            assert functions.doc_to_text(doc) == f"{system[task]}\n\n{item.text}"
            assert doc["reference"] == item.reference
            shown = functions.doc_to_visual(doc)
            assert [image.tobytes() for image in shown] == [f.decode().tobytes() for f in item.figures]
            system_message, user_message = functions.doc_to_messages(doc)
            assert system_message == {"role": "system", "content": [{"type": "text", "text": system[task]}]}
            parts = [part.get("text", "<image>") for part in user_message["content"]]
            assert user_message["role"] == "user" and "".join(parts) == item.text
            *_, internvl_message = functions.doc_to_messages(doc, {"newline_after_image": True})
            parts = [part.get("text", "<image>\n") for part in internvl_message["content"]]
            assert "".join(parts) == item.text
            urls = [part["url"] for part in user_message["content"] if part["type"] == "image"]
            assert [image.tobytes() for image in urls] == [image.tobytes() for image in shown]


def test_metrics_match_m3llm_eval(configs, data, suite):
    benchmark = open_benchmark("pmc-mi", data)
    answers = {item.key: answers_to(item.task)[item.index] for item in benchmark.items}
    expected = score(benchmark, answers, suite).tasks
    for task, config in configs.items():
        metrics = evaluate(config, functions.read_documents(task, data), answers_to(task))
        assert metrics == pytest.approx({k: v for k, v in expected[task].items() if k != "items"}, abs=1e-4)
        assert len(metrics) == len(config["metric_list"]) > 4


def test_unavailable_metrics_are_skipped(configs, data, monkeypatch):
    monkeypatch.setattr(functions, "_suite", lambda: Suite(frozenset({"bleu", "overlap", "cider"})))
    metrics = {}
    for task in ("puretext", "multi-choice"):
        metrics[task] = evaluate(configs[task], functions.read_documents(task, data), answers_to(task))
    assert set(metrics["multi-choice"]) == {"accuracy", "unreadable"}
    assert set(OPEN_METRICS) - set(metrics["puretext"]) == {"rouge1", "rouge2", "rougeL", "bertscore", "sts"}


def test_custom_folder(configs, tmp_path, suite):
    records = [record("B", question=OPTIONS), record("two"), record("A", question=OPTIONS)]
    (tmp_path / "organs_benchmark.json").write_text(json.dumps(records))
    documents = functions.read_documents("organs", tmp_path)
    assert [doc["system"] for doc in documents] == [None] * 3
    assert functions.doc_to_text(documents[1]) == "What is shown?"
    assert [message["role"] for message in functions.doc_to_messages(documents[1])] == ["user"]
    # Open questions in a multiple-choice task count by exact match.
    answers = ["b", "Two", "C"]
    metrics = evaluate(configs["multi-choice"], documents, answers)
    benchmark = open_benchmark(str(tmp_path), None)
    expected = score(benchmark, {("organs", n): answer for n, answer in enumerate(answers)}, suite).tasks[
        "organs"
    ]
    assert metrics == pytest.approx({k: v for k, v in expected.items() if k != "items"})
    assert metrics["accuracy"] == pytest.approx(200 / 3)


class Loaded(list):
    """Stand-in for the dataset that lmms-eval loads."""

    config_name = "bboxVQA"
    from_list = classmethod(lambda cls, rows: cls(rows))


def test_folder_from_the_environment(data, monkeypatch):
    documents = functions.process_docs(Loaded())
    assert isinstance(documents, Loaded) and documents == functions.read_documents("bboxVQA", data)
    with pytest.raises(UsageError, match=r"--tasks organs: unknown; the tasks of .* are compoundVQA, "):
        functions.read_documents("organs", data)
    monkeypatch.setenv(functions.DATA, str(data / "none"))
    with pytest.raises(UsageError, match="no such file or folder"):
        functions.process_docs(Loaded())
    monkeypatch.delenv(functions.DATA)
    with pytest.raises(UsageError, match="M3LLM_BENCH_DATA is not set"):
        functions.process_docs(Loaded())


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_lmms_eval_runs_the_tasks(kind, data, suite, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed", exc_type=ImportError)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    class FakeModel(lmms):
        """Fake model that returns fixed answers."""

        is_simple = kind == "simple"

        def generate_until(self, requests):
            documents = [self.task_dict[r.args[-2]][r.args[-1]][r.args[-3]] for r in requests]
            for request, doc in zip(requests, documents, strict=True):
                ask = request.args[2 if self.is_simple else 1]
                assert len(ask(doc)) == (len(doc["images"]) if self.is_simple else 2)
            return [answers_to(doc["task"])[doc["index"]] for doc in documents]

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

        def loglikelihood(self, requests):
            raise NotImplementedError

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert manager.all_groups == ["pmc_mi_bench"] and len(manager.all_subtasks) == 6
    found = simple_evaluate(FakeModel(), tasks=["pmc_mi_bench"], task_manager=manager, bootstrap_iters=0)
    benchmark = open_benchmark("pmc-mi", data)
    answers = {item.key: answers_to(item.task)[item.index] for item in benchmark.items}
    for task, expected in score(benchmark, answers, suite).tasks.items():
        [metrics] = [found["results"][name] for name, config in found["configs"].items()
                     if config["dataset_name"] == task]  # fmt: skip
        got = {name: float(metrics[f"{name},none"]) for name in expected if name != "items"}
        assert got == pytest.approx({k: v for k, v in expected.items() if k != "items"}, abs=1e-4)
