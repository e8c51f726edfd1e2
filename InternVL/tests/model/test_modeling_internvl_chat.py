"""Forward pass: features replace tokens, modules run only if needed, packed records are independent."""

import copy
import dataclasses

import pytest
import torch
from helpers import assert_within_rounding, rounding_bound, terms_of
from model.conftest import CONTEXT, SHAPE, VOCABULARY, Record, make_model, make_record, pack, run_alone
from torch._dynamo.utils import counters

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.batching.collator import pack_samples
from internvl_chat.data.encode.encoder import EncodedConversation
from internvl_chat.data.record_set import RecordKey, Sample
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel

ATTENTIONS = ("varlen", "sdpa", "eager")
# Number of additions between the input and a logit or loss, and a gradient.
FORWARD = terms_of(make_model())
BACKWARD = 3 * FORWARD


def records() -> list[Record]:
    return [make_record((1,), seed=0), make_record((), text=1, seed=1), make_record((2, 1), text=6, seed=2)]


def parts(logits: torch.Tensor, rows: list[Record]) -> list[torch.Tensor]:
    return list(logits[0].split([len(record.input_ids) for record in rows]))


def freeze_tower(model: InternVLChatModel) -> InternVLChatModel:
    model.vision_model.requires_grad_(False)
    return model


def count_calls(module: torch.nn.Module) -> list[tuple]:
    """Return a list that records the shape of the first input in each call of the module."""
    calls: list[tuple] = []
    module.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    return calls


# Insertion of image features


def test_features_replace_their_tokens_in_order() -> None:
    model, record = make_model(), make_record((2, 1))
    embeddings = model.embed(record.input_ids[None], record.pixel_values)[0]
    words = model.language_model.get_input_embeddings()(record.input_ids)
    features = iter(torch.cat([model.image_features(tile[None])[0] for tile in record.pixel_values]))
    for position, token in enumerate(record.input_ids.tolist()):
        expected = next(features) if token == CONTEXT else words[position]
        assert_within_rounding(embeddings[position], expected, FORWARD)
    assert next(features, None) is None


def test_tiles_of_a_batch_are_in_row_order() -> None:
    model = make_model()
    rows = [make_record((1, 1), seed=5), make_record((2,), text=10, seed=6)]
    ids = torch.stack([row.input_ids for row in rows])
    logits = model(input_ids=ids, pixel_values=torch.cat([row.pixel_values for row in rows])).logits
    for found, row in zip(logits, rows, strict=True):
        assert_within_rounding(found, run_alone(model, row), FORWARD)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (1, "12 <IMG_CONTEXT> tokens in the text, but 4 features from 1 tiles"),
        (4, "12 <IMG_CONTEXT> tokens in the text, but 16 features from 4 tiles"),
        (0, "12 <IMG_CONTEXT> tokens in the text, but 0 features from 0 tiles"),
    ],
)
def test_mismatch_of_tiles_and_tokens_reports_both_counts(tiles: int, message: str) -> None:
    record = make_record((3,))
    pixels = torch.zeros(tiles, 3, 56, 56)
    with pytest.raises(ValueError) as caught:
        make_model()(input_ids=record.input_ids[None], pixel_values=pixels)
    assert message in str(caught.value)


def test_options_are_passed_to_pixel_shuffle_and_tower() -> None:
    record = make_record((1,))
    outputs = [
        run_alone(make_model(**changes), record)
        for changes in ({}, {"ps_version": "v1"}, {"select_layer": -2}, {"select_layer": 0})
    ]
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])


# Records without images


def test_text_only_gives_the_projector_zero_gradients() -> None:
    model = freeze_tower(make_model())
    calls = count_calls(model.vision_model)
    record = make_record()
    model(**pack([record], labels=True)).loss.backward()
    assert calls == []
    for name, parameter in model.mlp1.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert all(p.grad is None for p in model.vision_model.parameters())

    alone = make_model()
    logits = alone.language_model(input_ids=record.input_ids[None], use_cache=False).logits[0]
    targets = record.labels[1:]
    torch.nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORE_INDEX).backward()
    found, expected = (
        {name: p.grad for name, p in one.language_model.named_parameters()} for one in (model, alone)
    )
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_text_only_runs_a_trained_or_required_tower(frozen: bool) -> None:
    model = make_model()
    if frozen:
        freeze_tower(model).always_run_vision = True
    calls = count_calls(model.vision_model)
    output = model(**pack([make_record()], labels=True))
    output.loss.backward()
    assert calls == [(1, 3, 56, 56)]
    trained = [*model.mlp1.parameters(), *(() if frozen else model.vision_model.parameters())]
    assert all(p.grad is not None and not p.grad.any() for p in trained)
    expected = make_model()(**pack([make_record()], labels=True)).loss
    assert torch.equal(output.loss, expected)


