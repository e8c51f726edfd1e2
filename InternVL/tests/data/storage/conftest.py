"""Fixtures of the tests of object storage."""

import pytest
from s3_server import S3Server, connect, require_packages


@pytest.fixture(scope="session")
def _server(tmp_path_factory):
    require_packages()
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(_server, monkeypatch, tmp_path):
    """A loopback S3 server; skips the test if a package is missing."""
    connect(_server, monkeypatch, tmp_path / "cache")
    _server.requests()
    return _server


@pytest.fixture
def remote():
    """Skip the test if the packages of the extra `remote` are missing."""
    require_packages()
