"""Client of an OpenAI-compatible endpoint."""

import http.client
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from PIL import Image

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.records import Message
from internvl_chat.inference.engine import Prompt
from internvl_chat.utils.errors import DataError, ModelError, UsageError
from internvl_chat.utils.html import image_data_url

# The first request may wait until the server has compiled its kernels.
_TIMEOUT_SECONDS = 600
_MAX_MESSAGE_LENGTH = 300


class EndpointAnswer(NamedTuple):
    """Answer of an endpoint.

    Attributes:
        prompt_tokens: number of tokens of the prompt; None if the endpoint does not report it.
    """

    text: str
    prompt_tokens: int | None


class Endpoint:
    """Client of an OpenAI-compatible endpoint.

    Args:
        url: for example http://localhost:8000 or http://localhost:8000/v1.
        api_key: key of the endpoint, if it needs one.
        model: name of the model (default: the only one of the endpoint).

    Raises:
        UsageError: the URL or the key is invalid, or the endpoint has several models.
        ModelError: the endpoint cannot be reached, or is not OpenAI-compatible.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        _check_url(url)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(
                "the API key contains characters other than printable ASCII, such as a line break"
            )
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            names = [model["id"] for model in self._request("/models")["data"]]
        except DataError as error:
            raise ModelError(f"{self.url}: {error}") from None
        except (LookupError, TypeError):
            raise self._incompatible("/models") from None
        if len(names) != 1:
            count = len(names)
            raise UsageError(f"{self.url} has {count} models; choose one with --served_model_name: {names}")
        return names[0]

    def answer(self, prompt: Prompt, max_new_tokens: int) -> EndpointAnswer:
        """Return the greedy answer to a prompt.

        Raises:
            DataError: the endpoint rejects the prompt.
            ModelError: the endpoint cannot be reached, or is not OpenAI-compatible.
        """
        body = {
            "model": self.model,
            "messages": chat_messages(prompt),
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        reply = self._request("/chat/completions", body)
        try:
            text = (reply["choices"][0]["message"]["content"] or "").strip()
            tokens = (reply.get("usage") or {}).get("prompt_tokens")
        except (LookupError, TypeError, AttributeError):
            raise self._incompatible("/chat/completions") from None
        return EndpointAnswer(text, tokens if isinstance(tokens, int) else None)

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            message = f"HTTP status {error.code}: {_error_message(error.read())}"
            if error.code in (401, 403):
                raise ModelError(f"{self.url}: {message}; pass the key with --api_key") from None
            raise DataError(message) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ModelError(f"{self.url} cannot be reached: {reason}") from None
        except (ValueError, RecursionError):
            raise self._incompatible(path) from None

    def _incompatible(self, path: str) -> ModelError:
        return ModelError(f"{self.url}{path}: the response is not OpenAI-compatible")


def _check_url(url: str) -> None:
    """Check the URL of an endpoint.

    Raises:
        UsageError: the URL is invalid, or contains a key.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UsageError(f"--endpoint {url}: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"--endpoint {url}: must begin with http:// or https://")
    if parts.username or parts.password:
        raise UsageError("--endpoint: pass the key with --api_key instead of the URL")


def _error_message(body: bytes) -> str:
    """Return the message in the body of an error response."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found["message"]
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return f"{text:.{_MAX_MESSAGE_LENGTH}}"


def as_parts(prompt: Prompt) -> Prompt:
    """Return a prompt with a newline after each image, as an endpoint renders content parts."""
    messages = []
    for message in prompt.messages:
        content = message.content
        if message.role == "user":
            first, *others = content.split(IMAGE_PLACEHOLDER)
            for text in others:
                first += f"{IMAGE_PLACEHOLDER}\n" + text.removeprefix("\n")
            content = first
        messages.append(Message(message.role, content))
    return Prompt(messages, prompt.images)


def chat_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt in OpenAI's format; each placeholder becomes an image part with a lossless data URL."""
    urls, messages = iter(map(_data_url, prompt.images)), []
    for message in prompt.messages:
        content: str | list[dict[str, Any]] = message.content
        if message.role == "user" and IMAGE_PLACEHOLDER in message.content:
            first, *others = message.content.split(IMAGE_PLACEHOLDER)
            content = _text_parts(first)
            for text in others:
                content.append({"type": "image_url", "image_url": {"url": next(urls)}})
                content += _text_parts(text.removeprefix("\n"))
        messages.append({"role": message.role, "content": content})
    return messages


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image_data_url(buffer.getvalue(), "png")
