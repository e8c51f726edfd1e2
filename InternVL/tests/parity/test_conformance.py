"""All published values of the reference implementation, within tolerance (see conformance/README.md)."""

import hashlib
import json
import tarfile
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from helpers import flags

from internvl_chat.convert.export import export_hf
from internvl_chat.convert.merge import merge
from internvl_chat.data.batching.collator import pack_samples
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import normalize_tiles, plan_grid
from internvl_chat.data.encode.tokenizer import image_context_id, load_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.model.io.checkpoint import load_model
from internvl_chat.model.io.folders import read_config
from internvl_chat.train.internvl_chat_finetune import main as train

FILES = ("boundingboxVQA", "compound_image", "extra", "multiple_subimage", "puretext", "single_subimage",
         "subimage_option")  # fmt: skip
PIXELS_ARE_EXACT = int(PIL.__version__.split(".")[0]) == 13


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def read_json(path):
    return json.loads(path.read_text())


def record_set(shared, file, encoder) -> RecordSet:
    spec = DatasetSpec(file, shared / "pmc_mi/images", shared / f"pmc_mi/jsonl/{file}.jsonl")
    return RecordSet(spec, encoder)


def test_all_grids(shared):
    rows = read_json(shared / "conformance/golden_grids.json")
    assert len(rows) == 2508
    for width, height, fewest, most, columns, cut_rows, tiles in rows:
        grid = plan_grid(width, height, min_tiles=fewest, max_tiles=most, tile_size=448, use_thumbnail=True)
        assert (grid.columns, grid.rows, grid.tiles) == (columns, cut_rows, tiles), (
            width,
            height,
            fewest,
            most,
        )


