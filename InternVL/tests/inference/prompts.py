"""A small model and varied prompts for the inference tests."""

import random

import numpy as np
from model.conftest import make_model
from PIL import Image

from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.inference.engine import Engine, Prompt, ask

TEXT = ["Which panel shows the scan?", "The scan is panel B.", "What is the arrow in the figure pointing at?"]
PREPROCESSING = Preprocessing(
    system_text="You read figures.", tile_size=56, tokens_per_tile=4, max_dynamic_patch=6, max_seq_length=400
)


def make_engine(**model) -> Engine:
    """Return an engine with a small model with random weights (see `make_model`)."""
    tokenizer = train_tokenizer(TEXT, 280)
    llm = {"vocab_size": len(tokenizer), **model.pop("llm", {})}
    made = make_model(llm=llm, **model)
    made.image_context_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return Engine(made, tokenizer, PREPROCESSING)


def picture(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Return prompts with 1 to 60 words, 0 to 4 images of different shapes, and one or more messages."""
    rng, prompts = random.Random(seed), []
    for number in range(count):
        words = rng.choices(["which", "panel", "shows", "the", "scan"], k=rng.randint(1, 60))
        sizes = [rng.choice([(56, 56), (112, 56), (170, 60)]) for _ in range(rng.choice([0, 1, 1, 2, 4]))]
        images = [picture(*size, seed=10 * number + i) for i, size in enumerate(sizes)]
        prompt = ask(f"{' '.join(words)} {number}?", images)
        prompts.append(prompt.then("the scan.", "And the arrow?") if number % 5 == 0 else prompt)
    return prompts
