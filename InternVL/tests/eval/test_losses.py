"""Loss of each record, compared with an independent computation from token ids, labels and pixels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rounding_bound, terms_of
from model.conftest import make_model
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.eval.losses import RecordLoss, losses
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.utils.errors import DataError

SYSTEM = "You read figures."
PREPROCESSING = Preprocessing(
    system_text=SYSTEM, tile_size=56, tokens_per_tile=4, max_dynamic_patch=1, max_seq_length=400
)
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

RECORDS = {
    "text": [
        {"id": "t0", "conversations": [("human", "What is it?"), ("gpt", "A scan of the chest.")]},
        {
            "conversations": [
                ("system", "Be brief."),
                ("human", "Why?"),
                ("gpt", "B"),
                ("human", "So?"),
                ("gpt", "No."),
            ]
        },
    ],
    "figures": [
        {
            "id": 7,
            "image": "0.png",
            "conversations": [("human", "<image>\nWhich panel?"), ("gpt", "Panel B.")],
        },
        {
            "id": 8,
            "image": ["0.png", "1.png"],
            "conversations": [("human", "Fig-0: <image>\nFig-1: <image>\nSame?"), ("gpt", "The same.")],
        },
        {"id": 9, "image": "1.png", "conversations": [("human", "<image>\nWhich?"), ("gpt", "C")]},
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["What is it? A scan of the chest.", "Which panel? Panel B."], 280)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> InternVLChatModel:
    model = make_model(llm={"vocab_size": len(tokenizer)})
    model.image_context_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model


@pytest.fixture
def sets(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> list[RecordSet]:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = []
    for name, records in RECORDS.items():
        lines = []
        for record in records:
            messages = [{"from": role, "value": text} for role, text in record["conversations"]]
            lines.append(json.dumps({**record, "conversations": messages}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        spec = DatasetSpec(name, root=tmp_path, annotation=tmp_path / f"{name}.jsonl")
        found.append(RecordSet(spec, RecordEncoder(tokenizer, PREPROCESSING)))
    return found


def expected_loss(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, record: dict, folder: Path
) -> tuple[float, int]:
    """Return the mean -log p over the assistant messages with their end tokens, and the token count."""
    messages: Sequence[tuple[str, str]] = record["conversations"]
    if messages[0][0] != "system":
        messages = [("system", SYSTEM), *messages]
    image = f"<img>{'<IMG_CONTEXT>' * 4}</img>"
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    ids, supervised = [], []
    for role, text in messages:
        head = tokenizer(f"<|im_start|>{roles[role]}\n").input_ids
        body = tokenizer(text.replace("<image>", image)).input_ids
        tail = tokenizer("<|im_end|>\n").input_ids
        assert len(tail) == 2
        ids += head + body + tail
        supervised += [False] * len(head) + [role == "gpt"] * (len(body) + 1) + [False]
    names = record.get("image", [])
    arrays = [
        np.asarray(Image.open(folder / n), np.float64) / 255
        for n in ([names] if isinstance(names, str) else names)
    ]
    pixels = np.array([((a - MEAN) / DEVIATION).transpose(2, 0, 1) for a in arrays]).reshape(-1, 3, 56, 56)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ids]), pixel_values=torch.tensor(pixels, dtype=torch.float32)
        ).logits[0]
    exact = logits.double() - logits.double().exp().sum(dim=-1, keepdim=True).log()
    losses = [-exact[i - 1, ids[i]].item() for i in range(len(ids)) if supervised[i]]
    return sum(losses) / len(losses), len(losses)


def test_every_record_in_order(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, sets: list[RecordSet], tmp_path: Path
) -> None:
    found = list(losses(model, sets, "imagenet"))
    keys = [(name, index) for name, records in RECORDS.items() for index in range(len(records))]
    assert [(row.dataset, row.index) for row in found] == keys
    assert [row.id for row in found] == ["t0", None, "7", "8", "9"]
    for row in found:
        loss, supervised = expected_loss(model, tokenizer, RECORDS[row.dataset][row.index], tmp_path)
        assert row.num_supervised == supervised
        assert row.loss == pytest.approx(loss, abs=rounding_bound(terms_of(model), torch.float32, loss)), row
    assert len({round(row.loss, 3) for row in found}) == len(found)


def test_limit_applies_to_each_dataset(model: InternVLChatModel, sets: list[RecordSet]) -> None:
    everything = list(losses(model, sets, "imagenet"))
    for limit in (1, 2, 10):
        found = list(losses(model, sets, "imagenet", limit=limit))
        assert found == [row for row in everything if row.index < limit]


def test_pixel_statistics(model: InternVLChatModel, sets: list[RecordSet]) -> None:
    by_name = {name: list(losses(model, sets, name)) for name in ("imagenet", "siglip")}
    for one, other in zip(*by_name.values(), strict=True):
        assert (one.loss == other.loss) == (one.dataset == "text")


def test_model_is_in_evaluation_mode_without_gradients(
    tokenizer: PreTrainedTokenizerBase, sets: list[RecordSet]
) -> None:
    model = make_model(llm={"vocab_size": len(tokenizer), "attention_dropout": 0.5}, vision={"dropout": 0.5})
    model.image_context_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model.train()
    first, second = (list(losses(model, sets, "imagenet")) for _ in range(2))
    assert first == second
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_error_contains_the_unusable_record(
    model: InternVLChatModel, sets: list[RecordSet], tmp_path: Path
) -> None:
    (tmp_path / "1.png").unlink()
    rows = losses(model, sets, "imagenet")
    found = []
    with pytest.raises(DataError, match=r"figures\.jsonl, line 2.*'8'.*1\.png does not exist"):
        found.extend(rows)
    assert all(isinstance(row, RecordLoss) for row in found)
