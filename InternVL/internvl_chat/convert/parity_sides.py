"""Run an example through one checkpoint, by this package or by transformers' own classes.

Shapes: T tokens, N tiles, S pixels a side, P last positions of a conversation, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import GenerationConfig

from internvl_chat.constants import IM_END, IMAGE_PLACEHOLDER
from internvl_chat.data.encode.tiling import normalize_tiles, share_of_budget
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.problems import RecordProblem
from internvl_chat.data.sources.records import Message, Record
from internvl_chat.inference.engine import Engine, Prompt, last_question
from internvl_chat.model.attention import pinned_sdpa
from internvl_chat.model.io.folders import is_hf_format
from internvl_chat.utils.errors import DataError, ModelError

# Positions at the end of a conversation whose logits are compared.
POSITIONS = 32


@dataclass(frozen=True)
class Example:
    """A conversation as given to both sides.

    Attributes:
        key: its dataset and index.
        record: its last message is the assistant's, whose logits are compared (teacher forcing).
        images: all images of the record, in RGB.
        max_tiles: most tiles of all images; None for the checkpoint's own limit.
    """

    key: RecordKey
    record: Record
    images: tuple[Image.Image, ...]
    max_tiles: int | None

    @property
    def prompt(self) -> Prompt:
        """The conversation before the assistant's last message."""
        return last_question(self.record, self.images)[0]


@dataclass(frozen=True)
class Trace:
    """The results of an example.

    Attributes:
        input_ids: (T,) of the whole conversation.
        tiles: number of tiles of each image.
        pixels: (N, 3, S, S) float32.
        logits: (P, V) float32, at the last positions of the conversation.
        answer: greedy answer to the prompt.
    """

    input_ids: torch.Tensor
    tiles: tuple[int, ...]
    pixels: torch.Tensor
    logits: torch.Tensor
    answer: str


class Side(Protocol):
    """A loaded checkpoint."""

    def trace(self, example: Example, max_new_tokens: int) -> Trace:
        """Run an example."""
        ...


def open_side(
    folder: Path, *, device: torch.device, dtype: torch.dtype, base: str | Path | None = None
) -> Side:
    """Load a checkpoint: transformers' format with transformers' own classes, all others with ours."""
    if is_hf_format(folder):
        return TransformersSide(folder, device, dtype)
    return OwnSide(folder, device, dtype, base)


class OwnSide:
    """A checkpoint of any format, run by this package.

    Args:
        folder: the checkpoint.
        device: where it runs.
        dtype: of its weights.
        base: for adapters, where their base is now.
    """

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, base: str | Path | None
    ) -> None:
        self.engine = Engine.from_checkpoint(folder, device=device, dtype=dtype, base=base)
        self.encoder = self.engine.encoder

    @torch.inference_mode()
    def trace(self, example: Example, max_new_tokens: int) -> Trace:
        """Run an example.

        Raises:
            DataError: it cannot be encoded.
        """
        engine = self.engine
        engine.encoder = self.encoder.with_max_tiles(example.max_tiles)
        try:
            encoded = engine.encoder.encode(example.record.messages, [image.size for image in example.images])
            [answer] = engine.answer([example.prompt], max_new_tokens=max_new_tokens)
        except (RecordProblem, DataError) as problem:
            raise DataError(f"{example.key}: {problem}", record=example.record.id) from None
        tiles = engine.encoder.tiles(example.images, encoded.grids)
        embeddings = engine.embed(encoded, example.images).unsqueeze(0)
        with pinned_sdpa(engine.device):
            output = engine.model.language_model(
                inputs_embeds=embeddings, use_cache=False, logits_to_keep=POSITIONS
            )
        return Trace(
            input_ids=encoded.input_ids,
            tiles=tuple(grid.tiles for grid in encoded.grids),
            pixels=normalize_tiles(tiles, engine.encoder.preprocessing.normalize_type),
            logits=output.logits[0].float().cpu(),
            answer=answer,
        )


class TransformersSide:
    """A checkpoint of transformers' format, run by transformers' own model and processor.

    Images are resized by the processor's Pillow backend.

    Args:
        folder: the checkpoint.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ModelError: transformers cannot load it.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging as transformers_logging

        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"{folder}: transformers cannot load it: {error}") from error
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        self.model, self.device, self.dtype = model.to(device).eval(), device, dtype
        probe = [{"role": "user", "content": IMAGE_PLACEHOLDER}]
        self.reads_placeholders = self.processor.image_token in self.processor.apply_chat_template(probe)

    @torch.inference_mode()
    def trace(self, example: Example, max_new_tokens: int) -> Trace:
        """Run an example."""
        inputs = self._prepare(example, example.record.messages, example.images, answer_follows=False)
        pixels = inputs.get("pixel_values")
        with pinned_sdpa(self.device):
            output = self.model(**self._on_device(inputs), use_cache=False, logits_to_keep=POSITIONS)
        asked = example.prompt
        prompt = self._on_device(self._prepare(example, asked.messages, asked.images, answer_follows=True))
        end = self.processor.tokenizer.convert_tokens_to_ids(IM_END)
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        with pinned_sdpa(self.device):
            ids = self.model.generate(**prompt, generation_config=greedy)[0, prompt["input_ids"].shape[1] :]
        size = self.processor.image_processor.size
        return Trace(
            input_ids=inputs["input_ids"][0],
            tiles=self._tiles(inputs["input_ids"][0]),
            pixels=torch.zeros(0, 3, size["height"], size["width"]) if pixels is None else pixels,
            logits=output.logits[0].float().cpu(),
            answer=self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        )

    def _prepare(
        self,
        example: Example,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        *,
        answer_follows: bool,
    ) -> dict[str, Any]:
        """Make the inputs with the processor, which must be told that several images share the tile limit."""
        messages = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=answer_follows)
        limit = example.max_tiles or self.processor.image_processor.max_patches
        share = share_of_budget(limit, max(len(images), 1))
        fewest = min(self.processor.image_processor.min_patches, limit)
        return self.processor(
            images=list(images) or None,
            text=text,
            images_kwargs={"max_patches": share, "min_patches": fewest},
            return_tensors="pt",
        )

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        """Return a message as the chat template takes it; some know images only as parts of a message."""
        if self.reads_placeholders or message.role != "user" or IMAGE_PLACEHOLDER not in message.content:
            return message.content
        first, *others = message.content.split(IMAGE_PLACEHOLDER)
        parts = [{"type": "text", "text": first}] if first else []
        for text in others:
            # The template itself starts a new line after an image.
            parts += [{"type": "image"}, {"type": "text", "text": text.removeprefix("\n")}]
        return parts

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the inputs on the model's device, pixels in its dtype."""
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.dtype)
        return moved

    def _tiles(self, input_ids: torch.Tensor) -> tuple[int, ...]:
        """Count each image's tiles by its tokens after the image's start token."""
        processor = self.processor
        image_of_position = (input_ids == processor.start_image_token_id).cumsum(0)
        image_of_token = image_of_position[input_ids == processor.image_token_id]
        counts = torch.bincount(image_of_token)[1:].tolist()
        return tuple(count // processor.image_seq_length for count in counts)
