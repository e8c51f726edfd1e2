"""The model compared with transformers' InternVL, an independent implementation: logits, losses, gradients.

transformers processes one record per call without packing, so that packing is tested as well.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import assert_within_rounding, terms_of
from model.conftest import (
    CONTEXT,
    SHAPE,
    Record,
    make_model,
    make_record,
    pack,
    run_alone,
    small_published_model,
)
from published_models import ARCHITECTURES
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_chat.model.io.hf_format import to_hf_config, to_hf_weights
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.model.tiny import TinyShape

MODELS: dict[str, Callable[[], InternVLChatModel]] = {
    "as in InternVL3": lambda: make_model(),
    "84 pixels, deep vision, one head": lambda: make_model(
        TinyShape(
            84, vision_width=48, vision_layers=3, vision_heads=1, width=32, layers=1, heads=2, kv_heads=1
        )
    ),
    "shallow vision, no grouping": lambda: make_model(
        TinyShape(
            56, vision_width=64, vision_layers=1, vision_heads=8, width=48, layers=3, heads=4, kv_heads=4
        )
    ),
    "one key/value head": lambda: make_model(
        TinyShape(
            56, vision_width=32, vision_layers=2, vision_heads=4, width=64, layers=2, heads=8, kv_heads=1
        )
    ),
    "normalised queries and keys": lambda: make_model(vision={"qk_normalization": True}),
    "RMS norms alone": lambda: make_model(vision={"norm_type": "rms_norm"}),
    "last layer but one": lambda: make_model(select_layer=-2),
    "first of three layers": lambda: make_model(
        TinyShape(
            84, vision_width=32, vision_layers=3, vision_heads=2, width=64, layers=2, heads=4, kv_heads=2
        ),
        select_layer=1,
    ),
    "tied head": lambda: make_model(llm={"tie_word_embeddings": True}),
    "Llama": lambda: make_model(llm={"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    **{name: partial(small_published_model, name) for name in ARCHITECTURES},
}

IMAGES = {"text only": (), "one image": (1,), "one image of tiles": (3,), "several images": (2, 1, 3)}


def transformers_model(model: InternVLChatModel, attn: str = "eager") -> InternVLForConditionalGeneration:
    """Return transformers' model with the weights of our model."""
    config = InternVLConfig(**to_hf_config(model.config, CONTEXT))
    other = InternVLForConditionalGeneration._from_config(config, attn_implementation=attn)
    own = {name: lambda tensor=tensor: tensor for name, tensor in model.state_dict().items()}
    weights = {name: read() for name, read in to_hf_weights(own).items()}
    other.load_state_dict(weights, strict=True)
    return other.eval()


def arguments(record: Record) -> dict[str, torch.Tensor]:
    """Return the record as inputs for transformers' model."""
    pixels = {"pixel_values": record.pixel_values} if len(record.pixel_values) else {}
    return {"input_ids": record.input_ids[None], "use_cache": False, **pixels}