def test_the_tower_runs_once_for_all_tiles_of_a_pack() -> None:
    model = freeze_tower(make_model())
    calls = count_calls(model.vision_model)
    model(**pack(records()))
    assert calls == [(4, 3, 56, 56)]


def test_text_only_with_everything_frozen() -> None:
    model = make_model().requires_grad_(False)
    record = make_record()
    expected = model.language_model(input_ids=record.input_ids[None], use_cache=False).logits[0]
    assert_within_rounding(run_alone(model, record), expected, FORWARD)


# Frozen and trained towers


def test_frozen_tower_has_no_graph() -> None:
    model, seen = freeze_tower(make_model()), []
    model.vision_model.register_forward_hook(lambda _, __, output: seen.append(output))
    features = model.image_features(make_record((2,)).pixel_values)
    assert not seen[0].requires_grad and seen[0].grad_fn is None
    features.sum().backward()
    assert all(p.grad is not None for p in model.mlp1.parameters())
    unfrozen = make_model()
    unfrozen.image_features(make_record((2,)).pixel_values).sum().backward()
    assert torch.equal(model.mlp1[1].weight.grad, unfrozen.mlp1[1].weight.grad)
    assert unfrozen.vision_model.embeddings.class_embedding.grad.any()


def test_partly_trained_tower_has_a_graph() -> None:
    model = freeze_tower(make_model())
    scale = model.vision_model.encoder.layers[-1].ls2
    scale.requires_grad_(True)
    assert not model.vision_is_frozen
    model.image_features(make_record((1,)).pixel_values).sum().backward()
    assert scale.grad.any()


def test_a_frozen_tower_stays_in_evaluation_mode() -> None:
    model = make_model(vision={"drop_path_rate": 0.9})
    assert model.train().vision_model.training and model.vision_is_frozen is False
    freeze_tower(model).train()
    assert model.language_model.training and model.mlp1.training
    assert not any(module.training for module in model.vision_model.modules())
    pixels = make_record((3,)).pixel_values
    assert torch.equal(model.image_features(pixels), model.image_features(pixels))
    assert not model.eval().language_model.training


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_checkpointed_layers_keep_gradients(frozen: bool, count: int) -> None:
    plain = make_model()
    if frozen:
        freeze_tower(plain)
    saving = copy.deepcopy(plain)
    saving.checkpoint_layers(count)
    decoder = [count_calls(layer.mlp) for layer in saving.language_model.model.layers]
    vision = count_calls(saving.vision_model.encoder.layers[0].mlp)
    losses = []
    for model in (plain.train(), saving.train()):
        loss = model(**pack(records(), labels=True)).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert sum(len(calls) for calls in decoder) == len(decoder) + count
    assert len(vision) == (1 if frozen or count == 0 else 2)
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("count", "again"),
    [
        (0, "......"),
        (1, ".....x"),
        (2, "..x..x"),
        (3, ".x.x.x"),
        (4, ".xx.xx"),
        (6, "xxxxxx"),
    ],
)
def test_checkpointed_layers_are_evenly_spaced(count: int, again: str) -> None:
    model = make_model(dataclasses.replace(SHAPE, layers=6))
    model.checkpoint_layers(6)
    model.checkpoint_layers(count)  # the last call takes effect
    calls = [count_calls(layer.mlp) for layer in model.language_model.model.layers]
    model.train()(**pack(records(), labels=True)).loss.backward()
    assert "".join(".x"[len(of_layer) - 1] for of_layer in calls) == again


# Losses


def test_losses_match_a_log_softmax() -> None:
    model, rows = make_model(), records()
    output = model(**pack(rows, labels=True))
    expected = []
    for logits, row in zip(parts(model(**pack(rows)).logits, rows), rows, strict=True):
        logits = logits.double()
        exact = logits - logits.exp().sum(dim=-1, keepdim=True).log()
        expected += [
            -exact[position - 1, label]
            for position, label in enumerate(row.labels.tolist())
            if label != IGNORE_INDEX
        ]
    assert_within_rounding(output.token_losses, torch.stack(expected), FORWARD)
    torch.testing.assert_close(output.loss, output.token_losses.mean())
    assert output.logits is None


