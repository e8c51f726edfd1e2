"""Requests of the demo page. Each contains the entire conversation, because the server stores nothing."""

from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.records import Message
from internvl_chat.data.sources.uploads import MAX_IMAGES, MAX_PIXELS, decode_uploads
from internvl_chat.inference.conversation import Question, build_messages
from internvl_chat.inference.engine import Prompt
from internvl_chat.inference.sampling import MIN_TEMPERATURE, Sampling
from internvl_chat.utils.errors import DataError

MAX_QUESTIONS = 200
MAX_TEMPERATURE = 2.0


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, val_json_bytes="base64")


class AskedQuestion(_Request):
    """Text of a question, and the number of images that are added with it."""

    text: str
    images: int = Field(0, ge=0, le=MAX_IMAGES)


class _Conversation(_Request):
    """Questions of a conversation.

    Attributes:
        system: system prompt; None for that of the checkpoint.
        images: contents of the image files of all questions, in order.
    """

    system: str | None = None
    questions: list[AskedQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)
    images: list[bytes] = Field(max_length=MAX_IMAGES)

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        asked = sum(question.images for question in self.questions)
        if asked != len(self.images):
            raise ValueError(f"the questions have {asked} images, but {len(self.images)} were sent")
        return self

    def _messages(self, answers: list[str]) -> tuple[Message, ...]:
        questions = [Question(question.text, question.images) for question in self.questions]
        return build_messages(questions, answers, self.system)


class AnswerRequest(_Conversation):
    """Request to answer the last question.

    Attributes:
        model: index of the model.
        answers: this model's answers to the earlier questions.
        temperature: sampling temperature; 0 for greedy decoding.
    """

    model: int = Field(ge=0)
    answers: list[str]
    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE)
    max_new_tokens: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if len(self.answers) != len(self.questions) - 1:
            raise ValueError("each question before the last one must have an answer")
        if not self.questions[-1].text.strip():
            raise ValueError("the question is empty")
        return self

    @property
    def sampling(self) -> Sampling | None:
        """Sampling options; None for greedy decoding."""
        return Sampling(self.temperature) if self.temperature >= MIN_TEMPERATURE else None

    def prompt(self, options: ImageOptions) -> Prompt:
        """Return the prompt, with decoded images.

        Raises:
            DataError: a message or an image is unusable.
        """
        names = [f"Fig-{number}" for number in range(len(self.images))]
        return Prompt(self._messages(self.answers), tuple(decode_uploads(self.images, options, names)))


class ExportRequest(_Conversation):
    """Request to export a conversation.

    Attributes:
        answers: the answers of each model to the questions.
    """

    answers: list[list[str]]

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if any(len(answers) != len(self.questions) for answers in self.answers):
            raise ValueError("each question must have an answer")
        return self

    def conversations(self) -> list[tuple[Message, ...]]:
        """Return the messages of the conversation with each model.

        Raises:
            DataError: a message is unusable.
        """
        return [self._messages(answers) for answers in self.answers]


Side = Annotated[int, Field(ge=1, le=MAX_PIXELS)]


class PlanRequest(_Request):
    """Request for the tile grids of images, given their (width, height)."""

    sizes: list[tuple[Side, Side]] = Field(max_length=MAX_IMAGES)


T = TypeVar("T", bound=_Request)


def parse(kind: type[T], body: bytes) -> T:
    """Parse the body of a request.

    Raises:
        DataError: the body is invalid; the message describes the first error.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"invalid request: {f'{field}: ' if field else ''}{message}") from None