def record_for(model: InternVLChatModel, images: tuple[int, ...], seed: int = 0, text: int = 11) -> Record:
    config = model.config
    return make_record(
        images, text=text, seed=seed, image_size=config.image_size, tokens_per_tile=config.tokens_per_tile
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(
    model: torch.nn.Module, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Compare all gradients relative to the largest: small gradients may be differences of large terms."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_within_rounding(found[name], gradient, 3 * terms_of(model), magnitude=largest, name=name)


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient(name: str, images: tuple[int, ...]) -> None:
    model = MODELS[name]()
    other = transformers_model(model)
    record = record_for(model, images)

    expected = other(**arguments(record), labels=record.labels[None])
    largest_logit = float(expected.logits.abs().max())
    assert expected.logits.std() > 0.3, "logits about zero would agree whatever the models do"
    assert_within_rounding(run_alone(model, record), expected.logits[0], terms_of(model))

    output = model(**pack([record], labels=True))
    assert_within_rounding(output.loss, expected.loss, terms_of(model), magnitude=largest_logit)

    output.loss.backward()
    expected.loss.backward()
    found = {n: (lambda g=g: g) for n, g in gradients(model).items()}
    found = {n: read() for n, read in to_hf_weights(found).items()}
    theirs = gradients(other)
    assert {"model.language_model.layers.0.self_attn.q_proj.weight"} <= theirs.keys() <= found.keys()
    if images:
        assert "model.multi_modal_projector.linear_1.weight" in theirs
    assert_gradients(model, {name: found[name] for name in theirs}, theirs)
    for parameter in found.keys() - theirs.keys():  # parameters without effect on the loss
        assert not found[parameter].any(), parameter


@pytest.mark.parametrize("theirs", ["eager", "sdpa"])
@pytest.mark.parametrize("ours", ["eager", "sdpa", "varlen"])
def test_packed_records_match_single_records(ours: str, theirs: str) -> None:
    model = make_model(attn=ours)
    other = transformers_model(model, theirs)
    records = [
        record_for(model, images, seed, text)
        for seed, (images, text) in enumerate([((1,), 5), ((), 14), ((2, 1), 3), ((), 1), ((3,), 8)])
    ]
    singles = [other(**arguments(record), labels=record.labels[None]) for record in records]
    logits = model(**pack(records)).logits[0]
    assert_within_rounding(logits, torch.cat([single.logits[0] for single in singles]), terms_of(model))

    counts = torch.tensor([int((record.labels >= 0).sum()) for record in records])
    weights = torch.repeat_interleave(1 / (counts * len(records)), counts)
    output = model(**pack(records, labels=True), token_weights=weights)
    mean_of_records = torch.stack([single.loss for single in singles]).mean()
    assert_within_rounding(output.loss, mean_of_records, terms_of(model))

    output.loss.backward()
    mean_of_records.backward()
    pairs = {
        "mlp1.1.weight": "model.multi_modal_projector.linear_1.weight",
        "mlp1.3.bias": "model.multi_modal_projector.linear_2.bias",
        "language_model.model.layers.0.self_attn.v_proj.weight": (
            "model.language_model.layers.0.self_attn.v_proj.weight"
        ),
        "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }
    found, expected = gradients(model), gradients(other)
    expected = {own: expected[their] for own, their in pairs.items()}
    assert_gradients(model, {own: found[own] for own in pairs}, expected)


@pytest.mark.parametrize("images", [(), (1,), (2, 1)])
def test_greedy_continuations(images: tuple[int, ...]) -> None:
    model = make_model()
    other = transformers_model(model)
    record = record_for(model, images, seed=7)
    settings = {
        "attention_mask": torch.ones_like(record.input_ids[None]),
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    theirs = {key: value for key, value in arguments(record).items() if key != "use_cache"}
    expected = other.generate(**theirs, **settings)[0, len(record.input_ids) :]
    embeddings = model.embed(record.input_ids[None], record.pixel_values)
    found = model.language_model.generate(inputs_embeds=embeddings, **settings)[0]
    assert found.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 3, "a constant answer would agree whatever the models do"


def test_dynamic_rope_beyond_the_trained_length() -> None:
    """All InternVL3 models have this option, which affects records of more than 32,768 tokens."""
    plain = make_model(llm={"max_position_embeddings": 16})
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    scaled = make_model(llm={"max_position_embeddings": 16, "rope_scaling": scaling})
    other = transformers_model(scaled)
    for text, changes in ((14, False), (15, True)):
        record = make_record(text=text)  # text and two more tokens
        found = run_alone(scaled, record)
        assert_within_rounding(found, other(**arguments(record)).logits[0], terms_of(scaled))
        assert torch.equal(found, run_alone(plain, record)) != changes


def test_untied_head_in_transformers() -> None:
    model = make_model()
    other = transformers_model(model)
    assert SHAPE.width == other.lm_head.weight.shape[1]
    assert other.lm_head.weight is not other.model.language_model.embed_tokens.weight
    assert torch.equal(other.lm_head.weight, model.language_model.lm_head.weight)
