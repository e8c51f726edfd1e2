"""Open a benchmark by name, and read the system prompts of its tasks."""

import ast
import difflib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark
from internvl_chat.eval.benchmarks.medframeqa import read_medframeqa
from internvl_chat.eval.benchmarks.medxpertqa import read_medxpertqa
from internvl_chat.eval.benchmarks.mmmu import read_mmmu
from internvl_chat.eval.benchmarks.omnimed import read_omnimed
from internvl_chat.eval.benchmarks.pmc_mi import read_folder, read_pmc_mi
from internvl_chat.eval.benchmarks.pmc_vqa import read_pmc_vqa
from internvl_chat.eval.benchmarks.reading import (
    Request,
    raise_problems,
    skipped_message,
    unknown_tasks,
    warn_about_options,
)
from internvl_chat.eval.benchmarks.short_answers import read_path_vqa, read_slake, read_vqa_rad
from internvl_chat.eval.benchmarks.vqa import read_vqa
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

READERS: dict[str, Callable[[Path, Request], Benchmark]] = {
    "pmc-mi": read_pmc_mi,
    "medframeqa": read_medframeqa,
    "medxpertqa-mm": read_medxpertqa,
    "mmmu-med": read_mmmu,
    "omnimedvqa": read_omnimed,
    "pathvqa": read_path_vqa,
    "pmc-vqa": read_pmc_vqa,
    "slake": read_slake,
    "vqa": read_vqa,
    "vqa-rad": read_vqa_rad,
}
PROMPTS = Path(__file__).with_name("prompts.yaml")


def location_problem(name: str, data: Path | None) -> str | None:
    """Return an error message if `--bench` or `--data` is invalid; None if both are valid."""
    if name not in READERS:
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name, READERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"--bench {name}: neither a folder nor one of {', '.join(READERS)}{hint}"
        return None if data is None else f"--bench {name} is a folder; remove --data"
    if data is None:
        return f"--bench {name} requires --data, the location of the benchmark"
    return None if data.exists() else f"--data {data}: no such file or folder"


def open_benchmark(
    name: str,
    data: Path | None,
    *,
    tasks: Collection[str] | None = None,
    images: bool = True,
    on_bad_record: str = "fail",
) -> Benchmark:
    """Read and validate a benchmark.

    Args:
        name: key of `READERS`, or a folder in PMC-MI-Bench format.
        data: file or folder of the benchmark; None if `name` is a folder.
        tasks: tasks to read (default: all).
        images: whether the image files must exist.
        on_bad_record: `fail`, or `skip` to log and exclude invalid items.

    Raises:
        UsageError: the name or a task is unknown, or `data` does not exist.
        DataError: an item is invalid and `on_bad_record` is `fail`, or no item is usable.
    """
    problem = location_problem(name, data)
    if problem is not None:
        raise UsageError(problem)
    request = Request(tasks, images)
    benchmark = READERS[name](data, request) if data is not None else read_folder(Path(name), request)
    known = dict.fromkeys(item.task for item in benchmark.items if item.task)
    if unknown := [task for task in tasks or () if task not in known]:
        raise UsageError(unknown_tasks(unknown, benchmark.name, known))
    # The task of an invalid item may be unknown.
    items = [item for item in benchmark.items if request.wants(item.task) or not item.task]
    usable, bad = ([item for item in items if bool(item.problem) == is_bad] for is_bad in (False, True))
    if bad and on_bad_record != "skip":
        advice = ["correct these items, or exclude them with --on_bad_record skip"]
        raise_problems([item.problem for item in bad], advice)
    if bad:
        logger.warning("%s", skipped_message([item.problem for item in bad], len(items)))
    if not usable:
        raise DataError("no usable items", file=data or name)
    warn_about_options(usable)
    totals = Counter(item.task for item in benchmark.items if item.task)
    return replace(benchmark, items=tuple(usable), excluded=tuple(bad), totals=totals)


def system_prompts(benchmark: Benchmark, file: Path | None = None) -> dict[str, str | None]:
    """Return the system prompt of each task; None for the system prompt of the checkpoint.

    Args:
        file: YAML or JSON file that maps task names or the benchmark name to system prompts, or the published
            `task_config.py` of PMC-MI-Bench (default: the built-in `prompts.yaml`).

    Raises:
        DataError: the file cannot be read, is not a mapping of strings, or contains unknown names.
    """
    texts = _read(file or PROMPTS)
    if file is not None:
        known = {*benchmark.tasks, *benchmark.other_tasks, benchmark.name, *_read(PROMPTS)}
        unknown = sorted(texts.keys() - known)
        if unknown:
            raise DataError(
                f"unknown tasks: {', '.join(unknown)}; the tasks of {benchmark.name} are "
                f"{', '.join(benchmark.tasks)}",
                file=file,
            )
    return {task: texts.get(task, texts.get(benchmark.name)) for task in benchmark.tasks}


def _read(file: Path) -> dict[str, str]:
    import yaml

    try:
        content = file.read_text(encoding="utf-8")
        texts = _task_config(content) if file.suffix == ".py" else yaml.safe_load(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot be read as YAML: {error}", file=file) from None
    except (SyntaxError, ValueError, LookupError, TypeError, AttributeError):
        raise DataError("does not assign TASKS a dict of tasks with 'system_prompt'", file=file) from None
    if not isinstance(texts, dict) or not all(isinstance(t, str) for pair in texts.items() for t in pair):
        raise DataError("must map task names to system prompts", file=file)
    return {name: text.strip() for name, text in texts.items()}


def _task_config(source: str) -> dict[str, str]:
    """Return the system prompts in a `task_config.py` of PMC-MI-Bench, without running it."""
    assigned = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    [tasks] = (node.value for node in assigned if ast.unparse(node.targets[0]) == "TASKS")
    return {name: task["system_prompt"] for name, task in ast.literal_eval(tasks).items()}
