"""Synthetic records with the token and tile counts of the six published datasets."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.data.synthetic.sample_data import write_sample_data
from internvl_chat.train.planning.workload import PUBLISHED_SETS

# Words that are single InternVL3 tokens when preceded by a space.
_WORDS = """
    the of and in to with for is are was by that this from an image figure panel shows shown left right
    upper lower cell cells tissue normal group control patient patients study results data bone lung heart
    liver brain blood level high low increase after before treatment time area region dark bright signal
    between first second both each large small positive negative red green blue line mean significant
""".split()  # noqa: SIM905
# Tokens per record for the system message and the message headers, and per image for its label and markers.
_FRAME_TOKENS = 62
_IMAGE_FRAME_TOKENS = 7
_TILE_TOKENS = 256
_RECORDS_PER_SET = 40


@dataclass(frozen=True)
class Counts:
    """Mean counts per record in a dataset, measured with the InternVL3 tokenizer and one tile per image.

    Attributes:
        tokens: tokens, without the context that precedes the question.
        supervised: supervised tokens.
        tiles: image tiles.
    """

    tokens: int
    supervised: int
    tiles: float


COUNTS = {
    name: Counts(published.tokens[0], published.supervised, published.tiles)
    for name, published in PUBLISHED_SETS.items()
}


def write_synthetic_records(folder: Path, context_tokens: int) -> Path:
    """Write figures, the records of all datasets, and a meta file; return the path to the meta file.

    Args:
        folder: folder to create.
        context_tokens: mean number of tokens of the context before each question.
    """
    sample = json.loads(
        write_sample_data(folder / "figures", train=8, held_out=1)["train"].read_text("utf-8")
    )
    root = Path(next(iter(sample.values()))["root"])
    figures = sorted(path.name for path in root.iterdir())
    rng = random.Random(0)
    meta = {}
    for name, counts in COUNTS.items():
        records = [_record(counts, context_tokens, figures, rng) for _ in range(_RECORDS_PER_SET)]
        annotation = folder / f"{name}.jsonl"
        annotation.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        meta[name] = {
            "root": str(root),
            "annotation": str(annotation),
            "data_augment": False,
            "repeat_time": 1,
        }
    path = folder / "meta.json"
    path.write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return path


def _record(counts: Counts, context_tokens: int, figures: list[str], rng: random.Random) -> dict:
    """Return a random record; the lengths of its texts differ from the means by up to 50%."""
    images = rng.sample(figures, int(counts.tiles) + (rng.random() < counts.tiles % 1))
    shown = "".join(f"Fig-{i}: <image>\n" for i in range(len(images)))
    per_image = _TILE_TOKENS + _IMAGE_FRAME_TOKENS
    question = counts.tokens - counts.supervised - _FRAME_TOKENS - counts.tiles * per_image + context_tokens
    messages = [
        {"from": "human", "value": shown + _text(question, rng)},
        {"from": "gpt", "value": _text(counts.supervised - 1, rng)},
    ]
    return {"conversations": messages, **({"image": images} if images else {})}


def _text(mean_words: float, rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=max(1, round(mean_words * rng.uniform(0.5, 1.5)))))
