"""Run examples through a checkpoint with this package or with transformers' own classes.

Shapes: T tokens, N tiles, S pixels per side, P = min(T, POSITIONS) last positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig

from internvl_chat.constants import IM_END, IMAGE_PLACEHOLDER
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.tiling import normalize_tiles, tiles_per_image
from internvl_chat.data.encode.tokenizer import decode_answer
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.data.sources.records import Message, Record
from internvl_chat.inference.engine import Engine, Prompt, last_question
from internvl_chat.model.attention import pinned_sdpa
from internvl_chat.model.io.folders import is_hf_format
from internvl_chat.model.io.weights import describe_non_finite, non_finite_error
from internvl_chat.utils.errors import DataError, ModelError

# Number of positions at the end of a conversation at which logits are compared.
POSITIONS = 32


@dataclass(frozen=True)
class Example:
    """Conversation on which checkpoints are compared.

    Attributes:
        record: the conversation; the last message is the assistant's.
        max_tiles: maximum total number of tiles; None for the checkpoint's limit.
    """

    key: RecordKey
    record: Record
    images: tuple[Image.Image, ...]
    max_tiles: int | None

    @property
    def prompt(self) -> Prompt:
        """The conversation up to the assistant's last message."""
        return last_question(self.record, self.images)[0]


@dataclass(frozen=True)
class Trace:
    """Results of a checkpoint on an example.

    Attributes:
        input_ids: (T,) token ids of the full conversation.
        tiles: number of tiles of each image.
        pixels: (N, 3, S, S) normalized tiles in float32.
        logits: (P, V) teacher-forced logits at the last positions in float32.
        answer: greedy answer to the prompt.
    """

    input_ids: torch.Tensor
    tiles: tuple[int, ...]
    pixels: torch.Tensor
    logits: torch.Tensor
    answer: str


def open_runner(
    folder: Path, *, device: torch.device, dtype: torch.dtype, base: str | Path | None = None
) -> "OwnRunner | TransformersRunner":
    """Load a checkpoint with transformers' own classes if it is in their format, else with this package."""
    if is_hf_format(folder):
        return TransformersRunner(folder, device, dtype)
    return OwnRunner(folder, device, dtype, base)


class OwnRunner:
    """Runs a checkpoint in any supported format with this package.

    Args:
        folder: folder of the checkpoint.
        device: device to run on.
        dtype: dtype of the weights.
        base: new path or Hub id of an adapter's base model, if it has moved.
    """

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, base: str | Path | None
    ) -> None:
        self.engine = Engine.from_checkpoint(folder, device=device, dtype=dtype, base=base)
        self.preprocessing = self.engine.encoder.preprocessing

    @torch.inference_mode()
    def run(self, example: Example, max_new_tokens: int) -> Trace:
        """Run the checkpoint on an example.

        Raises:
            DataError: the example cannot be encoded.
        """
        engine = self.engine
        preprocessing = self.preprocessing.with_tile_limit(example.max_tiles)
        engine.encoder = RecordEncoder(engine.tokenizer, preprocessing)
        try:
            encoded = engine.encoder.encode(example.record.messages, [image.size for image in example.images])
            [answer] = engine.answer([example.prompt], max_new_tokens=max_new_tokens)
        except (RecordError, DataError) as problem:
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
            answer=str(answer),  # a plain string, which `torch.load` accepts
        )


class TransformersRunner:
    """Runs a checkpoint in transformers' format with transformers' model and processor (Pillow backend).

    Args:
        folder: folder of the checkpoint.
        device: device to run on.
        dtype: dtype of the weights.

    Raises:
        ModelError: transformers cannot load the checkpoint, or a weight is not finite.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging as transformers_logging

        progress_bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"{folder}: transformers cannot load this checkpoint: {error}") from error
        finally:
            if progress_bar:
                transformers_logging.enable_progress_bar()
        _require_finite(model, folder)
        nn.Module.to(model, device)
        self.model, self.device, self.dtype = model.eval(), device, dtype
        probe = [{"role": "user", "content": IMAGE_PLACEHOLDER}]
        self.reads_placeholders = self.processor.image_token in self.processor.apply_chat_template(probe)

    @torch.inference_mode()
    def run(self, example: Example, max_new_tokens: int) -> Trace:
        """Run the checkpoint on an example."""
        inputs = self._prepare(example, example.record.messages, example.images, add_generation_prompt=False)
        pixels = inputs.get("pixel_values")
        with pinned_sdpa(self.device):
            output = self.model(**self._on_device(inputs), use_cache=False, logits_to_keep=POSITIONS)
        prompt = self._prepare(
            example, example.prompt.messages, example.prompt.images, add_generation_prompt=True
        )
        end = self.processor.tokenizer.convert_tokens_to_ids(IM_END)
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        with pinned_sdpa(self.device):
            ids = self.model.generate(**self._on_device(prompt), generation_config=greedy)[0]
        ids = ids[prompt["input_ids"].shape[1] :]
        size = self.processor.image_processor.size
        return Trace(
            input_ids=inputs["input_ids"][0],
            tiles=self._tiles(inputs["input_ids"][0]),
            pixels=torch.zeros(0, 3, size["height"], size["width"]) if pixels is None else pixels,
            logits=output.logits[0].float().cpu(),
            answer=decode_answer(self.processor.tokenizer, ids.tolist()),
        )

    def _prepare(
        self,
        example: Example,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        *,
        add_generation_prompt: bool,
    ) -> dict[str, Any]:
        """Return the processor's model inputs; the example's tile limit is divided among the images."""
        chat = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
        limit = example.max_tiles or self.processor.image_processor.max_patches
        tile_range = {
            "max_patches": tiles_per_image(limit, max(len(images), 1)),
            "min_patches": min(self.processor.image_processor.min_patches, limit),
        }
        return self.processor(
            images=list(images) or None, text=text, images_kwargs=tile_range, return_tensors="pt"
        )

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        """Return a message's content as text or as a list of parts, whichever the chat template supports."""
        if self.reads_placeholders or message.role != "user" or IMAGE_PLACEHOLDER not in message.content:
            return message.content
        first, *others = message.content.split(IMAGE_PLACEHOLDER)
        parts = [{"type": "text", "text": first}] if first else []
        for text in others:
            # The template adds a newline after an image.
            parts += [{"type": "image"}, {"type": "text", "text": text.removeprefix("\n")}]
        return parts

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Move the inputs to the model's device and convert the pixels to its dtype."""
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.dtype)
        return moved

    def _tiles(self, input_ids: torch.Tensor) -> tuple[int, ...]:
        """Return the number of tiles of each image, computed from its number of image tokens."""
        processor = self.processor
        image_of_position = (input_ids == processor.start_image_token_id).cumsum(0)
        image_of_token = image_of_position[input_ids == processor.image_token_id]
        counts = torch.bincount(image_of_token)[1:].tolist()
        return tuple(count // processor.image_seq_length for count in counts)


def _require_finite(model: nn.Module, folder: Path) -> None:
    """Check that all weights of a transformers model are finite.

    Raises:
        ModelError: a weight contains NaN or Inf; the message lists the weights.
    """
    problems = {name: describe_non_finite(tensor) for name, tensor in model.state_dict().items()}
    non_finite = [f"{name} ({problem})" for name, problem in problems.items() if problem is not None]
    if non_finite:
        raise non_finite_error(folder, non_finite)
