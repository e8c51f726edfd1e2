"""Answers match greedy decoding with full forward passes on manually built inputs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from model.conftest import make_model
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import save_tokenizer, train_tokenizer
from internvl_chat.data.sources.images import open_images
from internvl_chat.data.sources.records import Message
from internvl_chat.inference.engine import Engine, Prompt, ask
from internvl_chat.model.io.adapter import BaseModel, save_adapter
from internvl_chat.model.io.checkpoint import load_model, save_model
from internvl_chat.model.io.folders import read_auxiliary_files, write_files
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.model.modeling_internvl_chat import InternVLChatModel
from internvl_chat.train.freeze import set_trainable
from internvl_chat.utils.errors import DataError

TEXT = ["Which panel shows the scan?", "The scan is panel B.", "What is the arrow in the figure pointing at?"]
SYSTEM = "You read figures."
LENGTH = 12

PREPROCESSING = Preprocessing(
    system_text=SYSTEM, tile_size=56, tokens_per_tile=4, max_dynamic_patch=6, max_seq_length=400
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXT, 280)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> InternVLChatModel:
    return build_model(tokenizer)


@pytest.fixture(scope="module")
def engine(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    return Engine(model, tokenizer, PREPROCESSING)


def build_model(tokenizer: PreTrainedTokenizerBase) -> InternVLChatModel:
    model = make_model(llm={"vocab_size": len(tokenizer)})
    model.image_context_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model


def picture(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ids_by_hand(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], tiles: Sequence[int]
) -> torch.Tensor:
    """Return the token ids of a prompt, tokenized message by message; `{}` stands for an image."""
    left, ids = list(tiles), []
    for role, text in messages:
        while "{}" in text:
            text = text.replace("{}", "<img>" + "<IMG_CONTEXT>" * 4 * left.pop(0) + "</img>", 1)
        ids += tokenizer(f"<|im_start|>{role}\n{text}<|im_end|>\n").input_ids
    assert not left
    return torch.tensor(ids + tokenizer("<|im_start|>assistant\n").input_ids)


def pixels_by_hand(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return the tiles (N, 3, 56, 56) of images that are one tile each."""
    arrays = [np.asarray(image.convert("RGB"), np.float64) / 255 for image in pictures]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    tiles = [((array - mean) / deviation).transpose(2, 0, 1) for array in arrays]
    return torch.tensor(np.array(tiles).reshape(-1, 3, 56, 56), dtype=torch.float32)


@torch.no_grad()
def decode_greedily(
    model: InternVLChatModel, ids: torch.Tensor, pixels: torch.Tensor, length: int = LENGTH
) -> list[int]:
    """Decode greedily, with a full forward pass without a cache for each token."""
    embeddings, found = model.embed(ids[None], pixels), []
    words = model.language_model.get_input_embeddings()
    for _ in range(length):
        logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
        embeddings = torch.cat([embeddings, words(torch.tensor([[found[-1]]]))], dim=1)
    return found


WIDE = picture(112, 56, seed=3)
# Prompts, and their expected messages, number of tiles per image, and tiles.
CASES = {
    "text": (ask("What is it?"), [("user", "What is it?")], [], []),
    "long text": (ask("What is the arrow? " * 9), [("user", "What is the arrow? " * 9)], [], []),
    "one image": (ask("Which panel?", [picture()]), [("user", "{}\nWhich panel?")], [1], [picture()]),
    "an image of tiles": (
        ask("The scan?", [WIDE]),
        [("user", "{}\nThe scan?")],
        [3],
        [WIDE.crop((0, 0, 56, 56)), WIDE.crop((56, 0, 112, 56)), WIDE.resize((56, 56))],
    ),
    "several images": (
        ask("Which?", [picture(seed=1), picture(seed=2)]),
        [("user", "Fig-0: {}\nFig-1: {}\nWhich?")],
        [1, 1],
        [picture(seed=1), picture(seed=2)],
    ),
    "placeholders in the question": (
        ask("Is <image> like <image>?", [picture(seed=4), picture(seed=5)]),
        [("user", "Is {} like {}?")],
        [1, 1],
        [picture(seed=4), picture(seed=5)],
    ),
    "several messages": (
        Prompt(
            (
                Message("user", "<image>\nWhat is it?"),
                Message("assistant", "The scan."),
                Message("user", "And <image>?"),
            ),
            (picture(seed=6), picture(seed=7)),
        ),
        [("user", "{}\nWhat is it?"), ("assistant", "The scan."), ("user", "And {}?")],
        [1, 1],
        [picture(seed=6), picture(seed=7)],
    ),
}


