"""Benchmarks by name, and the system texts of their tasks."""

import difflib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark
from internvl_chat.eval.benchmarks.mmmu import read_mmmu
from internvl_chat.eval.benchmarks.omnimed import read_omnimed
from internvl_chat.eval.benchmarks.pmc_mi import read_folder, read_pmc_mi
from internvl_chat.eval.benchmarks.reading import (
    Request,
    raise_problems,
    skipped_message,
    unknown_tasks,
    warn_about_letters,
)
from internvl_chat.eval.benchmarks.vqa import read_vqa
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

READERS: dict[str, Callable[[Path, Request], Benchmark]] = {
    "pmc-mi": read_pmc_mi,
    "omnimedvqa": read_omnimed,
    "mmmu-med": read_mmmu,
    "vqa": read_vqa,
}
PROMPTS = Path(__file__).with_name("prompts.yaml")


def location_problem(name: str, data: Path | None) -> str | None:
    """Return what is wrong with the name of a benchmark or the location of its data, if anything."""
    if name not in READERS:
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name, READERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"--bench {name}: neither a folder nor one of {', '.join(READERS)}{hint}"
        return None if data is None else f"--bench {name} is a folder; remove --data"
    if data is None:
        return f"--bench {name} needs --data, the location of the benchmark"
    return None if data.exists() else f"--data {data}: no such file or folder"


def open_benchmark(
    name: str,
    data: Path | None,
    *,
    tasks: Collection[str] | None = None,
    images: bool = True,
    on_bad_record: str = "fail",
) -> Benchmark:
    """Read a benchmark.

    Args:
        name: key of `READERS`, or a folder in the format of PMC-MI-Bench.
        data: file or folder of a named benchmark.
        tasks: tasks to read; None for all.
        images: whether the images are needed.
        on_bad_record: `fail`, or `skip` to exclude invalid items by name.

    Raises:
        UsageError: the name or a task is unknown, or the data do not exist.
        DataError: items are invalid, unless they are excluded.
    """
    problem = location_problem(name, data)
    if problem is not None:
        raise UsageError(problem)
    request = Request(tasks, images)
    benchmark = READERS[name](data, request) if data is not None else read_folder(Path(name), request)
    known = dict.fromkeys(item.task for item in benchmark.items if item.task)
    if unknown := [task for task in tasks or () if task not in known]:
        raise UsageError(unknown_tasks(unknown, benchmark.name, known))
    # An invalid item may belong to any task.
    items = [item for item in benchmark.items if request.wants(item.task) or not item.task]
    usable, bad = ([item for item in items if bool(item.problem) == is_bad] for is_bad in (False, True))
    if bad and on_bad_record != "skip":
        advice = ["correct these items, or evaluate without them: --on_bad_record skip"]
        raise_problems([item.problem for item in bad], advice)
    if bad:
        logger.warning("%s", skipped_message([item.problem for item in bad], len(items)))
    if not usable:
        raise DataError("no item can be used", file=data or name)
    warn_about_letters(usable)
    totals = Counter(item.task for item in benchmark.items if item.task)
    return replace(benchmark, items=tuple(usable), excluded=tuple(bad), totals=totals)


def system_texts(benchmark: Benchmark, file: Path | None = None) -> dict[str, str | None]:
    """Return the system text of each task; None selects the system text of the checkpoint.

    Args:
        file: YAML or JSON file that maps task names, or the name of the benchmark, to system texts (default:
            the file of the package).

    Raises:
        DataError: the file cannot be read, is not such a map, or has unknown names.
    """
    texts = _read(file or PROMPTS)
    if file is not None:
        known = {*benchmark.tasks, *benchmark.other_tasks, benchmark.name, *_read(PROMPTS)}
        unknown = sorted(texts.keys() - known)
        if unknown:
            raise DataError(
                f"not tasks of {benchmark.name}: {', '.join(unknown)}; its tasks are "
                f"{', '.join(benchmark.tasks)}",
                file=file,
            )
    return {task: texts.get(task, texts.get(benchmark.name)) for task in benchmark.tasks}


def _read(file: Path) -> dict[str, str]:
    import yaml

    try:
        texts = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot be read as YAML: {error}", file=file) from None
    if not isinstance(texts, dict) or not all(isinstance(t, str) for pair in texts.items() for t in pair):
        raise DataError("must map task names to system texts", file=file)
    return {name: text.strip() for name, text in texts.items()}
