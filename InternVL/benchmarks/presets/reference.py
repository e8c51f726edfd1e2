"""The `reference` preset: the operations of a training step in InternVL-Chat.

- The dataloader returns one record per micro-batch, with float32 tiles (a blank one if it has no image).
- Activation checkpointing is applied to every decoder layer.
- Logits are computed at all positions, in float32.
- AdamW updates the model weights directly.
"""

import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from benchmarks.jobs import Clock, Job, Steps
from benchmarks.presets.recipes import (
    DATALOADER_WORKERS,
    LEARNING_RATE,
    LORA_TARGETS,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Recipe,
    plain_lora,
)
from benchmarks.shapes import random_model
from benchmarks.workload import Workload
from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.encode.tiling import normalize_tiles
from internvl_chat.data.encode.tokenizer import image_context_id
from internvl_chat.data.record_set import RecordSet
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

Batch = dict[str, torch.Tensor]


class ReferenceRecords(Dataset):
    """Dataset of records with normalized float32 tiles."""

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        sample = self.records.load(index)
        options = self.records.encoder.preprocessing
        tiles = normalize_tiles(sample.tiles, options.normalize_type)
        has_image = len(tiles) > 0
        blank = torch.zeros(1, 3, options.tile_size, options.tile_size)
        return {
            "input_ids": sample.encoded.input_ids.unsqueeze(0),
            "labels": sample.encoded.labels.unsqueeze(0),
            "pixel_values": tiles if has_image else blank,
            "image_flags": torch.full((max(len(tiles), 1),), has_image),
        }


def run(job: Job, workload: Workload, clock: Clock) -> Steps:
    """Run all training steps of a job; return their token counts and losses."""
    tokenizer, device, recipe = workload.load_tokenizer(), clock.device, job.settings
    # The reference uses flash-attn on GPUs (which SDPA also calls) and eager attention elsewhere.
    attn = "sdpa" if device.type == "cuda" else "eager"
    model = random_model(
        job.shape, image_context_id(tokenizer), attn=attn, device=device, dtype=job.torch_dtype
    )
    trainable = select_trainable(model, recipe)
    checkpoint_every_layer(model.language_model)
    model.train()
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = iter(_dataloader(workload.open_records(job.shape, tokenizer), device))
    tokens, losses, token_losses = [], [], []
    clock.tick()
    for _ in range(job.total_steps):
        found = train_step(model, trainable, optimizer, batches, recipe.step_records)
        clock.tick()
        for values, value in zip((tokens, losses, token_losses), found, strict=True):
            values.append(value)
    return Steps(tokens, losses, token_losses[0])


def select_trainable(model: InternVLChatModel, recipe: Recipe) -> list[nn.Parameter]:
    """Freeze parameters or add adapters as in the recipe; return the trainable parameters.

    The adapters are float32, as in peft.
    """
    if recipe.lora_rank:
        model.requires_grad_(False)
        inject_adapter_in_model(plain_lora(recipe, LORA_TARGETS), model.language_model)
        cast_adapter_dtype(model.language_model, "default")
    else:
        model.vision_model.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def checkpoint_every_layer(language_model: PreTrainedModel) -> None:
    """Enable activation checkpointing in all decoder layers; the frozen vision tower does not need it."""
    # transformers renamed the method after 5.17.
    current = getattr(language_model, "activation_checkpointing_enable", None)
    (current or language_model.gradient_checkpointing_enable)({"use_reentrant": False})


def _dataloader(records: RecordSet, device: torch.device) -> DataLoader:
    """Return a dataloader that yields single records in order."""
    return DataLoader(
        ReferenceRecords(records),
        batch_size=None,
        num_workers=min(DATALOADER_WORKERS, os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
    )


def train_step(
    model: InternVLChatModel,
    trainable: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    accumulate: int,
) -> tuple[int, float, float]:
    """Run one optimizer step on `accumulate` records.

    Returns:
        The number of tokens, and the loss averaged over the records and over the supervised tokens.
    """
    device = trainable[0].device
    total, tokens = torch.zeros((), device=device), 0
    token_total, supervised = torch.zeros((), device=device), torch.zeros((), device=device)
    for _ in range(accumulate):
        batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
        with torch.autocast(
            device.type, torch.bfloat16, enabled=model.language_model.dtype == torch.bfloat16
        ):
            loss = record_loss(model, **batch)
        (loss / accumulate).backward()
        total += loss.detach() / accumulate
        count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        token_total, supervised = token_total + loss.detach() * count, supervised + count
        tokens += batch["input_ids"].numel()
    nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return tokens, float(total), float(token_total / supervised)


def record_loss(
    model: InternVLChatModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    pixel_values: torch.Tensor,
    image_flags: torch.Tensor,
) -> torch.Tensor:
    """Return the mean loss over the supervised tokens of a record."""
    text = model.language_model.get_input_embeddings()(input_ids)
    features = model.image_features(pixel_values.to(text.dtype))[image_flags].flatten(0, 1)
    positions = (input_ids == model.image_context_id).unsqueeze(-1)
    embeddings = text.masked_scatter(positions, features.to(text.dtype))
    logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits.float()
    shifted = logits[:, :-1].contiguous().flatten(0, 1)
    return F.cross_entropy(shifted, labels[0, 1:], ignore_index=IGNORE_INDEX)
