"""URLs of object storage: valid and invalid ones, and messages without credentials."""

import pytest

from internvl_chat.data.storage import urls
from internvl_chat.data.storage.urls import check_url, filesystem, redact
from internvl_chat.utils.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/a/b//", "s3://bucket/a/b"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("hf://datasets/me/figures@main/images", "hf://datasets/me/figures@main/images"),
    ],
)
def test_accepted(url, expected):
    assert check_url(url) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/images", "https://host/images: the scheme is not one of s3://, gs://, hf://"),
        ("file:///data", "give the path without file://"),
        ("s3://", "s3://: the bucket is missing"),
        ("s3:///", "the bucket is missing"),
        ("s3://user:hunter22@bucket/a", "s3://***@bucket/a: a URL must not contain credentials"),
        ("s3://bucket/a?X-Amz-Signature=hunter22", "s3://bucket/a?***: a URL must not contain credentials"),
        ("s3://bucket/a#b", "a URL must not contain credentials or options"),
    ],
)
def test_rejected(url, message):
    with pytest.raises(DataError) as caught:
        check_url(url)
    assert message in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_redact_known_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    assert redact("key wJalrXUtnFEMI at s3://b/c is wrong?") == "key *** at s3://b/c is wrong?"


def test_missing_package(monkeypatch):
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    urls._filesystem.cache_clear()
    for url, command in (
        ("s3://b/a", r"s3fs: pip install 'm3llm\[remote\]'"),
        ("gs://b/a", "gcsfs: pip install gcsfs"),
    ):
        with pytest.raises(UsageError, match=command):
            filesystem(url)
