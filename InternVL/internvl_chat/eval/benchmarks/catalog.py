"""Benchmarks by name, and the system texts of their tasks."""

import difflib
from collections.abc import Callable
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
    """Read a benchmark.

    Args:
        name: key of `READERS`, or a folder in the format of PMC-MI-Bench.
        data: file or folder of a named benchmark.

    Raises:
        UsageError: the name is unknown, or the data do not exist.
        DataError: items are invalid.
    """
    if name not in READERS:
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name, READERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--bench {name}: neither a folder nor one of {', '.join(READERS)}{hint}")
        if data is not None:
            raise UsageError(f"--bench {name} is a folder; remove --data")
        return read_folder(Path(name))
    if data is None:
        raise UsageError(f"--bench {name} needs --data, the location of the benchmark")
    if not data.exists():
        raise UsageError(f"--data {data}: no such file or folder")
    return READERS[name](data)


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
        known = {*benchmark.tasks, benchmark.name, *_read(PROMPTS)}
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
