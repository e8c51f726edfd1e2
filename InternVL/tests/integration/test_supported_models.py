"""All models listed as supported in docs/models.md can be trained, tested with small random models."""

import pytest
from helpers import flags
from integration.test_export import save_with_tokenizer
from model.conftest import make_config, make_model

from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.utils.errors import ModelError

QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
VIT_6B = {"qk_normalization": True, "norm_type": "rms_norm", "qkv_bias": False}
LORA = {"use_llm_lora": 2, "freeze_llm": True, "freeze_mlp": True}


@pytest.mark.parametrize(
    ("model", "recipe"),
    [({"vision": VIT_6B}, LORA), ({"llm": QWEN3}, LORA), ({"vision": VIT_6B, "llm": QWEN3}, {})],
    ids=["InternVL3-38B", "InternVL3.5-8B", "InternVL3.5-38B"],
)
def test_training(model, recipe, tiny_model, sample_data, tmp_path, metrics):
    save_with_tokenizer(make_model(**model), tiny_model, tmp_path / "model")
    argv = flags(
        model_name_or_path=tmp_path / "model",
        meta_path=sample_data / "train.json",
        output_dir=tmp_path / "out",
        max_steps=2,
        logging_steps=1,
        **recipe,
    )
    assert train(argv) == 0
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


def test_mixture_of_experts_is_refused(tiny_model, tmp_path):
    """Published checkpoints have one weight per expert; transformers 5 stores all experts in one weight."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = make_config(llm={"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **experts})
    dense = make_model(llm=QWEN3)
    dense.config.llm_config |= config.llm_config
    save_with_tokenizer(dense, tiny_model, tmp_path / "model")
    with pytest.raises(ModelError, match="experts"):
        load_model(tmp_path / "model", image_context_id=0)
