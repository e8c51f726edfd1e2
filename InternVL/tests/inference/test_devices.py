"""Device selection per rank, and models distributed across multiple devices."""

import pytest
import torch
from inference.prompts import make_engine, mixed_prompts

from internvl_chat.inference import devices
from internvl_chat.inference.devices import balanced_map, distribute, find_device, place
from internvl_chat.utils.distributed import shard
from internvl_chat.utils.errors import UsageError


def test_each_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert find_device(None) == torch.device("cuda:2")
    assert find_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(UsageError, match="no such GPU; use cuda:0 to cuda:3"):
        find_device("cuda:4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "no such GPU; use cpu"), ("tpu9", "unknown device; use cpu, cuda:0 or auto")],
)
def test_missing_devices(name, message):
    with pytest.raises(UsageError, match=message):
        find_device(name)


def test_auto_needs_a_single_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="use only one of the two"):
        place(make_engine().model, "auto")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="would distribute the model")
def test_auto_on_one_device_moves_the_model():
    model = make_engine().model
    assert place(model, "auto") is model
    assert not hasattr(model.mlp1, "_hf_hook")


@pytest.mark.parametrize("tied", [False, True])
def test_balanced_map_covers_every_parameter_once(tied):
    model = make_engine(llm={"num_hidden_layers": 6, "tie_word_embeddings": tied}).model
    for count in (1, 2, 3):
        found = balanced_map(model, count)
        for name, _ in model.named_parameters():
            owners = [module for module in found if f"{name}.".startswith(f"{module}.")]
            assert len(owners) == 1, name
        layer_devices = [found[f"language_model.model.layers.{i}"] for i in range(6)]
        assert layer_devices == sorted(layer_devices)
        assert set(found.values()) == set(range(count))
        head = found.get("language_model.lm_head", 0)
        assert head == (0 if tied else count - 1)


def test_a_distributed_model_gives_the_same_answers(monkeypatch):
    """Runs on one CPU, with accelerate's hooks between all parts, as with multiple GPUs."""
    prompts = mixed_prompts(6)
    expected = make_engine().generate_ids(prompts, max_new_tokens=8)
    engine = make_engine()
    layout = {module: "cpu" for module in balanced_map(engine.model, 2)}
    engine.model = distribute(engine.model, layout)
    assert hasattr(engine.model.language_model.model.layers[0], "_hf_hook")
    assert engine.generate_ids(prompts, max_new_tokens=8) == expected
    moved = []
    monkeypatch.setattr(devices, "distribute", lambda model, device_map: moved.append(device_map) or model)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place(engine.model, "auto")
    assert set(moved[0].values()) == {0, 1}


def test_two_ranks_give_the_answers_of_one(monkeypatch):
    prompts = mixed_prompts(9)
    expected = make_engine().answer(prompts, max_new_tokens=8)
    found = [""] * len(prompts)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found[rank::2] = make_engine().answer(shard(prompts), max_new_tokens=8)
    assert found == expected
