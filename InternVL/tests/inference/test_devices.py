"""Where a model runs, and which part of the work is a process's."""

import pytest
import torch
from inference.prompts import make_engine, mixed_prompts

from internvl_chat.inference import devices
from internvl_chat.inference.devices import balanced_map, find_device, place, spread
from internvl_chat.inference.parallel import process_count, process_device, process_index, share
from internvl_chat.utils.errors import UsageError


def test_parts_of_processes(monkeypatch):
    assert (process_index(), process_count(), share(range(5))) == (0, 1, range(5))
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts.append(list(share(range(7))))
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert process_device() == torch.device("cuda:2") == find_device(None)
    assert find_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(UsageError, match="no such GPU here; use cuda:0 to cuda:3"):
        find_device("cuda:4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("name", "message"), [("cuda", "no such GPU here; use cpu"), ("tpu9", "unknown; use cpu, cuda:0 or auto")]
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(UsageError, match=message):
        find_device(name)


def test_spreading_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="use one of them"):
        place(make_engine().model, "auto")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="would spread the model")
def test_spreading_over_one_device_is_to_move_there():
    model = make_engine().model
    assert place(model, "auto") is model
    assert not hasattr(model.mlp1, "_hf_hook")


@pytest.mark.parametrize("tied", [False, True])
def test_a_map_has_every_parameter_once_and_shares_the_layers_out(tied):
    model = make_engine(llm={"num_hidden_layers": 6, "tie_word_embeddings": tied}).model
    for count in (1, 2, 3):
        found = balanced_map(model, count)
        for name, _ in model.named_parameters():
            owners = [module for module in found if f"{name}.".startswith(f"{module}.")]
            assert len(owners) == 1, name
        places = [found[f"language_model.model.layers.{i}"] for i in range(6)]
        assert places == sorted(places)
        assert set(found.values()) == set(range(count))
        head = found.get("language_model.lm_head", 0)
        assert head == (0 if tied else count - 1)


def test_a_spread_model_gives_the_same_answers(monkeypatch):
    """On one CPU, with accelerate's hooks between all parts, as on several GPUs."""
    prompts = mixed_prompts(6)
    expected = make_engine().generate_ids(prompts, max_new_tokens=8)
    engine = make_engine()
    layout = {module: "cpu" for module in balanced_map(engine.model, 2)}
    engine.model = spread(engine.model, layout)
    assert hasattr(engine.model.language_model.model.layers[0], "_hf_hook")
    assert engine.generate_ids(prompts, max_new_tokens=8) == expected
    moved = []
    monkeypatch.setattr(devices, "spread", lambda model, device_map: moved.append(device_map) or model)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place(engine.model, "auto")
    assert set(moved[0].values()) == {0, 1}


def test_what_two_processes_answer_is_what_one_does(monkeypatch):
    prompts = mixed_prompts(9)
    expected = make_engine().answer(prompts, max_new_tokens=8)
    found = [""] * len(prompts)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found[rank::2] = make_engine().answer(share(prompts), max_new_tokens=8)
    assert found == expected
