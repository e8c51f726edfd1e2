"""torchrun wrapper: forwards signals to the workers, writes the log, and returns the workers' exit code.

`python -m internvl_chat.train.distributed.launch --nproc_per_node 2 SCRIPT --output_dir DIR ...` accepts
torchrun's flags. With `--output_dir`, all output is also written to `training_log.txt` in that folder.
"""

import argparse
import contextlib
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from internvl_chat.train.distributed.signals import EXIT_CODE, LAUNCHER, SIGNALS, STOPPING, exit_code
from internvl_chat.utils.logging import configure_logging, get_logger

logger = get_logger("internvl_chat.train.distributed.launch")  # __name__ is `__main__` here


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun and log its output.

    Returns:
        0, or 128 + n if training was stopped by signal n, or the exit code of the rank that failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    configure_logging()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=lambda value: Path(value).expanduser())
    folder = parser.parse_known_args(argv)[0].output_dir
    if folder is None:
        return _launch(argv)
    log, created = folder / "training_log.txt", not folder.exists()
    results = folder / "train_results.json"
    finished, had_log = _stamp(results), log.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log_file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        logger.error("cannot write to the output folder: %s", error)
        return 2
    os.environ.setdefault("WANDB_DIR", str(folder))
    with _logged_to(log_file, results):
        code = _launch(argv)
    if not had_log and _is_unchanged(results, finished):
        log.unlink(missing_ok=True)
    if code and created:
        _delete_unused(folder, log)
    if code and not folder.exists():
        logger.error("training did not start (exit code %d)", code)
    elif code and _is_unchanged(results, finished):
        logger.error("training did not start (exit code %d); %s is unchanged", code, folder)
    elif code in map(exit_code, SIGNALS):
        logger.error("stopped by a signal (exit code %d); see %s for how to resume", code, log)
    elif code:
        logger.error("training failed with exit code %d; see %s", code, log)
    return code


def _delete_unused(folder: Path, log: Path) -> None:
    """Delete an output folder that contains only the log."""
    with contextlib.suppress(OSError):  # the launcher of another node may have deleted it
        if list(folder.iterdir()) == [log]:
            log.unlink()
            folder.rmdir()


def _stamp(results: Path) -> int | None:
    """Return the modification time of the results file, which a finished run has; None if it is missing."""
    try:
        return results.stat().st_mtime_ns
    except OSError:
        return None


def _is_unchanged(results: Path, stamp: int | None) -> bool:
    """Return whether the results file exists and still has the modification time `stamp` (from `_stamp`)."""
    return stamp is not None and _stamp(results) == stamp


@contextlib.contextmanager
def _logged_to(log: int, results: Path) -> Iterator[None]:
    """Within the context, a child process copies all output to the terminal and to a log file.

    The log of a finished run does not change unless a new run starts. The child ignores stop signals, so
    workers can still print while they save, even if the launcher has been killed.
    """
    originals = os.dup(1), os.dup(2)
    source, pipe = os.pipe()
    writer = os.fork()
    if not writer:
        try:
            for number in (signal.SIGHUP, signal.SIGQUIT, *SIGNALS):
                signal.signal(number, signal.SIG_IGN)
            os.close(pipe)
            _copy(source, 1, log, results)
        finally:
            os._exit(0)
    if os.isatty(1):
        os.environ["M3LLM_TERMINAL"] = "1"  # the workers only see a pipe
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    for file in (source, pipe, log):
        os.close(file)
    try:
        yield
    finally:
        os.dup2(originals[0], 1)
        os.dup2(originals[1], 2)
        for _ in range(1000):  # at most 10 s, because an orphaned process may keep the pipe open
            if os.waitpid(writer, os.WNOHANG)[0]:
                break
            time.sleep(0.01)


def _copy(source: int, terminal: int, log: int, results: Path) -> None:
    """Copy output to the terminal and the log; the log omits text overwritten after a carriage return.

    Args:
        results: results file of a finished run; nothing is logged while it exists unchanged.
    """
    line, held, finished = b"", b"", _stamp(results)
    while data := os.read(source, 1 << 16):
        _write(terminal, data)
        *lines, line = (text[text.rfind(b"\r", 0, -1) + 1 :] for text in (line + data).split(b"\n"))
        held += b"".join(text.rstrip(b"\r") + b"\n" for text in lines)
        if not _is_unchanged(results, finished):
            _write(log, held)
            held = b""
    if not _is_unchanged(results, finished):
        _write(log, held + (line + b"\n" if line else b""))


def _write(file: int, data: bytes) -> None:
    """Write data, ignoring errors: a full disk or a closed terminal must not stop the run."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(file, data) :]


def _launch(argv: list[str]) -> int:
    """Run torchrun in a thread, so that the main thread can handle signals; return the exit code."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()

    def forward(number: int, *_: object) -> None:
        sent = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        os.environ[STOPPING] = sent.name
        workers = 0
        for child in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(child.pid) == child.pid:  # a worker: torchrun starts each in its own session
                    os.kill(child.pid, sent)
                    workers += 1
        if not workers:
            codes.put(exit_code(sent))

    with tempfile.TemporaryDirectory(prefix="m3llm-") as folder:
        note = Path(folder) / "exit_code"
        os.environ |= {LAUNCHER: str(os.getpid()), EXIT_CODE: str(note), STOPPING: ""}
        for number in (signal.SIGHUP, *SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, forward)
        threading.Thread(target=lambda: codes.put(_run_torchrun(argv)), daemon=True).start()
        code = codes.get()
        if not code and note.is_file():
            code = int(note.read_text(encoding="utf-8"))
        return code


def _run_torchrun(argv: list[str]) -> int:
    """Run torchrun and return its exit code; log failures that the workers cannot log themselves."""
    # Imported after the fork, because importing torch starts threads.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # With a shared store, restarted workers would read stale addresses from the previous attempt.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0 and not os.environ[STOPPING]:
            logger.error("rank %d was killed by %s", rank, signal.Signals(-code).name)
        elif code > 2:
            logger.error("rank %d failed with exit code %d", rank, code)
        return code if code > 0 else 128 - code
    except SystemExit as error:  # from its argument parser
        return int(error.code or 0)
    except Exception as error:
        logger.error("torchrun failed: %s: %s", type(error).__name__, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