def expected_answer(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    _, messages, tiles, pictures = CASES[name]
    ids = ids_by_hand(tokenizer, [("system", SYSTEM), *messages], tiles)
    return decode_greedily(model, ids, pixels_by_hand(pictures))


@pytest.mark.parametrize("name", CASES)
def test_greedy_decoding(
    engine: Engine, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    expected = expected_answer(model, tokenizer, name)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in expected
    assert engine.generate_ids([CASES[name][0]], max_new_tokens=LENGTH) == [expected]


def test_batch_matches_single_prompts(
    engine: Engine, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [case[0] for case in CASES.values()]
    expected = [expected_answer(model, tokenizer, name) for name in CASES]
    assert len({tuple(ids) for ids in expected}) == len(CASES)
    assert engine.generate_ids(prompts, max_new_tokens=LENGTH) == expected
    assert engine.generate_ids(prompts[::-1], max_new_tokens=LENGTH) == expected[::-1]


def test_answer_depends_on_the_image(engine: Engine) -> None:
    answers = engine.generate_ids(
        [ask("Which?", [picture(seed=seed)]) for seed in range(4)], max_new_tokens=LENGTH
    )
    assert len({tuple(ids) for ids in answers}) > 1


def test_answer_ends_at_im_end(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    names = list(CASES)
    long = [expected_answer(model, tokenizer, name) for name in names]
    # Swapping two rows of the head makes the model end its answer in place of the fourth token.
    token = long[0][3]
    head = model.language_model.lm_head.weight
    with torch.no_grad():
        head[[token, end]] = head[[end, token]]
    expected = [ids[: ids.index(token)] if token in ids else ids for ids in long]
    assert len(expected[0]) <= 3 and len({len(ids) for ids in expected}) > 1
    engine = Engine(model, tokenizer, PREPROCESSING)
    prompts = [CASES[name][0] for name in names]
    assert engine.generate_ids(prompts, max_new_tokens=LENGTH) == expected
    assert [engine.generate_ids([prompt], max_new_tokens=LENGTH)[0] for prompt in prompts] == expected


def test_answer_has_no_control_tokens(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer(
        "  <IMG_CONTEXT><img>The <ref>scan</ref><|endoftext|> is<box>[[1]]</box> panel B. \n<|im_start|>"
    ).input_ids
    monkeypatch.setattr(
        engine, "generate_ids", lambda prompts, max_new_tokens, sampling: [ids, []][:max_new_tokens]
    )
    assert engine.answer([ask("a"), ask("b")], max_new_tokens=2) == [
        "The <ref>scan</ref> is<box>[[1]]</box> panel B.",
        "",
    ]


def test_max_new_tokens(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = CASES["text"][0]
    answers = [engine.generate_ids([prompt], max_new_tokens=n)[0] for n in (1, 5)]
    assert [len(answer) for answer in answers] == [1, 5] and answers[0] == answers[1][:1]


@pytest.mark.parametrize(
    ("question", "images", "text"),
    [
        ("Why?", 0, "Why?"),
        ("Why?", 1, "<image>\nWhy?"),
        ("Why?", 3, "Fig-0: <image>\nFig-1: <image>\nFig-2: <image>\nWhy?"),
        ("<image> Why?", 1, "<image> Why?"),
        ("Is <image> as <image>?", 2, "Is <image> as <image>?"),
        ("Is <image>?", 2, "Is <image>?"),
        ("What does <image> mean?", 0, "What does <image> mean?"),
    ],
)
def test_placement_of_images(question: str, images: int, text: str) -> None:
    pictures = [picture(seed=seed) for seed in range(images)]
    prompt = ask(question, pictures)
    assert prompt.messages == (Message("user", text),)
    assert list(prompt.images) == pictures


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ask("Is <image>?", [picture(), picture()]), "1 <image> placeholder, but 2 images"),
        (ask("Is <image>?"), "1 <image> placeholder, but 0 images"),
        (Prompt((Message("user", "Why?"),), (picture(),)), "0 <image> placeholders, but 1 image"),
        (
            Prompt((Message("assistant", "<image>"), Message("user", "Why?")), (picture(),)),
            "0 <image> placeholders",
        ),
    ],
)
def test_number_of_placeholders_and_images_must_match(engine: Engine, prompt: Prompt, message: str) -> None:
    with pytest.raises(DataError, match=message):
        engine.answer([ask("Why?"), prompt])


def test_a_placeholder_in_an_earlier_answer_is_text(
    engine: Engine, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = Prompt((Message("user", "Why?"), Message("assistant", "See <image>."), Message("user", "What?")))
    messages = [("system", SYSTEM), ("user", "Why?"), ("assistant", "See <image>."), ("user", "What?")]
    expected = decode_greedily(model, ids_by_hand(tokenizer, messages, []), pixels_by_hand([]))
    assert engine.generate_ids([prompt], max_new_tokens=LENGTH) == [expected]


def test_system_message_of_the_prompt(
    engine: Engine, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = Prompt((Message("system", "Be brief."), Message("user", "What?")))
    ids = ids_by_hand(tokenizer, [("system", "Be brief."), ("user", "What?")], [])
    assert engine.generate_ids([prompt], max_new_tokens=LENGTH) == [
        decode_greedily(model, ids, pixels_by_hand([]))
    ]


def test_too_long_prompt(engine: Engine) -> None:
    with pytest.raises(DataError, match="max_seq_length 400"):
        engine.answer([ask("What is the arrow? " * 200)])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode(engine: Engine, mode: str) -> None:
    image = picture().convert(mode)
    prompts = [ask("Which?", [image]), ask("Which?", [image.convert("RGB")])]
    one, other = engine.generate_ids(prompts, max_new_tokens=LENGTH)
    assert one == other


@pytest.mark.parametrize("transpose", [False, True])
def test_rotation_of_an_opened_image(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, transpose: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(112, 56).save(tmp_path / "turned.png", exif=exif)
    engine = Engine(model, tokenizer, PREPROCESSING.with_options(exif_transpose=transpose))
    image = Image.open(tmp_path / "turned.png")
    [decoded] = open_images([tmp_path / "turned.png"], engine.encoder.preprocessing.image_options)
    assert decoded.size == ((56, 112) if transpose else (112, 56))
    opened, expected = ask("Which?", [image]), ask("Which?", [decoded])
    assert engine.encode(opened).grids == engine.encode(expected).grids
    tiles = [
        engine.encoder.tiles(prompt.images, engine.encode(prompt).grids) for prompt in (opened, expected)
    ]
    assert torch.equal(*tiles)


def test_placeholder_of_another_framework() -> None:
    with pytest.raises(DataError, match="unsupported placeholder '<image 1>'; use <image> instead"):
        ask("Is <image 1> red?", [picture()])
    assert ask("Is <image> like <image 1>?", [picture()]).images


def test_model_is_in_evaluation_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(tokenizer).train()
    assert not Engine(model, tokenizer, PREPROCESSING).model.training


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "model"
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    PREPROCESSING.save(folder)
    return folder


def test_from_a_folder(checkpoint: Path, engine: Engine) -> None:
    loaded = Engine.from_checkpoint(checkpoint, device="cpu")
    assert loaded.encoder.preprocessing == PREPROCESSING
    assert loaded.device == torch.device("cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    prompts = [case[0] for case in CASES.values()]
    assert loaded.generate_ids(prompts, max_new_tokens=4) == engine.generate_ids(prompts, max_new_tokens=4)


def test_from_a_folder_with_another_tile_limit(
    checkpoint: Path, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    loaded = Engine.from_checkpoint(checkpoint, device="cpu", max_dynamic_patch=1)
    assert loaded.encoder.preprocessing.max_dynamic_patch == 1
    ids = ids_by_hand(tokenizer, [("system", SYSTEM), ("user", "{}\nThe scan?")], [1])
    expected = decode_greedily(model, ids, pixels_by_hand([WIDE.resize((56, 56))]))
    assert loaded.generate_ids([CASES["an image of tiles"][0]], max_new_tokens=LENGTH) == [expected]


def test_from_adapters_whose_base_has_moved(
    checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    trained = load_model(checkpoint, image_context_id=context)
    add_lora(trained, llm_rank=4)
    set_trainable(trained, freeze_mlp=True, freeze_backbone=True)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    save_adapter(trained, tmp_path / "adapter", BaseModel("/gone", weights_digest(checkpoint)))
    write_files(read_auxiliary_files(checkpoint), tmp_path / "adapter")
    engine = Engine.from_checkpoint(tmp_path / "adapter", device="cpu", base=checkpoint)
    prompt, messages, tiles, pictures = CASES["one image"]
    ids = ids_by_hand(tokenizer, [("system", SYSTEM), *messages], tiles)
    expected = decode_greedily(trained.eval(), ids, pixels_by_hand(pictures))
    assert engine.generate_ids([prompt], max_new_tokens=LENGTH) == [expected]
