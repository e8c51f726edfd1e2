"""The `peer` preset: transformers' InternVL, processor and Trainer, with LoRA from peft.

The setup follows the transformers documentation: one record per micro-batch, gradient checkpointing, bfloat16
(float32 on a CPU without bf16 instructions), and default values for all other options. The loss of a step is
the mean over its supervised tokens, not over its records.
"""

import os
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.models import got_ocr2

from benchmarks.jobs import Clock, Job, Steps
from benchmarks.presets.recipes import (
    DATALOADER_WORKERS,
    LEARNING_RATE,
    LORA_TARGETS,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    plain_lora,
)
from benchmarks.shapes import random_model
from benchmarks.workload import Workload
from internvl_chat.constants import (
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    NORMALIZATIONS,
)
from internvl_chat.data.encode.tiling import tiles_per_image
from internvl_chat.data.encode.tokenizer import image_context_id
from internvl_chat.data.record_set import RecordSet
from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
# Tokenizer attributes that transformers' processor requires.
_TOKEN_NAMES = {
    "start_image_token": IMG_START,
    "end_image_token": IMG_END,
    "context_image_token": IMG_CONTEXT,
    "video_token": "<video>",
}

Message = dict[str, Any]


class Conversations(Dataset):
    """Dataset of chat messages and their images."""

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records.record(index)
        messages = [_message(message.role, message.content) for message in record.messages]
        if messages[0]["role"] != "system":
            messages.insert(0, _message("system", self.records.encoder.preprocessing.system_text))
        return {"messages": messages, "images": self.records.images(index, record)}


def _message(role: str, text: str) -> Message:
    """Return a message in the format of transformers' chat templates, with image parts for placeholders."""
    pieces = text.split(IMAGE_PLACEHOLDER) if role == "user" else [text]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return {"role": role, "content": parts}


class Collator:
    """Converts one conversation to model inputs, with labels for the assistant tokens."""

    def __init__(self, processor: InternVLProcessor, max_dynamic_patch: int) -> None:
        self.processor, self.max_dynamic_patch = processor, max_dynamic_patch
        self.header = processor.tokenizer(f"{IM_START}assistant\n").input_ids
        self.end = processor.tokenizer.convert_tokens_to_ids(IM_END)

    def __call__(self, conversations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Process a batch of one conversation."""
        (conversation,) = conversations
        text = self.processor.apply_chat_template(conversation["messages"], tokenize=False)
        images: list[Image.Image] = conversation["images"]
        max_tiles = tiles_per_image(self.max_dynamic_patch, max(len(images), 1))
        options = {"crop_to_patches": max_tiles > 1, "max_patches": max_tiles}
        inputs = self.processor(
            text=text, images=images or None, return_tensors="pt", **(options if images else {})
        )
        labels = assistant_labels(inputs["input_ids"][0].tolist(), self.header, self.end)
        return {**inputs, "labels": torch.tensor([labels])}


def assistant_labels(ids: list[int], header: list[int], end: int) -> list[int]:
    """Return the labels of a conversation: tokens after an assistant header, up to the end of the message.

    >>> assistant_labels([1, 7, 5, 9, 1, 8, 6, 9, 3], header=[1, 8], end=9)
    [-100, -100, -100, -100, -100, -100, 6, 9, -100]
    """
    labels, inside = [], False
    for position, token in enumerate(ids):
        labels.append(token if inside else IGNORE_INDEX)
        begins = ids[max(0, position + 1 - len(header)) : position + 1] == header
        inside = begins or (inside and token != end)
    return labels


class ImageProcessor(InternVLProcessor):
    """transformers' processor without video support, which requires torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """Accept a missing video processor."""
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def build_processor(tokenizer_folder: str, tile_size: int, tokens_per_tile: int) -> InternVLProcessor:
    """Return transformers' processor with an InternVL tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, extra_special_tokens=_TOKEN_NAMES)
    mean, std = NORMALIZATIONS["imagenet"]
    # Without torchvision, use the Pillow variant of the image processor.
    backend = "" if find_spec("torchvision") else "Pil"
    image_processor = getattr(got_ocr2, f"GotOcr2ImageProcessor{backend}")(
        size={"height": tile_size, "width": tile_size}, image_mean=list(mean), image_std=list(std)
    )
    return ImageProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=tokens_per_tile,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(job: Job, context_id: int, device: torch.device) -> InternVLForConditionalGeneration:
    """Return transformers' model with the same random weights as the other presets."""
    source = random_model(job.shape, context_id, attn="sdpa", device=device, dtype=job.torch_dtype)
    with torch.device(device):
        model = InternVLForConditionalGeneration._from_config(
            InternVLConfig(**to_hf_config(source.config, context_id)), dtype=job.torch_dtype
        )
    weights = to_hf_weights({name: lambda t=tensor: t for name, tensor in source.state_dict().items()})
    model.load_state_dict({name: read() for name, read in weights.items()})
    return model


def run(job: Job, workload: Workload, clock: Clock) -> Steps:
    """Run all training steps of a job; return their token counts and losses."""
    tokenizer, recipe, config = workload.load_tokenizer(), job.settings, job.shape.config()
    model = build_model(job, image_context_id(tokenizer), clock.device)
    if recipe.lora_rank:
        targets = rf".*language_model.*\.({'|'.join(LORA_TARGETS)})"
        model = get_peft_model(model, plain_lora(recipe, targets))
    else:
        model.model.vision_tower.requires_grad_(False)
    records = workload.open_records(job.shape, tokenizer)
    processor = build_processor(workload.tokenizer, config.image_size, config.tokens_per_tile)
    trainer = Trainer(
        model,
        training_arguments(job),
        train_dataset=Conversations(records),
        data_collator=Collator(processor, workload.max_dynamic_patch),
        callbacks=[clock],
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    totals = [0, *(row["num_input_tokens_seen"] for row in rows)]
    losses = [row["loss"] for row in rows]
    return Steps([after - before for before, after in pairwise(totals)], losses, losses[0])


def training_arguments(job: Job) -> TrainingArguments:
    """Return the arguments of the Trainer: those of the recipe, and default values for all others."""
    return TrainingArguments(
        output_dir=job.folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job.settings.step_records,
        gradient_checkpointing=True,
        bf16=job.bf16,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        warmup_steps=0.03,
        lr_scheduler_type="cosine",
        max_steps=job.total_steps,
        dataloader_num_workers=min(DATALOADER_WORKERS, os.cpu_count() or 1),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=job.device == "cpu",
    )
