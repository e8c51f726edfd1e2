"""Configurations of the published models, without their weights.

Sources:
- `model.config` of InternVL3-1B, as printed in a notebook (github.com/shivangjhalani/multicoco)
- the configurations of InternViT-6B-448px-V2_5, Qwen2.5 and Qwen3
- the training scripts of InternVL3.5 (github.com/OpenGVLab/InternVL, internvl_chat_gpt_oss/shell)
"""

import copy
from typing import Any, NamedTuple

_VIT_300M = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
}  # fmt: skip
_VIT_6B = {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
    "norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True,
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_674,
    "max_position_embeddings": 32_768, "max_window_layers": 70, "sliding_window": None,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "moe_config": None,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "head_dim": 128,
    "attention_bias": False, "max_position_embeddings": 40_960, "sliding_window": None, "rope_scaling": None,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN3, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip


class _Published(NamedTuple):
    """A published model.

    Attributes:
        vision: options of the vision tower.
        llm: options of the language model.
        sizes: hidden size, layers, heads, key/value heads and MLP width of the language model; for a mixture
            of experts, also the MLP width of an expert.
    """

    vision: dict[str, Any]
    llm: dict[str, Any]
    sizes: tuple[int, ...]


_MODELS = {
    "InternVL3-1B": _Published(_VIT_300M, _QWEN2, (896, 24, 14, 2, 4864)),
    "InternVL3-2B": _Published(_VIT_300M, _QWEN2, (1536, 28, 12, 2, 8960)),
    "InternVL3-8B": _Published(_VIT_300M, _QWEN2, (3584, 28, 28, 4, 18944)),
    "InternVL3-14B": _Published(_VIT_300M, _QWEN2, (5120, 48, 40, 8, 13824)),
    "InternVL3-38B": _Published(_VIT_6B, _QWEN2, (5120, 64, 40, 8, 27648)),
    "InternVL3-78B": _Published(_VIT_6B, _QWEN2, (8192, 80, 64, 8, 29568)),
    "InternVL3.5-1B": _Published(_VIT_300M, _QWEN3, (1024, 28, 16, 8, 3072)),
    "InternVL3.5-2B": _Published(_VIT_300M, _QWEN3, (2048, 28, 16, 8, 6144)),
    "InternVL3.5-4B": _Published(_VIT_300M, _QWEN3, (2560, 36, 32, 8, 9728)),
    "InternVL3.5-8B": _Published(_VIT_300M, _QWEN3, (4096, 36, 32, 8, 12288)),
    "InternVL3.5-14B": _Published(_VIT_300M, _QWEN3, (5120, 40, 40, 8, 17408)),
    "InternVL3.5-38B": _Published(_VIT_6B, _QWEN3, (5120, 64, 64, 8, 25600)),
    "InternVL3.5-30B-A3B": _Published(_VIT_300M, _QWEN3_MOE, (2048, 48, 32, 4, 6144, 768)),
    "InternVL3.5-241B-A28B": _Published(_VIT_6B, _QWEN3_MOE, (4096, 94, 64, 4, 12288, 1536)),
}

PUBLISHED_MODELS = tuple(_MODELS)

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "intermediate_size", "moe_intermediate_size")  # fmt: skip


def published_config(name: str) -> dict[str, Any]:
    """Return the content of a published model's `config.json`, without keys that this package ignores.

    Args:
        name: one of `PUBLISHED_MODELS`.
    """
    vision, llm, sizes = _MODELS[name]
    shared = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "attention_dropout": 0.0,
              "use_sliding_window": False, "tie_word_embeddings": False}  # fmt: skip
    return copy.deepcopy({
        "model_type": "internvl_chat",
        "vision_config": {"model_type": "intern_vit_6b", **vision, "image_size": 448, "patch_size": 14,
                          "layer_norm_eps": 1e-6, "initializer_factor": 0.1},
        "llm_config": {**shared, **llm, **dict(zip(_SIZES, sizes, strict=False))},
        "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "template": "internvl2_5",
        "force_image_size": 448, "dynamic_image_size": True, "use_thumbnail": True,
        "min_dynamic_patch": 1, "max_dynamic_patch": 12, "pad2square": False, "tie_word_embeddings": False,
    })  # fmt: skip