def test_token_weights() -> None:
    model, rows = make_model(), records()
    inputs = pack(rows, labels=True)
    losses = model(**inputs).token_losses
    weights = torch.linspace(0.0, 1.0, len(losses))
    found = model(**inputs, token_weights=weights).loss
    by_hand = sum(w * loss for w, loss in zip(weights.tolist(), losses.tolist(), strict=True))
    assert found.item() == pytest.approx(by_hand, rel=rounding_bound(2 * len(losses), torch.float32, 1))


def test_head_runs_only_before_supervised_tokens() -> None:
    model, rows = make_model(), records()
    calls = count_calls(model.language_model.lm_head)
    supervised = sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
    output = model(**pack(rows, labels=True))
    assert calls == [(1, supervised, 64)]
    assert output.token_losses.shape == (supervised,)
    assert 0 < supervised < sum(len(row.input_ids) for row in rows)


def test_without_labels() -> None:
    rows = records()
    output = make_model()(**pack(rows))
    assert output.logits.shape == (1, sum(len(row.input_ids) for row in rows), VOCABULARY)
    assert output.loss is None and output.token_losses is None


def test_labels_with_a_batch_are_rejected() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="single packed row"):
        make_model()(input_ids=ids, pixel_values=torch.zeros(0, 3, 56, 56), labels=ids)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_loss_of_a_pack_combines_its_records(attn: str) -> None:
    model, rows = make_model(attn=attn), records()
    separate = [model(**pack([row], labels=True)).token_losses for row in rows]
    together = model(**pack(rows, labels=True))
    assert_within_rounding(together.token_losses, torch.cat(separate), FORWARD)
    weights = torch.cat([torch.full_like(x, 1 / (len(x) * len(rows))) for x in separate])
    loss = model(**pack(rows, labels=True), token_weights=weights).loss
    mean_of_records = torch.stack([x.mean() for x in separate]).mean()
    assert_within_rounding(loss, mean_of_records, FORWARD)


# Precomputed features and positions


def results(model: InternVLChatModel, inputs: dict) -> dict[str, torch.Tensor]:
    """Return the losses and all gradients."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "token losses": output.token_losses.detach(), **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare two outputs of `results` up to rounding."""
    found, expected = dict(found), dict(expected)
    for name in ("loss", "token losses"):
        assert_within_rounding(found.pop(name), expected.pop(name), FORWARD, name=name)
    assert_same_gradients(found, expected)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare gradients relative to the largest: a small gradient may be the difference of larger terms."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        assert_within_rounding(gradient, expected[name], BACKWARD, magnitude=largest, name=name)


def with_features(model: InternVLChatModel, inputs: dict) -> dict:
    """Return the same arguments with features precomputed tile by tile."""
    inputs = dict(inputs)
    tiles = inputs.pop("pixel_values")
    features = [model.vision_features(tile[None]) for tile in tiles]
    return {**inputs, "vision_features": torch.cat(features) if features else model.empty_features()}


def positions(inputs: dict) -> dict[str, torch.Tensor]:
    """Return the positions of features and targets, found token by token."""
    ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    targets = [i for i in range(len(ids) - 1) if labels[i + 1] != IGNORE_INDEX]
    found = {
        "image_positions": [i for i, token in enumerate(ids) if token == CONTEXT],
        "label_positions": targets,
    }
    return {name: torch.tensor(value, dtype=torch.long) for name, value in found.items()}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_precomputed_features(attn: str, frozen: bool) -> None:
    model = make_model(attn=attn)
    if frozen:
        freeze_tower(model)
    inputs = pack(records(), labels=True)
    expected = results(model, inputs)
    assert ("vision_model.embeddings.class_embedding" in expected) == (not frozen)
    calls = count_calls(model.vision_model)
    given = with_features(model, inputs)
    assert given["vision_features"].shape == (4, 4, 128) and len(calls) == 4
    assert given["vision_features"].requires_grad == (not frozen)
    assert_same(results(model, given), expected)
    assert len(calls) == 4  # the forward pass did not run the tower again


def test_features_of_several_packs() -> None:
    """As in training, a frozen tower runs once for the tiles of all packs in a step."""
    model, rows = freeze_tower(make_model()), records()
    packs = [pack(rows[:2], labels=True), pack(rows[1:], labels=True)]
    tiles = [inputs.pop("pixel_values") for inputs in packs]
    features = model.vision_features(torch.cat(tiles)).split([len(part) for part in tiles])
    for inputs, of_pack, part in zip(packs, features, tiles, strict=True):
        found = results(model, {**inputs, "vision_features": of_pack})
        assert_same(found, results(model, {**inputs, "pixel_values": part}))


