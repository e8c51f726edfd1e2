"""Benchmarks by name, and the system texts that their questions are asked under."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark
from internvl_chat.eval.benchmarks.mmmu import read_mmmu
from internvl_chat.eval.benchmarks.omnimed import read_omnimed
from internvl_chat.eval.benchmarks.pmc_mi import read_folder, read_pmc_mi
from internvl_chat.eval.benchmarks.vqa import read_vqa
from internvl_chat.utils.errors import DataError, UsageError

READERS: dict[str, Callable[[Path], Benchmark]] = {
    "pmc-mi": read_pmc_mi,
    "omnimedvqa": read_omnimed,
    "mmmu-med": read_mmmu,
    "vqa": read_vqa,
}
PROMPTS = Path(__file__).with_name("prompts.yaml")


def open_benchmark(name: str, data: Path | None) -> Benchmark:
    """Read a benchmark by name, or the user's own by its folder.

    Args:
        name: a key of `READERS`, or a folder in PMC-MI-Bench's format.
        data: where the named benchmark is.

    Raises:
        UsageError: the name is unknown, or the data are not where they are said to be.
        DataError: items cannot be used.
    """
    if name not in READERS:
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name, READERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--bench {name}: neither a folder nor one of {', '.join(READERS)}{hint}")
        if data is not None:
            raise UsageError(f"--bench {name} is a folder itself; leave out --data")
        return read_folder(Path(name))
    if data is None:
        raise UsageError(f"--bench {name} needs --data, where the benchmark is")
    if not data.exists():
        raise UsageError(f"--data {data}: no such file or folder")
    return READERS[name](data)


def system_texts(benchmark: Benchmark, file: Path | None = None) -> dict[str, str | None]:
    """Return the system text of each task; None stands for the checkpoint's own.

    Args:
        benchmark: whose tasks are asked.
        file: a YAML or JSON file of the user's instead of the package's: from the name of a task, or of
            the whole benchmark, to a text.

    Raises:
        DataError: the file cannot be read, is no such map, or names what the benchmark does not have.
    """
    texts = _read(file or PROMPTS)
    if file is not None:
        known = {*benchmark.tasks, benchmark.name, *_read(PROMPTS)}
        unknown = sorted(texts.keys() - known)
        if unknown:
            raise DataError(
                f"names no task of {benchmark.name}: {', '.join(unknown)}; its tasks are "
                f"{', '.join(benchmark.tasks)}",
                file=file,
            )
    return _by_task(benchmark.tasks, benchmark.name, texts)


def _by_task(tasks: Iterable[str], name: str, texts: Mapping[str, str]) -> dict[str, str | None]:
    return {task: texts.get(task, texts.get(name)) for task in tasks}


def _read(file: Path) -> dict[str, str]:
    import yaml

    try:
        texts = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot be read as YAML: {error}", file=file) from None
    if not isinstance(texts, dict) or not all(isinstance(t, str) for pair in texts.items() for t in pair):
        raise DataError("must map the names of tasks to system texts", file=file)
    return {name: text.strip() for name, text in texts.items()}
