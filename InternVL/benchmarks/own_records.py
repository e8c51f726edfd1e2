"""Records with the token and tile counts of the six data sets, for machines that have no figures."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.data.synthetic.sample_data import write_sample_data

# Words that are one token each, with the space before them, in InternVL3's vocabulary.
_WORDS = """
    the of and in to with for is are was by that this from an image figure panel shows shown left right
    upper lower cell cells tissue normal group control patient patients study results data bone lung heart
    liver brain blood level high low increase after before treatment time area region dark bright signal
    between first second both each large small positive negative red green blue line mean significant
""".split()  # noqa: SIM905
# Tokens of a record beside its text: the system message, the messages' frames; and an image's name and brackets.
_FRAME_TOKENS = 62
_IMAGE_FRAME_TOKENS = 7
_TILE_TOKENS = 256
_RECORDS_A_SET = 40


@dataclass(frozen=True)
class Counts:
    """Means of a data set, measured with InternVL3's tokenizer and one tile an image.

    Attributes:
        tokens: of a record, without the context that training records carry.
        supervised: of them, those of the answer.
        tiles: images.
    """

    tokens: int
    supervised: int
    tiles: float


COUNTS = {
    "qa-puretext": Counts(220, 141, 0),
    "qa-bbox": Counts(912, 32, 3.0),
    "qa-single_subimage": Counts(664, 65, 2.0),
    "qa-multiple_subimage": Counts(1120, 125, 3.4),
    "qa-subimage-option": Counts(674, 2, 2.0),
    "qa-compound-image": Counts(423, 84, 1.0),
}


def write_own_records(folder: Path, context_tokens: int) -> Path:
    """Write figures, records of all sets and a meta file.

    Args:
        folder: a new one.
        context_tokens: mean length of the context in front of each question.

    Returns:
        The meta file.
    """
    sample = json.loads(
        write_sample_data(folder / "figures", train=8, held_out=1)["train"].read_text("utf-8")
    )
    root = Path(next(iter(sample.values()))["root"])
    figures = sorted(path.name for path in root.iterdir())
    rng = random.Random(0)
    meta = {}
    for name, counts in COUNTS.items():
        records = [_record(counts, context_tokens, figures, rng) for _ in range(_RECORDS_A_SET)]
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
    """Return a record; texts vary by half in length about the means."""
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
