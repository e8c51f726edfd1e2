"""Answer prompts that contain text and any number of images.

Shapes: T tokens, C hidden size, N tiles, K tokens per tile, F vision features per token.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.constants import IM_END, IMAGE_PLACEHOLDER
from internvl_chat.data.encode.encoder import EncodedConversation, RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import decode_answer, image_context_id, load_tokenizer, token_id
from internvl_chat.data.sources.image_content import orientation, turned_size
from internvl_chat.data.sources.images import open_images
from internvl_chat.data.sources.record_warnings import question_warnings
from internvl_chat.data.sources.records import Message, Record, RecordError
from internvl_chat.inference.conversation import place_images
from internvl_chat.inference.decoding import Decoder
from internvl_chat.inference.devices import AUTO, default_dtype, find_device, place
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.streaming import AnswerText
from internvl_chat.inference.tile_features import tile_features
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.io.folders import model_folder, read_config
from internvl_chat.model.kernels.apply import apply_kernels
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)


class Reply(str):
    """Text of an answer.

    Attributes:
        truncated: whether the answer was cut off at the maximum number of tokens.
    """

    truncated: bool

    def __new__(cls, text: str, *, truncated: bool = False) -> "Reply":
        """Create an answer from its text."""
        reply = super().__new__(cls, text)
        reply.truncated = truncated
        return reply


def is_truncated(answer: str) -> bool:
    """Return whether an answer is a `Reply` that was cut off."""
    return isinstance(answer, Reply) and answer.truncated


@dataclass(frozen=True)
class Prompt:
    """Conversation for the assistant to continue.

    Attributes:
        messages: messages of the conversation; the user messages contain one placeholder per image.
        images: images in the order of their placeholders.
    """

    messages: Sequence[Message]
    images: Sequence[Image.Image] = ()

    def then(self, answer: str, question: str) -> "Prompt":
        """Return the conversation extended by an answer and a follow-up question about the same images."""
        return Prompt((*self.messages, Message("assistant", answer), Message("user", question)), self.images)


def ask(question: str, images: Sequence[Image.Image] = (), system: str | None = None) -> Prompt:
    """Return a prompt with one question.

    If the question has no placeholders, one per image is inserted before it. Multiple images are labeled
    `Fig-0`, `Fig-1`, ..., as in the training data. If `system` is None, the checkpoint's system prompt is
    used.

    Raises:
        DataError: the question contains only placeholders of another framework, such as `<image 1>`.
    """
    labels = [""] if len(images) == 1 else [f"Fig-{i}: " for i in range(len(images))]
    messages = () if system is None else (Message("system", system),)
    return Prompt((*messages, Message("user", place_images(question, labels))), tuple(images))


def last_question(record: Record, images: Sequence[Image.Image]) -> tuple[Prompt, str]:
    """Return the conversation before a record's last supervised answer as a prompt, and this answer.

    The answer is normalized to NFC, like all text that the tokenizer encodes.
    """
    last = max(i for i, m in enumerate(record.messages) if m.role == "assistant" and m.supervised)
    messages = record.messages[:last]
    shown = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages if message.role == "user")
    return Prompt(messages, tuple(images[:shown])), unicodedata.normalize(
        "NFC", record.messages[last].content
    )


class Engine:
    """Generates answers with a model, its tokenizer and its preprocessing.

    An answer depends only on its prompt, not on the other prompts in a batch (see `decoding`).

    Args:
        model: model on its final device; set to evaluation mode.
    """

    def __init__(
        self, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder = RecordEncoder(tokenizer, preprocessing)
        self.end_id = token_id(tokenizer, IM_END)
        # Tiles of the last prompt with images, and their features.
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_checkpoint(
        cls,
        path_or_id: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        base: str | Path | None = None,
        max_dynamic_patch: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> "Engine":
        """Load a checkpoint in any supported format.

        Args:
            path_or_id: folder or Hub id.
            device: `cpu`, `cuda:0`, ..., or `auto` to use all GPUs (default: GPU of this rank if available).
            dtype: dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU).
            base: new path or Hub id of an adapter's base model, if it has moved.
            max_dynamic_patch: maximum number of tiles per prompt (default: from the checkpoint); ignored if
                `preprocessing` is given.
            preprocessing: preprocessing options (default: from the checkpoint).
        """
        folder = model_folder(path_or_id)
        first = find_device(None if device == AUTO else device)
        tokenizer, _ = load_tokenizer(folder)
        model = load_model(
            folder,
            image_context_id=image_context_id(tokenizer),
            dtype=dtype or default_dtype(device),
            attn="sdpa",
            base=base,
        )
        apply_kernels(model, first)
        if preprocessing is None:
            preprocessing = Preprocessing.from_folder(
                folder, read_config(folder), max_dynamic_patch=max_dynamic_patch
            )
        return cls(place(model, device), tokenizer, preprocessing)

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return self.model.language_model.get_input_embeddings().weight.device

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        return self.model.language_model.config.max_position_embeddings

    def generate_ids(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 512, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return the token ids of the answer to each prompt, without `<|im_end|>`.

        All prompts are validated before the first one is answered.

        Args:
            sampling: sampling options; None for greedy decoding.

        Raises:
            DataError: a prompt exceeds the token limit, or its numbers of placeholders and images differ.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        inputs = (self.embed(e, prompt.images) for prompt, e in zip(prompts, encoded, strict=True))
        decoder = self.decoder()
        for index, token in decoder.run(inputs, max_new_tokens=max_new_tokens, sampling=sampling):
            if token is not None:
                answers[index].append(token)
        return answers

    def chat(
        self,
        question: str,
        images: Sequence[Image.Image | str | Path] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
    ) -> str:
        """Return the answer to one question; see `ask`.

        Args:
            question: the question, with or without image placeholders.
            images: decoded images or paths to image files.
            system: system prompt (default: from the checkpoint).
            max_new_tokens: maximum number of tokens of the answer.
            sampling: sampling options; None for greedy decoding.

        Raises:
            DataError: an image cannot be read, the prompt exceeds the token limit, or the numbers of
                placeholders and images differ.
        """
        opened = [
            image
            if isinstance(image, Image.Image)
            else open_images([image], self.encoder.preprocessing.image_options)[0]
            for image in images
        ]
        self.log_warnings(question)
        [answer] = self.answer(
            [ask(question, opened, system)], max_new_tokens=max_new_tokens, sampling=sampling
        )
        return answer

    def log_warnings(self, question: str) -> None:
        """Warn about unsupported placeholders and unescaped control tokens in a question."""
        escaped = self.encoder.preprocessing.escape_control_tokens
        for warning in question_warnings(question, escaped=escaped):
            logger.warning("%s", warning)

    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 512, sampling: Sampling | None = None
    ) -> list[Reply]:
        """Return the answer to each prompt as text; see `generate_ids`."""
        ids = self.generate_ids(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        return [self._reply(answer, max_new_tokens) for answer in ids]

    def answer_each(
        self, prompts: Iterable[Prompt], *, max_new_tokens: int = 512
    ) -> Iterator[tuple[int, Reply]]:
        """Yield greedily decoded answers to a stream of prompts, reading one prompt ahead.

        Yields:
            (prompt index, answer), in order of completion.
        """
        answers: dict[int, list[int]] = {}
        inputs = (self.embed(self.encode(prompt), prompt.images) for prompt in prompts)
        for index, token in self.decoder().run(inputs, max_new_tokens=max_new_tokens):
            ids = answers.setdefault(index, [])
            if token is None:
                yield index, self._reply(answers.pop(index), max_new_tokens)
            else:
                ids.append(token)

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 512, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Yield the answer to a prompt in pieces; concatenated, they match the result of `answer`."""
        embeddings = self.embed(self.encode(prompt), prompt.images)
        text = AnswerText(self.tokenizer)
        run = self.decoder().run([embeddings], max_new_tokens=max_new_tokens, sampling=sampling)
        for _, token in run:
            if piece := text.finish() if token is None else text.add(token):
                yield piece

    def embed(self, encoded: EncodedConversation, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the embeddings of an encoded conversation, with its image features inserted, (T, C)."""
        return self.embed_tiles(encoded, self.encoder.tiles(images, encoded.grids))

    @torch.no_grad()
    def embed_tiles(self, encoded: EncodedConversation, tiles: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of an encoded conversation, given its tiles (N, S, S, 3) in uint8."""
        features = self._features(tiles)
        return self.model.embed(encoded.input_ids.unsqueeze(0).to(self.device), vision_features=features)[0]

    def _reply(self, ids: list[int], max_new_tokens: int) -> Reply:
        # `ids` excludes the end token, so an answer of the maximum length did not reach it.
        return Reply(decode_answer(self.tokenizer, ids), truncated=len(ids) == max_new_tokens)

    def decoder(self) -> Decoder:
        """Return a decoder for a batch of answers."""
        return Decoder(self.model.language_model, end_id=self.end_id)

    def encode(self, prompt: Prompt) -> EncodedConversation:
        """Return the token ids of a prompt and the tile grids of its images.

        Raises:
            DataError: the prompt exceeds the token limit, or its numbers of placeholders and images differ.
        """
        placeholders = sum(t.content.count(IMAGE_PLACEHOLDER) for t in prompt.messages if t.role == "user")
        if placeholders != len(prompt.images):
            raise DataError(
                f"{counted(placeholders, f'{IMAGE_PLACEHOLDER} placeholder')}, but "
                f"{counted(len(prompt.images), 'image')}"
            )
        options = self.encoder.preprocessing.image_options
        sizes = [turned_size(image.size, orientation(image), options) for image in prompt.images]
        try:
            return self.encoder.encode_prompt(prompt.messages, sizes)
        except RecordError as problem:
            raise DataError(str(problem)) from None

    def _features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the vision features (N, K, F) of tiles.

        The last features are cached, so a follow-up question about the same images skips the vision tower.
        """
        if self._latest is not None and torch.equal(tiles, self._latest[0]):
            return self._latest[1]
        normalization = self.encoder.preprocessing.normalize_type
        features = tile_features(self.model, tiles.to(self.device), normalization)
        if len(tiles):
            self._latest = tiles, features
        return features