def test_empty_features() -> None:
    model = freeze_tower(make_model())
    inputs = pack([make_record()], labels=True)
    calls = count_calls(model.vision_model)
    given = with_features(model, inputs)
    assert given["vision_features"].shape == (0, 4, 128)
    assert given["vision_features"].shape[1:] == model.vision_features(torch.zeros(1, 3, 56, 56)).shape[1:]
    calls.clear()
    found = results(model, given)
    assert calls == []
    assert all(
        f"mlp1.{name}" in found and not found[f"mlp1.{name}"].any() for name in model.mlp1.state_dict()
    )
    assert_same(found, results(model, inputs))
    assert model.bfloat16().empty_features().dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given", [("image_positions",), ("label_positions",), ("image_positions", "label_positions")]
)
@pytest.mark.parametrize("rows", [records(), [make_record()]], ids=["with tiles", "text alone"])
def test_given_positions_match_computed_ones(rows: list[Record], given: tuple[str, ...]) -> None:
    model, inputs = make_model(), pack(rows, labels=True)
    known = {name: value for name, value in positions(inputs).items() if name in given}
    assert_same(results(model, {**inputs, **known}), results(model, inputs))


def test_positions_in_a_batch() -> None:
    model = make_model()
    rows = [make_record((1, 1), seed=5), make_record((2,), text=10, seed=6)]
    ids = torch.stack([row.input_ids for row in rows])
    pixels = torch.cat([row.pixel_values for row in rows])
    through = (ids.flatten() == CONTEXT).nonzero().flatten()
    assert through.max() >= ids.shape[1]
    found = model(input_ids=ids, pixel_values=pixels, image_positions=through).logits
    assert torch.equal(found, model(input_ids=ids, pixel_values=pixels).logits)


def test_positions_determine_features_and_targets() -> None:
    """Given positions are used as they are, even at ordinary tokens or with fewer targets than labels."""
    model, record = make_model(), make_record((1,))
    inputs = pack([record], labels=True)
    known = positions(inputs)
    losses = model(**inputs).token_losses
    assert torch.equal(model(**inputs, label_positions=known["label_positions"][1:]).token_losses, losses[1:])
    other = torch.where(record.input_ids == CONTEXT, 3, record.input_ids)[None]
    found = model(**{**inputs, "input_ids": other}, image_positions=known["image_positions"]).token_losses
    torch.testing.assert_close(found, losses, atol=1e-6, rtol=0)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("change", [-1, 1])
def test_mismatched_positions_are_rejected(change: int, features: bool) -> None:
    model, inputs = make_model(), pack([make_record((3,))], labels=True)
    known = positions(inputs)["image_positions"]
    wrong = known[:-1] if change < 0 else torch.cat([known, torch.tensor([0])])
    inputs = with_features(model, inputs) if features else inputs
    message = f"{12 + change} <IMG_CONTEXT> tokens in the text, but 12 features from 3 tiles"
    with pytest.raises(ValueError, match=message):
        model(**inputs, image_positions=wrong)


def test_mismatched_features_are_rejected() -> None:
    model, inputs = make_model(), with_features(make_model(), pack([make_record((3,))], labels=True))
    inputs["vision_features"] = inputs["vision_features"][:2]
    with pytest.raises(ValueError, match="12 <IMG_CONTEXT> tokens in the text, but 8 features from 2 tiles"):
        model(**inputs)


# Compiled blocks

MULTIPLE = 32


def padded(rows: list[Record]) -> dict:
    """Return the arguments of a forward pass over records, padded as in training with compiled blocks."""
    samples = []
    for number, row in enumerate(rows):
        where = (row.input_ids == CONTEXT).nonzero().flatten()
        encoded = EncodedConversation(row.input_ids, row.labels, where, ())
        pixels = torch.zeros(len(row.pixel_values), 2, 2, 3, dtype=torch.uint8)
        samples.append((Sample(RecordKey("set", number), str(number), encoded, pixels), True))
    inputs = pack_samples(samples, MULTIPLE).text_inputs(torch.device("cpu"))
    return {**inputs, "pixel_values": torch.cat([row.pixel_values for row in rows])}


