"""Sanity checks: logged text, rejected runs, and the tolerance of the packing check."""

import dataclasses
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.data.encode.encoder import EncodedConversation
from internvl_chat.data.encode.preprocessing import PREPROCESSING_FILE, Preprocessing
from internvl_chat.data.record_set import RecordKey, Sample
from internvl_chat.inference.token_losses import pack_losses
from internvl_chat.model.attention import varlen_attention
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.train.preflight import sanity
from internvl_chat.train.preflight.sanity import (
    check_packing,
    check_preprocessing,
    first_samples,
    pack_samples,
    run_sanity_checks,
    show_supervision,
)
from internvl_chat.utils.errors import DataError, TrainingError, UsageError

DTYPES = [torch.float32, torch.bfloat16]

# ---- preprocessing


def test_preprocessing_must_match_the_checkpoint(tmp_path):
    stored = Preprocessing(tile_size=56, tokens_per_tile=4)
    check_preprocessing(tmp_path, stored)  # nothing to compare without a preprocessing file
    stored.save(tmp_path)
    assert (tmp_path / PREPROCESSING_FILE).is_file()
    check_preprocessing(tmp_path, dataclasses.replace(stored, max_dynamic_patch=3, max_seq_length=99))
    changed = dataclasses.replace(stored, tile_size=112, normalize_type="siglip")
    with pytest.raises(UsageError) as caught:
        check_preprocessing(tmp_path, changed)
    assert len(caught.value.problems) == 2
    assert "tile_size is 112, but the checkpoint has 56 in " in str(caught.value)
    assert "normalize_type is 'siglip', but the checkpoint has 'imagenet' in " in str(caught.value)


# ---- records and labels


def sample(ids: list[int], supervised: int) -> Sample:
    """Return a text record with labels for its last `supervised` tokens."""
    tokens = torch.tensor(ids)
    labels = torch.where(torch.arange(len(ids)) < len(ids) - supervised, IGNORE_INDEX, tokens)
    encoded = EncodedConversation(tokens, labels, torch.zeros(0, dtype=torch.int64), ())
    return Sample(RecordKey("qa", 0), None, encoded, torch.zeros(0, 56, 56, 3, dtype=torch.uint8))


class Records:
    """A fake dataset; None is an unusable record."""

    def __init__(self, *samples: Sample | None, name: str = "qa") -> None:
        self.samples, self.spec = samples, SimpleNamespace(name=name)

    def load(self, index: int) -> Sample:
        if self.samples[index] is None:
            raise DataError("broken")
        return self.samples[index]


def data_of(*sets: Records, skip_bad: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        sets=sets, skip_bad=skip_bad, indices=lambda number: torch.arange(len(sets[number].samples))
    )


class Words:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_first_samples_skips_unusable_records():
    good = [sample([1, 2, number], 1) for number in range(3)]
    data = data_of(Records(None, good[0], None, good[1], good[2]), skip_bad=True)
    assert first_samples(data, 0, 2) == good[:2]
    assert first_samples(data, 0, 9) == good
    with pytest.raises(DataError, match="broken"):
        first_samples(data_of(Records(None, good[0])), 0, 2)


def test_first_supervised_span_is_logged(caplog):
    several = sample([1, 2, 3, 4, 5, 6], 5)
    several.encoded.labels[3] = IGNORE_INDEX
    data = data_of(
        Records(None, several),
        Records(sample([7] * 100, 90), name="long"),
        Records(None, name="empty"),
        skip_bad=True,
    )
    with caplog.at_level(logging.INFO):
        show_supervision(data, Words())
    lines = [record.message for record in caplog.records]
    assert lines == [
        "qa: first supervised span: '2 3'",
        f"long: first supervised span: {'7 ' * 80 + ' ...'!r}",
    ]


def test_dataset_without_labels_is_rejected():
    with pytest.raises(TrainingError, match="qa: the first record has no supervised tokens"):
        show_supervision(data_of(Records(sample([1, 2], 0))), Words())


# ---- packing


def attention(name: str, kernel) -> str:
    """Register an attention kernel that is called like `varlen_attention`."""
    AttentionInterface.register(name, kernel)
    return name


def leaks(module, *inputs, cu_seq_lens_q=None, max_length_q=None, **options):
    """Ignore the record boundaries: a single segment."""
    return varlen_attention(module, *inputs, **options)


def leaks_in_one_layer(module, *inputs, **options):
    return (leaks if module.layer_idx == 1 else varlen_attention)(module, *inputs, **options)


def rounds(module, *inputs, cu_seq_lens_q=None, **options):
    """Correct, but packed rows are rounded differently, as by a GPU kernel with a different tiling."""
    out, _ = varlen_attention(module, *inputs, cu_seq_lens_q=cu_seq_lens_q, **options)
    if len(cu_seq_lens_q) > 2:
        signs = torch.randn(out.shape, generator=torch.Generator().manual_seed(module.layer_idx)).sign()
        out = (out.double() * (1 + torch.finfo(out.dtype).eps / 2 * signs)).to(out.dtype)
    return out, None


def load(folder, dtype: torch.dtype, attn: str = "varlen", confidence: float = 10.0):
    """Load the tiny model with weights scaled as after training, so that attention and logits matter."""
    model = load_model(folder, image_context_id=0, dtype=dtype, attn=attn)
    with torch.no_grad():
        for name, weight in model.language_model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(confidence if "lm_head" in name else 3.0)
    return model.train()


def random_samples(count: int = 3, supervised: int = 8) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        sample(torch.randint(10, 300, (30 + 7 * i,), generator=generator).tolist(), supervised)
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn", ["varlen", "sdpa", "eager"])
def test_isolated_attention_passes(tiny_model, dtype, attn, caplog):
    model = load(tiny_model, dtype, attn)
    with caplog.at_level(logging.INFO):
        check_packing(model, random_samples(), "imagenet")
    assert "packing: token losses of packed and single records differ by" in caplog.text
    assert model.training


