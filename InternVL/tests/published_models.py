"""Small models with the options of the published models."""

from typing import Any

from internvl_chat.model.published import published_config

# One model of each architecture; the others differ only in their sizes.
ARCHITECTURES = (
    "InternVL3-8B", "InternVL3-78B", "InternVL3.5-8B", "InternVL3.5-38B",
    "InternVL3.5-30B-A3B", "InternVL3.5-241B-A28B",
)  # fmt: skip


def small_config(name: str, vocabulary: int) -> dict[str, Any]:
    """Return a published model's configuration with small sizes, but the same options and head groups."""
    raw = published_config(name)
    vision, llm = raw["vision_config"], raw["llm_config"]
    vision |= {"hidden_size": 2 * vision["num_attention_heads"], "num_hidden_layers": 2, "image_size": 56}
    vision["intermediate_size"] = 4 * vision["hidden_size"]
    raw["force_image_size"] = 56
    group = llm["num_attention_heads"] // llm["num_key_value_heads"]
    small = {"num_hidden_layers": 2, "num_attention_heads": 2 * group, "num_key_value_heads": 2,
             "head_dim": 8, "hidden_size": 48 if "head_dim" in llm else 16 * group, "intermediate_size": 48,
             "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
    llm |= {key: value for key, value in small.items() if key in llm} | {"vocab_size": vocabulary}
    return raw
