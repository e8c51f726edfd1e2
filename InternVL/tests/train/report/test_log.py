"""Warnings and errors in a training log."""

from internvl_chat.train.report.log import LogMessage, read_log


def messages(tmp_path, text: str) -> list[LogMessage]:
    (tmp_path / "log").write_bytes(text.encode("utf-8", "surrogateescape"))
    return read_log(tmp_path / "log")[0]


def test_severity_time_and_continuation_lines(tmp_path):
    text = (
        "10:00:00 INFO ready\n  a\n10:00:01 WARNING two problems:\n  1. a\n  2. b\nDownloading\n"
        "10:00:02 ERROR no\n"
    )
    assert messages(tmp_path, text) == [
        LogMessage("warning", "10:00:01", "two problems:\n  1. a\n  2. b"),
        LogMessage("error", "10:00:02", "no"),
    ]


def test_messages_that_differ_in_numbers_are_counted(tmp_path):
    lines = [
        f"10:00:{step:02} WARNING step {step}: the gradient norm is {step / 7:.3f}\n"
        for step in range(10, 60)
    ]
    assert messages(tmp_path, "".join(lines)) == [
        LogMessage("warning", "10:00:59", "step 59: the gradient norm is 8.429", 50)
    ]


def test_exception_of_a_traceback(tmp_path):
    text = (
        '10:00:00 WARNING w\nTraceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n'
        "torch.OutOfMemoryError: CUDA out of memory\n10:00:05 ERROR rank 0 failed with exit code 1\n"
    )
    assert [(m.severity, m.text) for m in messages(tmp_path, text)] == [
        ("warning", "w"),
        ("error", "torch.OutOfMemoryError: CUDA out of memory"),
        ("error", "rank 0 failed with exit code 1"),
    ]


def test_long_messages_are_cut(tmp_path):
    [message] = messages(tmp_path, "10:00:00 WARNING many\n" + "  x\n" * 1000)
    assert message.text.count("\n") == 19


def test_end_of_the_log(tmp_path):
    (tmp_path / "log").write_bytes(b"".join(b"line %d\n" % number for number in range(100)) + b"\xff\xfe")
    found, end = read_log(tmp_path / "log")
    assert found == [] and len(end) == 25 and end[:2] == ["line 76", "line 77"]


def test_no_log(tmp_path):
    assert read_log(tmp_path / "none") == ([], [])
