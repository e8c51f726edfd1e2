"""Requests to object storage: repeated for a limited time, with bounded waits; messages without secrets."""

import http.server
import threading
import time

import pytest

from internvl_chat.data.storage.transfer import download, file_state, list_files, request, retry_seconds
from internvl_chat.utils.errors import StorageError, UsageError

URL = "s3://figures/a.jpg"


@pytest.fixture
def clock(monkeypatch):
    """Sleep without waiting; return the waits. Threads that earlier tests left behind sleep as usual."""
    waits, now = [], time.monotonic()
    real_sleep, thread = time.sleep, threading.get_ident()

    def sleep(seconds):
        if threading.get_ident() == thread:
            waits.append(seconds)
        else:
            real_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now + sum(waits))
    return waits


class AnswerBusy(http.server.BaseHTTPRequestHandler):
    """Answers that requests come too fast, which s3fs and botocore would repeat."""

    requests = 0

    def do_GET(self):
        AnswerBusy.requests += 1
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Flaky:
    """Fails with the given errors, then returns the number of calls."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def test_transient_errors_are_repeated(remote, clock):
    assert request(URL, Flaky(ConnectionError("reset"), TimeoutError(), OSError("5xx"))) == 4
    assert len(clock) == 3
    assert all(0 <= wait <= 2**number for number, wait in enumerate(clock))


def test_waits_are_bounded_and_differ(remote, clock, monkeypatch):
    monkeypatch.setenv("M3LLM_RETRY_SECONDS", "600")
    with pytest.raises(StorageError) as caught:
        request(URL, Flaky(*[ConnectionError("refused")] * 1000))
    assert 600 <= sum(clock) <= 630
    assert max(clock) <= 30
    assert len(set(clock)) == len(clock) > 20
    assert f"{URL} cannot be read after {len(clock) + 1} attempts in" in str(caught.value)
    assert "refused; check the network" in str(caught.value)


def test_waits_are_logged_less_and_less(remote, clock, monkeypatch, caplog):
    request(URL, Flaky(*[ConnectionError("https://me:hunter22@host/?sig=hunter22 refused")] * 9))
    attempts = [record.args[1] for record in caplog.records]
    assert attempts == [1, 2, 4, 8]
    assert "hunter22" not in caplog.text


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), ValueError("Invalid bucket name")])
def test_denied_is_not_repeated(remote, clock, error):
    action = Flaky(error)
    with pytest.raises(StorageError, match=f"{error}; check the URL, and the credentials"):
        request(URL, action)
    assert action.calls == 1


@pytest.mark.parametrize("error", [FileNotFoundError("a"), IsADirectoryError("a")])
def test_missing_is_not_repeated(remote, clock, error):
    action = Flaky(error)
    with pytest.raises(FileNotFoundError):
        request(URL, action)
    assert action.calls == 1


def test_bugs_are_not_hidden(remote, clock):
    with pytest.raises(TypeError):
        request(URL, Flaky(TypeError("bug")))


def test_no_credentials(remote, clock):
    from botocore.exceptions import NoCredentialsError

    with pytest.raises(
        StorageError, match="Unable to locate credentials; check the URL, and the credentials"
    ):
        request(URL, Flaky(NoCredentialsError()))


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_invalid_limit(monkeypatch, value):
    monkeypatch.setenv("M3LLM_RETRY_SECONDS", value)
    with pytest.raises(UsageError, match=f"M3LLM_RETRY_SECONDS is '{value}'"):
        retry_seconds()


def test_requests_of_a_server(s3):
    for number in range(3):
        s3.put(f"transfer/a/{number} #%é.jpg", b"0123456789")
    s3.put("transfer/top.jpg", b"0")
    s3.requests()
    folder, first = "s3://figures/transfer", "a/0 #%é.jpg"
    states = list_files(folder)
    assert set(states) == {"top.jpg", *(f"a/{number} #%é.jpg" for number in range(3))}
    assert len(s3.requests()) == 1
    assert set(list_files(folder, nested=False)) == {"top.jpg"}
    assert list_files("s3://figures/nowhere") == {}
    s3.requests()
    assert file_state(f"{folder}/{first}") == states[first]
    assert download(f"{folder}/{first}", 2, 3) == b"234"
    assert [line.split()[0] for line in s3.requests()] == ["HEAD", "GET"]
    for missing in ("nowhere.jpg", "a"):
        with pytest.raises(FileNotFoundError):
            file_state(f"{folder}/{missing}")
    s3.put(f"transfer/{first}", b"9876543210")
    assert file_state(f"{folder}/{first}") != states[first]


def test_ranges_after_the_end(s3):
    s3.put("transfer/short.jpg", b"0123456789")
    assert download("s3://figures/transfer/short.jpg", 7, 20) == b"789"
    assert download("s3://figures/transfer/short.jpg", 10, 20) == b""


def test_only_this_package_repeats_requests(s3, monkeypatch):
    """Retries inside s3fs or botocore would delay the message about storage that does not answer."""
    monkeypatch.setenv("M3LLM_RETRY_SECONDS", "0")
    monkeypatch.setattr(AnswerBusy, "requests", 0)
    server = http.server.HTTPServer(("127.0.0.1", 0), AnswerBusy)
    threading.Thread(target=server.serve_forever).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StorageError, match="after 1 attempt"):
            download(URL, 0, 10)
    finally:
        server.shutdown()
        server.server_close()
    assert AnswerBusy.requests == 1
