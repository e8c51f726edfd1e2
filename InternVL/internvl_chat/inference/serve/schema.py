"""Requests of OpenAI's chat completions API. Unsupported parameters are rejected, not ignored."""

import reprlib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from internvl_chat.inference.sampling import MIN_TEMPERATURE, Sampling
from internvl_chat.utils.errors import format_problems

_MAX_PROBLEMS = 10


class _Model(BaseModel):
    """Base class: unset values (null) are dropped, and unknown parameters are rejected.

    Attributes:
        no_effect: values of unsupported parameters that are accepted, because they have no effect.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None and v not in cls.no_effect.get(k, ())}


class TextPart(_Model):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Model):
    """Image as a data URL."""

    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {"detail": ("auto",)}
    url: str


class ImagePart(_Model):
    """Image in a user message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Model):
    """Message of a conversation."""

    # Empty fields that OpenAI's client adds to answers, which conversations send back.
    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(max_length=1000)

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Model):
    """Body of a request to /v1/chat/completions."""

    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "top_k": (0, -1),
        "min_p": (0,),
        "logprobs": (False,),
        "logit_bias": ({},),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "store": (False,),
        "metadata": ({},),
    }
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=4)
    user: str | None = None  # does not affect the answer

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; use one of them")
        if self.top_p not in (None, 1) and self.temperature is None:
            raise ValueError("top_p requires temperature; without it, decoding is greedy")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options requires stream")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of tokens of the answer; None for the server's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def sampling(self) -> Sampling | None:
        """Sampling options; None for greedy decoding, the default."""
        if self.temperature is None or self.temperature < MIN_TEMPERATURE:
            return None
        return Sampling(self.temperature, self.top_p or 1.0, self.seed)


def describe_errors(error: ValidationError) -> tuple[str, str | None]:
    """Return a message about the errors of a request, and the name of the first invalid parameter."""
    found = error.errors(include_url=False)
    name = next((str(part["loc"][0]) for part in found if part["loc"]), None)
    message = format_problems([_describe(part) for part in found[:_MAX_PROBLEMS]])
    if len(found) > _MAX_PROBLEMS:
        message += f"\n  and {len(found) - _MAX_PROBLEMS} more"
    return message, name


def _describe(error: ErrorDetails) -> str:
    kind, location, context = error["type"], error["loc"], error.get("ctx", {})
    if kind == "json_invalid":
        return f"the request is not valid JSON: {context['error']}"
    # The type of a content part follows its index, because it selects the class.
    parts = [part for i, part in enumerate(location) if i != 4]
    name, value = ".".join(map(str, parts)), reprlib.repr(error["input"])
    match kind:
        case "extra_forbidden":
            accepted = ChatRequest.no_effect.get(name)
            values = f" ({value}; supported: {', '.join(map(repr, accepted))})" if accepted else ""
            return f"the parameter {name!r} is not supported{values}"
        case "model_type" | "model_attributes_type":
            return f"{name or 'the request'} must be a JSON object, found {value}"
        case "missing":
            return f"the parameter {name!r} is missing"
        case "union_tag_not_found":
            return f"{name}: {context['discriminator']} is missing"
        case "union_tag_invalid":
            found = f"{context['discriminator']} {context['tag']!r:.80}"
            return f"{name}: {found} is not supported; supported: {context['expected_tags']}"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
    return f"{name}: {error['msg'].replace('Input should', 'must')}, found {value}"
