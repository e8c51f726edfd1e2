"""Loopback S3 server for tests: moto in a separate process that logs requests and can simulate an outage.

    python s3_server.py PORT LOG [FILE LINES]

The process exits without a response when an object is requested and FILE has at least LINES lines.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

BUCKET = "figures"
KEY, SECRET = "loopback-access-key", "loopback-secret-key"
_START_SECONDS = 120


def require_packages() -> None:
    missing = [name for name in ("moto", "flask_cors", "s3fs", "tenacity") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'm3llm[remote]' 'moto[s3]' flask flask-cors")


class S3Server:
    """A server that is started and stopped; its objects are lost when it stops."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "requests.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self, *exits_at: object) -> None:
        argv = [sys.executable, __file__, str(self.port), str(self.log), *map(str, exits_at)]
        self.process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.put("")
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, "the S3 server did not start"
                time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def put(self, name: str, content: bytes = b"") -> None:
        """Create the bucket, or an object in it, with a plain HTTP request."""
        url = f"{self.url}/{BUCKET}/{urllib.request.quote(name)}"
        # moto checks neither the key nor the signature, but only an owner may replace an object.
        owner = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, Signature=0"
        headers = {"Content-Type": "application/octet-stream", "Authorization": owner}
        with urllib.request.urlopen(urllib.request.Request(url, content, headers, method="PUT")):
            pass

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload all files of a folder and return their URL."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def requests(self) -> list[str]:
        """Return `METHOD /path?query range` of each request since the last call."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


def connect(server: S3Server, monkeypatch, cache: Path) -> None:
    """Configure this process to use the server, with an empty cache."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("M3LLM_CACHE", str(cache))
    forget_connections()


def forget_connections() -> None:
    """Make the next request read the environment variables again."""
    import s3fs

    from internvl_chat.data.storage import stores, urls

    s3fs.S3FileSystem.clear_instance_cache()
    urls._filesystem.cache_clear()
    stores._open_url.cache_clear()


def _serve(port: str, log: str, exits_at: list[str]) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def answer(environ, start_response):
        with open(log, "a", encoding="utf-8") as stream:
            query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
            span = environ.get("HTTP_RANGE", "")
            stream.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query} {span}".strip() + "\n")
        if exits_at and environ["REQUEST_METHOD"] == "GET" and not environ["QUERY_STRING"]:
            file, lines = Path(exits_at[0]), int(exits_at[1])
            if file.is_file() and len(file.read_bytes().splitlines()) >= lines:
                os._exit(1)
        return application(environ, start_response)

    make_server("127.0.0.1", int(port), answer, threaded=True).serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], sys.argv[3:])
