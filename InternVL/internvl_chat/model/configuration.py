"""Configuration of an InternVL-Chat checkpoint, read from and written to `config.json`.

Unknown keys are preserved, because other software may need them.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from internvl_chat.utils.errors import ModelError

MODEL_TYPE = "internvl_chat"
ARCHITECTURE = "InternVLChatModel"

# Keys added by the library that saved the file; they must not affect how the model is built.
_NOT_FOR_THE_LLM = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)

# Configuration keys with the number of experts; a language model that has one is a mixture of experts.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass
class InternVisionConfig:
    """Configuration of the InternViT vision tower, with the reference's field names and defaults."""

    hidden_size: int = 3200
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = False
    qk_normalization: bool = True
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 0.1

    @property
    def grid(self) -> int:
        """Number of patches along each side of a tile."""
        return self.image_size // self.patch_size


@dataclass
class InternVLChatConfig:
    """Configuration of the full model, with the field names of the reference's `config.json`.

    Attributes:
        llm_config: configuration of the language model as stored in the file.
        raw: full content of the file.
    """

    vision_config: InternVisionConfig
    llm_config: dict[str, Any]
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    select_layer: int = -1
    template: str | None = None
    force_image_size: int | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    pad2square: bool = False
    use_backbone_lora: int = 0
    use_llm_lora: int = 0
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the language model."""
        return int(self.llm_config["hidden_size"])

    @property
    def image_size(self) -> int:
        """Side length of a tile in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def tokens_per_tile(self) -> int:
        """Number of tokens per tile: (448 / 14)^2 * 0.5^2 = 256 for InternVL3."""
        return int((self.image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio**2)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config.json") -> "InternVLChatConfig":
        """Build the configuration from the content of a `config.json`.

        Raises:
            ModelError: the content is not an InternVL-Chat configuration or has invalid values; the message
                lists all of them.
        """
        if not isinstance(raw, dict) or raw.get("model_type") != MODEL_TYPE:
            found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise ModelError(
                f"{source}: model_type is {found!r}, expected {MODEL_TYPE!r} "
                "(an InternVL checkpoint in the original format)"
            )
        missing = [key for key in ("vision_config", "llm_config") if not isinstance(raw.get(key), dict)]
        if missing:
            raise ModelError(f"{source}: no {' and no '.join(missing)}")
        vision = InternVisionConfig(**_known(InternVisionConfig, raw["vision_config"]))
        llm = dict(raw["llm_config"])
        own = _known(cls, raw) | {"vision_config": vision, "llm_config": llm, "raw": copy.deepcopy(raw)}
        config = cls(**own)
        try:
            problems = config.problems()
        except (TypeError, ValueError, ZeroDivisionError) as error:
            problems = [f"invalid value: {error}"]
        if problems:
            raise ModelError(f"{source}: " + "; ".join(problems))
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> "InternVLChatConfig":
        """Read the `config.json` in a checkpoint folder."""
        file = Path(folder) / "config.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{folder}: no config.json; is this a model folder?") from None
        except ValueError as error:
            raise ModelError(f"{file}: not valid JSON: {error}") from None
        return cls.from_dict(raw, source=str(file))

    def problems(self) -> list[str]:
        """Return a message for each invalid or inconsistent value."""
        vision, problems = self.vision_config, []
        if vision.hidden_size % vision.num_attention_heads:
            problems.append(
                f"vision hidden_size {vision.hidden_size} is not a multiple of num_attention_heads "
                f"{vision.num_attention_heads}"
            )
        if vision.norm_type not in ("layer_norm", "rms_norm"):
            problems.append(f"vision norm_type {vision.norm_type!r} is neither 'layer_norm' nor 'rms_norm'")
        if self.ps_version not in ("v1", "v2"):
            problems.append(f"ps_version {self.ps_version!r} is neither 'v1' nor 'v2'")
        if not -vision.num_hidden_layers - 1 <= self.select_layer <= vision.num_hidden_layers:
            problems.append(
                f"select_layer {self.select_layer} is out of range for {vision.num_hidden_layers} layers"
            )
        side = (self.image_size // vision.patch_size) * self.downsample_ratio
        if side != int(side) or side < 1:
            problems.append(
                f"image size {self.image_size} / patch {vision.patch_size} * downsample ratio "
                f"{self.downsample_ratio} is not a whole number of tokens per side"
            )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`, including unknown keys."""
        out = copy.deepcopy(self.raw)
        vision = out.get("vision_config", {}) | dataclasses.asdict(self.vision_config)
        out |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "raw"}
        out["vision_config"] = vision
        out["llm_config"] = _with_reference_keys(self.llm_config)
        out["model_type"] = MODEL_TYPE
        out["architectures"] = [ARCHITECTURE]
        out.setdefault("hidden_size", self.hidden_size)
        out.setdefault("tie_word_embeddings", bool(self.llm_config.get("tie_word_embeddings", False)))
        return out

    def to_json_string(self) -> str:
        """Return the content of `config.json` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def build_llm_config(self) -> PretrainedConfig:
        """Return the language model's configuration as a transformers `PretrainedConfig`.

        Raises:
            ModelError: transformers has no causal language model of this type, or it is not supported here.
        """
        model_type = str(self.llm_config.get("model_type"))
        if any(self.llm_config.get(key) for key in _NUM_EXPERTS) and model_type != "qwen3_moe":
            raise ModelError(
                f"the language model (model_type {model_type!r}) is a mixture of experts; of these, only "
                "Qwen3 is supported (InternVL3.5-30B-A3B and 241B-A28B)"
            )
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            names = self.llm_config.get("architectures") or [model_type]
            raise ModelError(
                f"the language model {names[0]!r} (model_type {model_type!r}) is not part of "
                "transformers, and code from checkpoints is never run; use e.g. Qwen2 or Llama"
            )
        options = {k: v for k, v in self.llm_config.items() if k not in _NOT_FOR_THE_LLM}
        return AutoConfig.for_model(model_type, **options)


def _with_reference_keys(llm: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a language model's configuration with the keys that the reference needs.

    transformers 5 writes `rope_parameters` instead of `rope_theta` and `rope_scaling`. Without these two, the
    reference would use the default RoPE frequencies.
    """
    out = copy.deepcopy(llm)
    rope = out.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" not in out:
        out["rope_theta"] = rope.get("rope_theta", 10000.0)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        out["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(out.get("model_type")))
    if name and not out.get("architectures"):
        out["architectures"] = [name]
    return out


def _known(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `raw` that are fields of a dataclass."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: value for key, value in raw.items() if key in names}
