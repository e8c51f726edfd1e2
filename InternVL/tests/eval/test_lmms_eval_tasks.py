"""The tasks for lmms-eval: what is asked, and that their metrics are those of `m3llm eval`."""

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
from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_texts
from internvl_chat.eval.benchmarks.pmc_mi import FILES
from internvl_chat.eval.lmms_eval_tasks import functions
from internvl_chat.eval.scoring import score
from internvl_chat.metrics.suite import CHOICE_METRICS, OPEN_METRICS, Suite, build_suite
from internvl_chat.utils.errors import UsageError

FOLDER = Path(lmms_eval_tasks.__file__).parent
TEMPLATE = FOLDER / "_default_template.yaml"
OPTIONS = "Which one? The candidate options are: A. One\nB. Two\nC. Three"
SAID = ["the left lobe of the lung", "nothing of the kind", ""]
SAID_LETTERS = ["A.", "The answer is A", "I cannot say"]


class Loader(yaml.SafeLoader):
    """Reads the tag of lmms-eval's files as lmms-eval does: `module.name` becomes what it names."""


def import_named(loader, node):
    found = locate(loader.construct_scalar(node))
    assert found is not None, f"{node.value} does not exist"
    return found


Loader.add_constructor("!function", import_named)


def read(file: Path) -> dict:
    config = yaml.load(file.read_text(), Loader)
    return read(FOLDER / config.pop("include")) | config if "include" in config else config


@pytest.fixture
def configs() -> dict[str, dict]:
    """The tasks' configurations by the name that the task has in `m3llm eval`."""
    read_all = [read(file) for file in sorted(FOLDER.glob("*.yaml")) if file != TEMPLATE]
    return {config["dataset_name"]: config for config in read_all if isinstance(config.get("task"), str)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    bert, sentences = write_bert(folder / "bert"), write_sentence_encoder(folder / "sentences")
    return {"bertscore_model": str(bert), "sts_model": str(sentences)}


@pytest.fixture
def suite(encoders, monkeypatch):
    """All metrics, with encoders that are random."""
    monkeypatch.setenv(functions.BERTSCORE_MODEL, encoders["bertscore_model"])
    monkeypatch.setenv(functions.STS_MODEL, encoders["sts_model"])
    functions._suite.cache_clear()
    yield build_suite(None, **encoders)
    functions._suite.cache_clear()


def record(reference: str, **values) -> dict:
    return {"question": "What is shown?", "gt": reference, **values}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """The six files, three questions in each, with two images but for the questions of text alone."""
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
    return SAID_LETTERS if task == "multi-choice" else SAID


def evaluate(config: dict, documents: list[dict], answers: list[str]) -> dict[str, float]:
    """Results become figures in the way of lmms-eval."""
    rows = [config["process_results"](doc, [said]) for doc, said in zip(documents, answers, strict=True)]
    figures = {}
    for metric in config["metric_list"]:
        values = [row[metric["metric"]] for row in rows if metric["metric"] in row]
        if not values:
            continue
        mean = metric["aggregation"] == "mean"
        figures[metric["metric"]] = sum(values) / len(values) if mean else metric["aggregation"](values)
    return figures


def test_there_is_a_task_for_each_file_and_a_group_of_them(configs):
    assert set(configs) == set(FILES)
    group = read(FOLDER / "pmc_mi_bench.yaml")
    assert group["task"] == [configs[task]["task"] for task in FILES]
    assert group["group"] == "pmc_mi_bench"
    for task, config in configs.items():
        assert (FOLDER / f"{config['task']}.yaml").is_file()
        names = [metric["metric"] for metric in config["metric_list"]]
        expected = [*CHOICE_METRICS, "unreadable"] if task == "multi-choice" else list(OPEN_METRICS)
        assert names == expected


def test_the_files_are_in_the_package():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["internvl_chat"]
    files = [f"eval/lmms_eval_tasks/{f.name}" for f in FOLDER.iterdir() if f.is_file() and f.suffix != ".py"]
    assert len(files) == 9
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in files)
    for name in read(TEMPLATE)["dataset_kwargs"]["data_files"].values():
        assert (FOLDER / name).read_text().strip()


