"""Small models and records for the model tests.

Default initialization hides mistakes (zero biases, unit norms, tiny weights), so all parameters are random.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import small_config
from safetensors.torch import load_file, save_file

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.checkpoint import load_model, save_model
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.model.lora.injection import add_lora, lora_layers
from internvl_chat.model.lora.quantization import NF4
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.model.tiny import TinyShape, tiny_config
from internvl_chat.train.freeze import set_trainable

VOCABULARY = 64
CONTEXT = 60  # the id that stands for an image feature

SHAPE = TinyShape(
    image_size=56,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
)


def make_config(
    shape: TinyShape = SHAPE,
    *,
    vision: dict[str, Any] | None = None,
    llm: dict[str, Any] | None = None,
    **changes: Any,
) -> InternVLChatConfig:
    """Return a small configuration with overrides for the vision tower, language model and top level."""
    raw = tiny_config(shape, VOCABULARY).to_dict()
    raw["vision_config"].update(vision or {})
    raw["llm_config"].update(llm or {})
    return InternVLChatConfig.from_dict({**raw, **changes})


def small_published_model(name: str, attn: str = "sdpa") -> InternVLChatModel:
    """Return a small random model with the options of a published model, in evaluation mode."""
    config = InternVLChatConfig.from_dict(small_config(name, VOCABULARY))
    model = InternVLChatModel(config, CONTEXT, attn)
    randomize(model, seed=0)
    return model.eval()


def make_model(
    shape: TinyShape = SHAPE,
    *,
    seed: int = 0,
    attn: str = "sdpa",
    vision: dict[str, Any] | None = None,
    llm: dict[str, Any] | None = None,
    **changes: Any,
) -> InternVLChatModel:
    """Return a small model in evaluation mode with random parameters."""
    model = InternVLChatModel(make_config(shape, vision=vision, llm=llm, **changes), CONTEXT, attn)
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Randomize all parameters so that activations stay near one: matrices by fan-in, norms around one."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if "embed" in name and "patch" not in name:
            value = noise
        elif ".lora_" in name:
            value = 0.1 * noise
        elif parameter.ndim > 1:
            value = noise * (parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:  # norms and layer scales
            value = 1 + 0.2 * noise
        parameter.copy_(value)


@dataclass(frozen=True)
class Record:
    """Token ids and labels (T,) and normalized tiles (N, 3, S, S) of one record."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


def make_record(
    images: Sequence[int] = (),
    *,
    text: int = 9,
    seed: int = 0,
    image_size: int = 56,
    tokens_per_tile: int = 4,
) -> Record:
    """Return a record with random text, about half of it supervised, and images with these tile counts."""
    rng = torch.Generator().manual_seed(seed)

    def words(n: int) -> torch.Tensor:
        return torch.randint(0, CONTEXT, (n,), generator=rng)

    parts, supervised = [words(2)], [torch.zeros(2, dtype=torch.bool)]
    for tiles in images:
        parts += [torch.full((tiles * tokens_per_tile,), CONTEXT), words(1)]
        supervised.append(torch.zeros(tiles * tokens_per_tile + 1, dtype=torch.bool))
    parts.append(words(text))
    answer = torch.rand(text, generator=rng) < 0.5
    answer[-1] = True
    supervised.append(answer)
    ids = torch.cat(parts)
    labels = ids.masked_fill(~torch.cat(supervised), IGNORE_INDEX)
    pixels = torch.randn(sum(images), 3, image_size, image_size, generator=rng)
    return Record(ids, labels, pixels)


def pack(records: Sequence[Record], *, labels: bool = False) -> dict[str, Any]:
    """Return the arguments of a forward pass over a pack of records."""
    lengths = [len(record.input_ids) for record in records]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = {
        "input_ids": torch.cat([record.input_ids for record in records])[None],
        "pixel_values": torch.cat([record.pixel_values for record in records]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens": bounds,
        "max_length": max(lengths),
    }
    if labels:
        inputs["labels"] = torch.cat([record.labels for record in records])[None]
    return inputs


def run_alone(model: InternVLChatModel, record: Record) -> torch.Tensor:
    """Return the logits (T, V) of an unpacked record."""
    return model(input_ids=record.input_ids[None], pixel_values=record.pixel_values).logits[0]


def load(folder: Path, **options: Any) -> InternVLChatModel:
    """Load a model in any supported format, in evaluation mode."""
    return load_model(folder, image_context_id=CONTEXT, **options).eval()


def save_trained_adapter(
    base: Path,
    target: Path,
    *,
    mlp: bool = False,
    head: bool = False,
    seed: int = 1,
    load_in_4bit: bool = False,
    **options: Any,
) -> InternVLChatModel:
    """Save randomized ("trained") adapters for `base` and return the model with these adapters."""
    model = load(base, load_in_4bit=load_in_4bit)
    add_lora(model, **(options or {"llm_rank": 4}))
    set_trainable(model, freeze_llm=True, freeze_mlp=not mlp, freeze_backbone=True, unfreeze_lm_head=head)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=rng)
                starts_at_zero = ".lora_" in name and "magnitude" not in name
                parameter.copy_(noise if starts_at_zero else parameter + noise)
    quantization = NF4 if load_in_4bit else None
    save_adapter(model, target, BaseModel(str(base), weights_digest(base), quantization))
    return model.eval()


def save_wrapped(target: Path, *, seed: int = 2, **ranks: int) -> InternVLChatModel:
    """Write a model with adapters in the reference's LoRA-wrapped format and return the model."""
    model = make_model()
    add_lora(model, **(ranks or {"llm_rank": 4}))
    randomize(model, seed)
    towers = {"language_model.": model.config.use_llm_lora, "vision_model.": model.config.use_backbone_lora}
    weights = {}
    for name, tensor in model.state_dict().items():
        for tower, rank in towers.items():
            if rank and name.startswith(tower):
                name = f"{tower}base_model.model.{name.removeprefix(tower)}"
        weights[name] = tensor.contiguous()
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with the full model from `make_model()`."""
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSON file with a function of its content."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(
    folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "model.safetensors"
) -> None:
    """Rewrite a safetensors file with a function of its tensors."""
    content = load_file(folder / name)
    change(content)
    save_file(content, folder / name, metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def assert_plain(folder: Path) -> None:
    """Assert that a folder contains a full model in the reference's format, without adapters."""
    assert load_file(folder / "model.safetensors").keys() == make_model().state_dict().keys()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["use_llm_lora"], config["use_backbone_lora"]) == (0, 0)
    assert config["model_type"] == "internvl_chat"
    assert lora_layers(load(folder)) == {}
    assert not (folder / "adapter_config.json").exists()
