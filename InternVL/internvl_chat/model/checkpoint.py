"""Model folders: what kind each is, loading any of them, and saving a model or its adapters.

A folder holds a whole model (the reference's format, plain or wrapped in LoRA, or transformers') or
adapters in peft's format with the path and the hash of their base.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.initialization import no_init_weights

from internvl_chat.errors import ModelError
from internvl_chat.logs import get_logger
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.hf_format import HF_MODEL_TYPE, from_hf_config, from_hf_weights
from internvl_chat.model.lora import (
    adapter_config,
    adapter_key,
    add_lora,
    lora_layers,
    parameter_name,
    ranks_of,
    read_adapter_config,
    unwrapped_name,
)
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.model.weights import (
    Weights,
    open_weights,
    read_weights,
    weights_digest,
    write_file,
    write_weights,
)

logger = get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"

# What else makes a folder a checkpoint: tokenizer, generation settings, the reference's code for others.
_COMPANIONS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "preprocessing.json",
    "*.py",
)
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")


@dataclass(frozen=True)
class BaseModel:
    """The model that adapters belong to: where it is, and the SHA-256 of its weight files."""

    path: str
    sha256: str


def model_folder(path_or_id: str | Path) -> Path:
    """Return a local folder, downloading `organisation/name` from the Hugging Face hub.

    Raises:
        ModelError: there is no such folder and the hub cannot deliver it.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/", "~")):
        raise ModelError(f"{path_or_id}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(_DOWNLOADED)))
    except Exception as error:
        raise ModelError(
            f"{path_or_id}: neither a local folder nor available from the Hugging Face hub ({error}); "
            "download the model and give its folder"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds adapters rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_config(folder: Path) -> InternVLChatConfig:
    """Read the configuration of a folder of any kind, of adapters with their ranks."""
    file = folder / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{file}: not valid JSON: {error}") from None
        if raw.get("model_type") == HF_MODEL_TYPE:
            return from_hf_config(raw, source=str(file))
    return InternVLChatConfig.from_folder(folder)


def read_base(folder: Path) -> BaseModel:
    """Read which base the adapters in a folder belong to.

    Raises:
        ModelError: the file that says so is missing or malformed.
    """
    file = folder / BASE_FILE
    try:
        return BaseModel(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file}: does not name the adapter's base model: {error}") from None


def find_base(folder: Path, override: str | Path | None = None) -> tuple[Path, BaseModel]:
    """Return the verified folder of an adapter's base.

    Args:
        folder: the adapter's folder.
        override: where the base is now, if not where it was.

    Raises:
        ModelError: it is missing, or its weights are not those that the adapter was trained on.
    """
    base = read_base(folder)
    try:
        found = model_folder(override or base.path)
    except ModelError as error:
        raise ModelError(
            f"{folder}: the adapter's base is missing: {error}; give its folder with --base"
        ) from None
    if is_adapter(found):
        raise ModelError(f"{found}: is an adapter itself; the base must be a whole model")
    digest = weights_digest(found)
    if digest != base.sha256:
        raise ModelError(
            f"{found}: these weights (sha256 {digest[:12]}) are not the base that the adapter {folder} was "
            f"trained on (sha256 {base.sha256[:12]}); give the right folder with --base"
        )
    return found, BaseModel(str(override or base.path), digest)


def model_weights(folder: Path) -> Weights:
    """Open the weights of a whole model under our names, from any of its formats."""
    weights = read_weights(folder)
    if any(name.startswith(("model.vision_tower.", "vision_tower.")) for name in weights):
        return from_hf_weights(weights)
    return {unwrapped_name(name): read for name, read in weights.items()}


def load_model(
    path_or_id: str | Path,
    *,
    image_context_id: int,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    base: str | Path | None = None,
    lora_dropout: float = 0.05,
    drop_path_rate: float | None = None,
) -> InternVLChatModel:
    """Load a model of any kind on the CPU, straight to `dtype` (adapters stay float32).

    Args:
        path_or_id: local folder or hub id.
        image_context_id: id of `<IMG_CONTEXT>` in the tokenizer.
        dtype: of all weights but adapters.
        attn: an attention name of `resolve_attention`.
        base: for adapters, where their base is now.
        lora_dropout: of the adapters, if there are any.
        drop_path_rate: stochastic depth of the vision tower; None for the checkpoint's.

    Raises:
        ModelError: names every missing, unexpected or misshapen weight.
    """
    folder = model_folder(path_or_id)
    if not is_adapter(folder):
        config = read_config(folder)
        if drop_path_rate is not None:
            config.vision_config.drop_path_rate = drop_path_rate
        model = empty_model(config, image_context_id, dtype, attn)
        add_lora(
            model, llm_rank=config.use_llm_lora, vision_rank=config.use_backbone_lora, dropout=lora_dropout
        )
        assign_weights(model, model_weights(folder), source=folder)
        return model
    base_folder, _ = find_base(folder, base)
    model = load_model(
        base_folder,
        image_context_id=image_context_id,
        dtype=dtype,
        attn=attn,
        lora_dropout=lora_dropout,
        drop_path_rate=drop_path_rate,
    )
    load_adapter(model, folder, dropout=lora_dropout)
    return model


def empty_model(
    config: InternVLChatConfig, image_context_id: int, dtype: torch.dtype, attn: str
) -> InternVLChatModel:
    """Build a model whose weights are allocated but never written (buffers are computed)."""
    with no_init_weights(), _default_dtype(dtype):
        return InternVLChatModel(config, image_context_id, attn)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assign_weights(model: nn.Module, weights: Weights, *, source: Path, partial: bool = False) -> None:
    """Give a module its weights one by one, each in the dtype of the parameter that it replaces.

    Args:
        model: receives the weights.
        weights: under the module's names.
        source: named in errors.
        partial: accept that some of the module's weights are not given.
    """
    own = dict(model.state_dict(keep_vars=True))
    tied = {name for name, p in own.items() if any(p is q for other, q in own.items() if other in weights)}
    missing = [] if partial else sorted(own.keys() - weights.keys() - tied)
    unexpected = sorted(weights.keys() - own.keys())
    misshapen = []
    for name in weights.keys() & own.keys():
        tensor, target = weights[name](), own[name]
        if tensor.shape != target.shape:
            misshapen.append(f"{name} {tuple(tensor.shape)} for {tuple(target.shape)}")
            continue
        model.load_state_dict({name: tensor.to(target.dtype)}, strict=False, assign=True)
    problems = [
        f"{len(names)} {kind} weight(s), e.g. {', '.join(names[:3])}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ModelError(f"{source}: does not fit its config.json: {'; '.join(problems)}")


def load_adapter(model: InternVLChatModel, folder: Path, *, dropout: float = 0.05) -> None:
    """Add the adapters of a folder to their base, and replace the modules that were trained whole."""
    llm_rank, vision_rank = ranks_of(read_adapter_config(folder))
    if not lora_layers(model):  # a base in the reference's wrapped format has them
        add_lora(model, llm_rank=llm_rank, vision_rank=vision_rank, dropout=dropout)
    weights = {parameter_name(key): read for key, read in open_weights(folder / ADAPTER_WEIGHTS).items()}
    expected = {name for name in model.state_dict() if ".lora_" in name}
    if expected - weights.keys():
        raise ModelError(f"{folder}: {len(expected - weights.keys())} adapter weights are missing")
    assign_weights(model, weights, source=folder, partial=True)
    model.replaced_modules = _modules_of(name for name in weights if ".lora_" not in name)


def _modules_of(names: Iterator[str]) -> set[str]:
    """Return the modules that own the named parameters, `mlp1` as one."""
    return {"mlp1" if name.startswith("mlp1.") else name.rpartition(".")[0] for name in names}


def save_model(
    model: InternVLChatModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a whole model in the reference's format: `config.json` and safetensors.

    Args:
        model: a model without adapters.
        folder: is made if need be.
        state_dict: the weights, where the model's own are spread over processes.
    """
    if lora_layers(model):
        raise ModelError("the model has adapters; save them with save_adapter, or merge the checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = model.state_dict() if state_dict is None else state_dict
    shared: set[int] = set()
    weights: Weights = {}
    for name, tensor in state_dict.items():
        if tensor.data_ptr() not in shared or tensor.numel() == 0:
            weights[name] = lambda t=tensor: t
        shared.add(tensor.data_ptr())
    write_weights(weights, folder)
    write_config(model.config, folder)


def write_config(config: InternVLChatConfig, folder: Path) -> None:
    """Write `config.json`."""
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def save_adapter(
    model: InternVLChatModel,
    folder: Path,
    base: BaseModel,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model's adapters in peft's format, with every module that was trained whole beside them.

    Args:
        model: a model with adapters.
        folder: is made if need be.
        base: the model that they belong to.
        state_dict: the weights, where the model's own are spread over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = (name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)
    modules = sorted(_modules_of(trained) | model.replaced_modules)
    state_dict = model.state_dict() if state_dict is None else state_dict
    kept = {
        adapter_key(name): tensor.detach().cpu().contiguous()
        for name, tensor in state_dict.items()
        if ".lora_" in name or any(name.startswith(module + ".") for module in modules)
    }
    write_file(kept, folder / ADAPTER_WEIGHTS)
    adapter_config(model, base=base.path, modules_to_save=modules).save_pretrained(str(folder))
    (folder / BASE_FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")
    write_config(model.config, folder)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside weights and configuration, byte for byte."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.resolve() != (target / file.name).resolve():
                shutil.copyfile(file, target / file.name)


def resize_vocabulary(model: InternVLChatModel, size: int, num_new: int) -> None:
    """Grow the language model's vocabulary; new rows of the head are the mean of the old (reference)."""
    llm = model.language_model
    llm.resize_token_embeddings(size)
    with torch.no_grad():
        head = llm.get_output_embeddings().weight
        head[-num_new:] = head[:-num_new].mean(dim=0, keepdim=True)
    model.config.llm_config["vocab_size"] = size