def test_what_is_asked(data):
    benchmark = open_benchmark("pmc-mi", data)
    system = system_texts(benchmark)
    for task in FILES:
        documents = functions.read_documents(task, data)
        items = [item for item in benchmark.items if item.task == task]
        assert json.loads(json.dumps(documents)) == documents and len(documents) == 3
        for doc, item in zip(documents, items, strict=True):
            assert functions.doc_to_text(doc) == f"{system[task]}\n\n{item.text}"
            assert doc["reference"] == item.reference
            shown = functions.doc_to_visual(doc)
            assert [image.tobytes() for image in shown] == [f.decode().tobytes() for f in item.figures]
            asked, said = functions.doc_to_messages(doc)
            assert asked == {"role": "system", "content": [{"type": "text", "text": system[task]}]}
            parts = [part.get("text", "<image>") for part in said["content"]]
            assert said["role"] == "user" and "".join(parts) == item.text
            *_, said_to_internvl = functions.doc_to_messages(doc, {"newline_after_image": True})
            parts = [part.get("text", "<image>\n") for part in said_to_internvl["content"]]
            assert "".join(parts) == item.text
            urls = [part["url"] for part in said["content"] if part["type"] == "image"]
            assert [image.tobytes() for image in urls] == [image.tobytes() for image in shown]


def test_metrics_are_those_of_the_project(configs, data, suite):
    benchmark = open_benchmark("pmc-mi", data)
    answers = {item.key: answers_to(item.task)[item.index] for item in benchmark.items}
    expected = score(benchmark, answers, suite).tasks
    for task, config in configs.items():
        figures = evaluate(config, functions.read_documents(task, data), answers_to(task))
        assert figures == pytest.approx({k: v for k, v in expected[task].items() if k != "items"}, abs=1e-4)
        assert len(figures) == len(config["metric_list"]) > 4


def test_metrics_that_cannot_be_computed_are_left_out(configs, data, monkeypatch):
    monkeypatch.setattr(functions, "_suite", lambda: Suite(frozenset({"bleu", "overlap", "cider"})))
    found = {}
    for task in ("puretext", "multi-choice"):
        found[task] = evaluate(configs[task], functions.read_documents(task, data), answers_to(task))
    assert set(found["multi-choice"]) == {"accuracy", "unreadable"}
    assert set(OPEN_METRICS) - set(found["puretext"]) == {"rouge1", "rouge2", "rougeL", "bertscore", "sts"}


def test_a_folder_of_ones_own(configs, tmp_path, suite):
    records = [record("B", question=OPTIONS), record("two"), record("A", question=OPTIONS)]
    (tmp_path / "organs_benchmark.json").write_text(json.dumps(records))
    documents = functions.read_documents("organs", tmp_path)
    assert [doc["system"] for doc in documents] == [None] * 3
    assert functions.doc_to_text(documents[1]) == "What is shown?"
    assert [message["role"] for message in functions.doc_to_messages(documents[1])] == ["user"]
    # An open question among multiple choice counts word for word.
    answers = ["b", "Two", "C"]
    figures = evaluate(configs["multi-choice"], documents, answers)
    benchmark = open_benchmark(str(tmp_path), None)
    expected = score(benchmark, {("organs", n): said for n, said in enumerate(answers)}, suite).tasks[
        "organs"
    ]
    assert figures == pytest.approx({k: v for k, v in expected.items() if k != "items"})
    assert figures["accuracy"] == pytest.approx(200 / 3)


class Loaded(list):
    """What lmms-eval has loaded before it asks for the documents."""

    config_name = "bboxVQA"
    from_list = classmethod(lambda cls, rows: cls(rows))


def test_the_folder_comes_from_the_environment(data, monkeypatch):
    documents = functions.process_docs(Loaded())
    assert isinstance(documents, Loaded) and documents == functions.read_documents("bboxVQA", data)
    with pytest.raises(UsageError, match="no task organs, only compoundVQA, "):
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

    class Given(lmms):
        """Gives the answers above."""

        is_simple = kind == "simple"

        def generate_until(self, requests):
            asked = [self.task_dict[r.args[-2]][r.args[-1]][r.args[-3]] for r in requests]
            for request, doc in zip(requests, asked, strict=True):
                ask = request.args[2 if self.is_simple else 1]
                assert len(ask(doc)) == (len(doc["images"]) if self.is_simple else 2)
            return [answers_to(doc["task"])[doc["index"]] for doc in asked]

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

        def loglikelihood(self, requests):
            raise NotImplementedError

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert manager.all_groups == ["pmc_mi_bench"] and len(manager.all_subtasks) == 6
    found = simple_evaluate(Given(), tasks=["pmc_mi_bench"], task_manager=manager, bootstrap_iters=0)
    benchmark = open_benchmark("pmc-mi", data)
    answers = {item.key: answers_to(item.task)[item.index] for item in benchmark.items}
    for task, expected in score(benchmark, answers, suite).tasks.items():
        [figures] = [found["results"][name] for name, config in found["configs"].items()
                     if config["dataset_name"] == task]  # fmt: skip
        got = {name: float(figures[f"{name},none"]) for name in expected if name != "items"}
        assert got == pytest.approx({k: v for k, v in expected.items() if k != "items"}, abs=1e-4)
