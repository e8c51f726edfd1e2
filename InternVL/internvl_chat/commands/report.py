"""`m3llm report`: write an HTML report of one or several training runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from internvl_chat.commands.common import require_packages
from internvl_chat.commands.output import echo
from internvl_chat.utils.errors import UsageError

_COMPARISON = Path("comparison.html")
WATCH_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="OUTPUT_DIR",
        help="output folder of a run; several are overlaid",
    )
    add("--out", type=Path, metavar="FILE",
        help="HTML file to write (default: report.html in OUTPUT_DIR; comparison.html in the current folder "
        "for several runs)")  # fmt: skip
    add(
        "--watch",
        action="store_true",
        help="update the report while the runs continue; the page reloads itself (stop with Ctrl+C)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report; with `--watch`, update it until all runs have finished."""
    require_packages("report", "plotly", "jinja2")
    from internvl_chat.train.checkpoint.run_folder import REPORT
    from internvl_chat.train.report.page import write_report
    from internvl_chat.train.report.run import check_run_folders

    folders = list({folder.resolve(): folder for folder in reversed(args.runs)}.values())[::-1]
    check_run_folders(folders)
    file = args.out or (folders[0] / REPORT if len(folders) == 1 else _COMPARISON)
    _check_file(file)
    if args.watch:
        _watch(folders, file)
    else:
        write_report(folders, file)
    echo(f"report: {file}")
    return 0


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise UsageError(f"--out {file}: is a folder; pass an HTML file")
    if not file.parent.is_dir():
        raise UsageError(f"--out {file}: the folder {file.parent} does not exist")


def _watch(folders: Sequence[Path], file: Path) -> None:
    """Write the report whenever a log changes, until all runs have finished or Ctrl+C."""
    from internvl_chat.train.report.page import write_report
    from internvl_chat.train.report.run import file_times

    seen, pause = None, float(WATCH_SECONDS)
    try:
        while True:
            times = [file_times(folder) for folder in folders]
            if times != seen:
                start = time.perf_counter()
                runs = write_report(folders, file, refresh=WATCH_SECONDS)
                if all(run.finished for run in runs):
                    break
                if seen is None:
                    echo(f"watching: {file} (stop with Ctrl+C)")
                # Reading the logs of a long run must not slow it down.
                seen, pause = times, max(WATCH_SECONDS, 10 * (time.perf_counter() - start))
            time.sleep(pause)
    except KeyboardInterrupt:
        pass
    write_report(folders, file)