@pytest.fixture(scope="module")
def internvl3_tokenizer(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with tarfile.open(shared / "internvl3_tokenizer.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    tokenizer, added = load_tokenizer(folder / "internvl3_tokenizer")
    assert added == 0
    return tokenizer


@pytest.mark.parametrize("most", [1, 6, 12])
@pytest.mark.parametrize("file", FILES)
def test_samples(shared, internvl3_tokenizer, file, most):
    rows = read_json(shared / "conformance/golden_samples.json")[f"{file}@{most}"]
    encoder = RecordEncoder(internvl3_tokenizer, Preprocessing(max_dynamic_patch=most))
    records = record_set(shared, file, encoder)
    assert len(records) == len(rows)
    for index, row in enumerate(rows):
        sample = records.load(index)
        ids, labels = sample.encoded.input_ids.numpy(), sample.encoded.labels.numpy()
        assert sample.id == row["id"]
        assert (len(ids), int((labels != -100).sum())) == (row["len"], row["n_sup"])
        assert (digest(ids), digest(labels)) == (row["ids"], row["labels"]), row["id"]
        assert len(sample.tiles) == row["flags"]
        if not row["flags"]:
            continue  # a blank tile that does not affect the result
        pixels = normalize_tiles(sample.tiles, "imagenet").numpy()
        if PIXELS_ARE_EXACT:
            assert digest(sample.tiles.numpy()) == row["tiles_u8"]
            assert digest(pixels) == row["px"]
        assert pixels.mean(dtype=np.float64) == pytest.approx(row["px_mean"], abs=1e-3)
        assert pixels.std(dtype=np.float64) == pytest.approx(row["px_std"], abs=1e-3)


@pytest.fixture(scope="module")
def golden(shared):
    return read_json(shared / "conformance/golden_tiny.json")


@pytest.fixture(scope="module")
def encoder(shared):
    folder = shared / "conformance/tiny"
    tokenizer, _ = load_tokenizer(folder)
    preprocessing = replace(Preprocessing.from_folder(folder, read_config(folder)), max_dynamic_patch=6)
    return RecordEncoder(tokenizer, preprocessing)


def load(folder, encoder, attn="varlen"):
    return load_model(folder, image_context_id=image_context_id(encoder.tokenizer), attn=attn).eval()


def run(model, sample, *, labels=True):
    pack = pack_samples([(sample, True)])
    with torch.inference_mode():
        return model(
            input_ids=pack.input_ids,
            pixel_values=normalize_tiles(pack.tiles, "imagenet"),
            labels=pack.labels if labels else None,
            position_ids=pack.position_ids,
            cu_seq_lens=pack.cu_seq_lens,
            max_length=pack.max_length,
        )


@pytest.mark.parametrize("attn", ["varlen", "sdpa", "eager"])
def test_losses_and_logits(shared, golden, encoder, attn):
    model = load(shared / "conformance/tiny", encoder, attn)
    sets = {file: record_set(shared, file, encoder) for file in FILES}
    assert len(golden["per_sample"]) == 54
    for name, row in golden["per_sample"].items():
        file, index = name.rsplit("-", 1)
        sample = sets[file].load(int(index))
        assert len(sample.encoded.input_ids) == row["n"]
        assert digest(sample.encoded.input_ids.numpy()) == row["ids"]
        assert digest(sample.encoded.labels.numpy()) == row["labels"]
        assert run(model, sample).loss.item() == pytest.approx(row["loss"], abs=1e-4), name
        logits = run(model, sample, labels=False).logits[0]
        np.testing.assert_allclose(logits[-1, :8].numpy(), row["logit_last"], atol=1e-4)
        assert logits.abs().mean().item() == pytest.approx(row["logit_abs_mean"], abs=1e-4)


def test_trained_lora_of_the_reference(shared, golden, encoder):
    model = load(shared / "conformance/tiny_lora_trained", encoder)
    sample = record_set(shared, "boundingboxVQA", encoder).load(0)
    expected = golden["lora_trained_loss_first_sample"]
    assert run(model, sample).loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("form", ["merged", "exported", "exported and back"])
def test_trained_lora_of_the_reference_merged(shared, golden, encoder, tmp_path, form):
    wrapped, folder = shared / "conformance/tiny_lora_trained", tmp_path / form
    if form == "merged":
        merge(wrapped, folder)
    elif form == "exported":
        export_hf(wrapped, folder)
    else:
        merge(export_hf(wrapped, tmp_path / "hf").folder, folder)
    sample = record_set(shared, "boundingboxVQA", encoder).load(0)
    expected = golden["lora_trained_loss_first_sample"]
    assert run(load(folder, encoder), sample).loss.item() == pytest.approx(expected, abs=1e-4)


def test_greedy_tokens(shared, golden, encoder):
    engine = Engine(
        load(shared / "conformance/tiny", encoder, "sdpa"), encoder.tokenizer, encoder.preprocessing
    )
    prompts = []
    for file, index in (("boundingboxVQA", 0), ("multiple_subimage", 1)):
        records = record_set(shared, file, encoder)
        record = records.record(index)
        images = [PIL.Image.open(records.spec.root / name) for name in record.images]
        prompts.append(Prompt(record.messages[:1], images))
    assert engine.generate_ids(prompts, max_new_tokens=16) == golden["greedy16"]


@pytest.fixture(scope="module")
def first_four(shared, tmp_path_factory):
    """Meta file of the first four records of each task, with the files sorted by name."""
    folder = tmp_path_factory.mktemp("first_four")
    meta = {}
    for file in sorted(set(FILES) - {"extra"}):
        lines = (shared / f"pmc_mi/jsonl/{file}.jsonl").read_text(encoding="utf-8").splitlines()[:4]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        meta[file] = {
            "root": str(shared / "pmc_mi/images"),
            "annotation": str(folder / f"{file}.jsonl"),
            "data_augment": False,
            "repeat_time": 1,
        }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize(
    ("name", "start", "own"),
    [
        ("train_full", "tiny", {"learning_rate": 1e-3}),
        (
            "train_lora",
            "tiny_lora_init",
            {"learning_rate": 5e-3, "use_llm_lora": 4, "freeze_llm": True, "freeze_mlp": True},
        ),
    ],
)
def test_training_trajectories(
    shared, golden, first_four, tmp_path, metrics, name, start, own, grad_checkpoint
):
    argv = flags(
        model_name_or_path=shared / "conformance" / start,
        meta_path=first_four,
        output_dir=tmp_path / "run",
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        warmup_ratio=0,
        weight_decay=0,
        max_grad_norm=0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        loss_reduction="token",
        lora_dropout=0,
        save_strategy="no",
        grad_checkpoint=grad_checkpoint,
        **own,
    )
    assert train(argv) == 0
    rows = metrics(tmp_path / "run")
    assert len(rows) == len(golden[name]) == 12
    for row, expected in zip(rows, golden[name], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-3)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], abs=2e-3)