# In bf16 the loss of a single affected token (2 records, 1 token each) can be within rounding error.
LEAKS = [(*case, dtype) for case in ((2, 3), (2, 20), (5, 1), (5, 3), (5, 20)) for dtype in DTYPES]


@pytest.mark.parametrize(("count", "supervised", "dtype"), [(2, 1, torch.float32), *LEAKS])
def test_leaking_attention_is_rejected(tiny_model, dtype, count, supervised):
    model = load(tiny_model, dtype, attention("leaks", leaks))
    with pytest.raises(TrainingError) as caught:
        check_packing(model, random_samples(count, supervised), "imagenet")
    message = str(caught.value)
    assert "attention 'leaks' leaks between packed records on this machine: " in message
    assert "; use a different kernel (--attn)" in message
    assert model.training


@pytest.mark.parametrize("dtype", DTYPES)
def test_leak_of_an_untrained_model_is_detected(tiny_model, dtype):
    model = load_model(tiny_model, image_context_id=0, dtype=dtype, attn=attention("leaks", leaks))
    with pytest.raises(TrainingError):
        check_packing(model, random_samples(), "imagenet")


@pytest.mark.parametrize("dtype", DTYPES)
def test_leak_in_one_layer_is_rejected(tiny_model, dtype):
    model = load(tiny_model, dtype, attention("leaks_in_one_layer", leaks_in_one_layer))
    with pytest.raises(TrainingError):
        check_packing(model, random_samples(), "imagenet")


def answered(model, supervised: int, seed: int) -> list[Sample]:
    """Two records whose answers are predicted by the model."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(10, 300, (length,), generator=generator).tolist() for length in (30, 37)]
    for ids in prompts:
        for _ in range(supervised):
            with torch.no_grad():
                logits = model.language_model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    return [sample(ids, supervised) for ids in prompts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("confidence", "range_of_losses"), [(2.0, (5, 6)), (20.0, (1, 2)), (60.0, (0, 1))])
def test_rounding_of_short_answers_passes(tiny_model, dtype, confidence, range_of_losses):
    """Answers of one to five tokens with low or high confidence.

    In bf16, a tolerance of 2 % plus 0.02 for the mean loss of a record would reject some of them.
    """
    model = load(tiny_model, dtype, attention("rounds", rounds), confidence).eval()
    plain = load(tiny_model, dtype, confidence=confidence).eval()
    losses, rejected = [], 0
    for seed, supervised in itertools.product(range(6), (1, 2, 5)):
        samples = answered(plain, supervised, seed)
        packed = pack_losses(model, pack_samples([(one, True) for one in samples]), "imagenet")
        single = [pack_losses(model, pack_samples([(one, True)]), "imagenet")[0] for one in samples]
        means = [torch.stack([token_losses.mean() for token_losses in way]) for way in (packed, single)]
        rejected += not torch.allclose(*means, rtol=2e-2, atol=2e-2)
        losses.append(means[1].mean())
        check_packing(model, samples, "imagenet")
    assert range_of_losses[0] < torch.stack(losses).mean() < range_of_losses[1]
    if dtype == torch.bfloat16 and confidence == 60:
        assert rejected


def test_non_finite_losses_are_rejected(tiny_model):
    model = load(tiny_model, torch.float32)
    with torch.no_grad():
        model.language_model.lm_head.weight[:] = torch.nan
    with pytest.raises(TrainingError) as caught:
        check_packing(model, random_samples(), "imagenet")
    # Attention is not at fault: a single record has the same losses.
    assert "3 of the first 3 records have non-finite losses, even unpacked" in str(caught.value)
    assert "qa 0" in str(caught.value) and "attention" not in str(caught.value)
    assert model.training


def test_non_finite_losses_only_when_packed_are_an_attention_error(tiny_model):
    def overflows(module, *inputs, cu_seq_lens_q=None, **options):
        out, _ = varlen_attention(module, *inputs, cu_seq_lens_q=cu_seq_lens_q, **options)
        return out * (torch.nan if len(cu_seq_lens_q) > 2 else 1), None

    model = load(tiny_model, torch.float32, attention("overflows", overflows))
    with pytest.raises(TrainingError, match="attention 'overflows' leaks between packed records"):
        check_packing(model, random_samples(), "imagenet")


def test_compiled_blocks_are_not_compiled_for_the_check(tiny_model):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = load(tiny_model, torch.float32)
    model.language_model.get_decoder().layers[0].compile(backend=backend, dynamic=True)
    samples = random_samples()
    check_packing(model, samples, "imagenet")
    assert not compiled
    pack = pack_samples([(one, True) for one in samples])
    model(**pack.text_inputs(torch.device("cpu")), pixel_values=torch.zeros(0, 3, 56, 56)).loss.backward()
    assert compiled


# ---- all of them


@pytest.mark.parametrize("usable", [True, False])
def test_run_sanity_checks(tiny_model, tmp_path, monkeypatch, usable):
    called = []
    monkeypatch.setattr(sanity, "check_preprocessing", lambda *args: called.append(("preprocessing", *args)))
    monkeypatch.setattr(sanity, "check_packing", lambda *args: called.append(("packing", *args)))
    one = sample([1, 2, 3], 1)
    data = data_of(Records(one if usable else None, None), skip_bad=True)
    preprocessing = Preprocessing(tile_size=56, tokens_per_tile=4)
    run_sanity_checks(tmp_path, "model", data, Words(), preprocessing)
    expected = [("preprocessing", tmp_path, preprocessing), ("packing", "model", [one], "imagenet")]
    assert called == expected[: 1 + usable]