def rows_of_length(blocks: int) -> list[Record]:
    """Return records with five tiles whose length is two tokens short of a multiple of MULTIPLE."""
    rows = [make_record((2,), seed=blocks), make_record((3,), text=4, seed=blocks + 1)]
    known = sum(len(row.input_ids) for row in rows)
    return [*rows, make_record(text=blocks * MULTIPLE - known - 4, seed=blocks + 2)]


@pytest.fixture
def dynamo():
    """Reset the compiler before and after a test."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(("frozen", "recomputed"), [(True, 1), (False, 0)])
def test_compiled_blocks_keep_gradients_for_any_length(dynamo, frozen: bool, recomputed: int) -> None:
    plain = make_model(attn="varlen")
    if frozen:
        freeze_tower(plain)
    compiled = copy.deepcopy(plain)
    names = [name for name, _ in compiled.named_parameters()], list(compiled.state_dict())
    compiled.compile_blocks(backend="aot_eager")
    assert ([name for name, _ in compiled.named_parameters()], list(compiled.state_dict())) == names
    if recomputed:
        compiled.checkpoint_layers(recomputed)
    graphs = []
    for blocks in (2, 3, 5, 4):
        inputs = padded(rows_of_length(blocks))
        assert inputs["input_ids"].shape == (1, blocks * MULTIPLE)
        assert_same(results(compiled.train(), inputs), results(plain.train(), inputs))
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[1:] == [graphs[1]] * 3


def test_padding_keeps_gradients() -> None:
    model, rows = make_model(attn="varlen"), rows_of_length(3)
    inputs = padded(rows)
    assert inputs["input_ids"].shape[1] == sum(len(row.input_ids) for row in rows) + 2
    assert_same(results(model, inputs), results(model, pack(rows, labels=True)))


# Isolation of packed records


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_packed_records_match_single_records(attn: str) -> None:
    model, rows = make_model(attn=attn), records()
    for found, row in zip(parts(model(**pack(rows)).logits, rows), rows, strict=True):
        assert_within_rounding(found, run_alone(model, row), FORWARD)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_text_of_a_record_does_not_affect_others(attn: str, changed: int) -> None:
    model, rows = make_model(attn=attn), records()
    before = parts(model(**pack(rows)).logits, rows)
    ids = rows[changed].input_ids
    other = torch.where(ids == CONTEXT, ids, (ids + 7) % CONTEXT)
    rows[changed] = dataclasses.replace(rows[changed], input_ids=other)
    after = parts(model(**pack(rows)).logits, rows)
    for number, (one, two) in enumerate(zip(before, after, strict=True)):
        if number == changed:
            assert (one - two).abs().max() > 0.1
        else:
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changed", [0, 2])
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_tiles_of_a_record_do_not_affect_others(attn: str, changed: int) -> None:
    model, rows = make_model(attn=attn), records()
    before = parts(model(**pack(rows)).logits, rows)
    rows[changed] = dataclasses.replace(rows[changed], pixel_values=-rows[changed].pixel_values)
    after = parts(model(**pack(rows)).logits, rows)
    for number, (one, two) in enumerate(zip(before, after, strict=True)):
        if number == changed:
            assert (one - two).abs().max() > 0.01
        else:
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_length_of_a_neighboring_record_has_no_effect(attn: str) -> None:
    model, middle = make_model(attn=attn), make_record((1,), seed=8)
    for before, after in ((1, 1), (20, 3), (2, 30)):
        rows = [make_record(text=before, seed=9), middle, make_record(text=after, seed=10)]
        found = parts(model(**pack(rows)).logits, rows)[1]
        assert_within_rounding(found, run_alone(model, middle), FORWARD)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_token_id_zero_is_an_ordinary_token(attn: str) -> None:
    """Swapping ids 0 and 5 everywhere only swaps the corresponding logits."""
    model, exchanged = make_model(attn=attn), make_model(attn=attn)
    order = list(range(VOCABULARY))
    order[0], order[5] = 5, 0
    with torch.no_grad():
        for layer in (
            exchanged.language_model.get_input_embeddings(),
            exchanged.language_model.get_output_embeddings(),
        ):
            layer.weight.copy_(layer.weight[order])
    rows = records()
    for position in (0, 1, -1, -2):
        rows[0].input_ids[position] = 0
    swapped = [dataclasses.replace(row, input_ids=torch.tensor(order)[row.input_ids]) for row in rows]
    found, expected = exchanged(**pack(swapped)).logits, model(**pack(rows)).logits[..., order]
    assert_within_rounding(found, expected, FORWARD)
