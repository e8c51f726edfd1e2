"""Record lengths for planning: those of a meta file, or synthetic ones with published or given means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internvl_chat.data.dataset import TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.index.build import index_records
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.skip_policy import ExcludedRecord

# Tile limits for which the tokens of the published sets were measured.
_TILE_LIMITS = (1, 6, 12)
# Mean number of context tokens that precede the question in a training record.
_CONTEXT_TOKENS = 230
# Fraction of supervised tokens in the published sets, used if only the number of tokens is given.
_SUPERVISED_FRACTION = 0.11
# Synthetic lengths differ from the mean by up to this fraction.
_SPREAD = 0.5
# Number of synthetic records, which represent epochs of any length.
_SAMPLE = 20_000


class PublishedSet(NamedTuple):
    """Mean counts per record of a published dataset, measured on PMC-MI-Bench with InternVL3's tokenizer.

    Attributes:
        records: number of training records.
        tokens: tokens with at most 1, 6 and 12 tiles per record, without the context.
        supervised: supervised tokens.
        tiles: tiles with at most one tile per image.
    """

    records: int
    tokens: tuple[int, int, int]
    supervised: int
    tiles: float


PUBLISHED_SETS = {
    "qa-puretext": PublishedSet(40_382, (220, 220, 220), 141, 0),
    "qa-bbox": PublishedSet(40_293, (912, 1404, 1654), 32, 3.0),
    "qa-single_subimage": PublishedSet(40_287, (664, 1094, 2358), 65, 2.0),
    "qa-multiple_subimage": PublishedSet(39_462, (1120, 1458, 2113), 125, 3.4),
    "qa-subimage-option": PublishedSet(40_295, (674, 1140, 2276), 2, 2.0),
    "qa-compound-image": PublishedSet(37_029, (423, 1524, 2118), 84, 1.0),
}
PUBLISHED_RECORDS = sum(published.records for published in PUBLISHED_SETS.values())


@dataclass(frozen=True, eq=False)
class Workload:
    """The records of an epoch.

    Attributes:
        lengths: lengths of the records, or of a sample of them.
        records: number of records per epoch.
        source: description of where the lengths come from.
        exact: whether `lengths` contains every record of the epoch.
    """

    lengths: Lengths
    records: int
    source: str
    exact: bool

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens per record."""
        return float(self.lengths.tokens.mean())

    @property
    def mean_tiles(self) -> float:
        """Mean number of tiles per record."""
        return float(self.lengths.tiles.mean())


def meta_workload(specs: Sequence[DatasetSpec], encoder: RecordEncoder) -> Workload:
    """Measure the records of a meta file's datasets; unusable records are excluded."""
    sets = build_sets(specs, encoder)
    indexes = index_records(sets)
    excluded = [
        ExcludedRecord(records.spec.name, number, "unusable")
        for records, index in zip(sets, indexes, strict=True)
        for number in index.unusable
    ]
    data = TrainingData(sets, lengths=[index.lengths for index in indexes], excluded=excluded)
    source = f"{len(data):,} records of the meta file"
    return Workload(
        data.epoch_lengths(),
        len(data),
        source + (f", {len(excluded):,} unusable (see m3llm data check)" * bool(excluded)),
        True,
    )


def published_workload(max_dynamic_patch: int, tokens_per_tile: int, records: int | None = None) -> Workload:
    """Return synthetic lengths with the means of the published sets.

    Args:
        max_dynamic_patch: maximum tiles per record.
        tokens_per_tile: tokens per tile of the model.
        records: records per epoch (default: those of the published sets).
    """
    groups = []
    for published in PUBLISHED_SETS.values():
        tokens = float(np.interp(max_dynamic_patch, _TILE_LIMITS, published.tokens))
        # The sets were measured with 256 tokens per tile.
        tiles = published.tiles + (tokens - published.tokens[0]) / 256
        text = published.tokens[0] - 256 * published.tiles + _CONTEXT_TOKENS
        groups.append((published.records, text, published.supervised, tiles))
    source = f"published distribution (means of six sets, at most {max_dynamic_patch} tiles per record)"
    return Workload(_synthetic_lengths(groups, tokens_per_tile), records or PUBLISHED_RECORDS, source, False)


def uniform_workload(records: int, tokens: float, tiles: float, tokens_per_tile: int) -> Workload:
    """Return synthetic lengths with the given means.

    Args:
        records: records per epoch.
        tokens: mean tokens per record, including image tokens.
        tiles: mean tiles per record.
        tokens_per_tile: tokens per tile of the model.
    """
    text = max(1.0, tokens - tiles * tokens_per_tile)
    lengths = _synthetic_lengths([(1, text, _SUPERVISED_FRACTION * tokens, tiles)], tokens_per_tile)
    return Workload(lengths, records, f"given means ({tokens:g} tokens, {tiles:g} tiles per record)", False)


def _synthetic_lengths(groups: Sequence[tuple[float, float, float, float]], tokens_per_tile: int) -> Lengths:
    """Return the lengths of `_SAMPLE` random records.

    Args:
        groups: of each group of records: weight, and means of text tokens, supervised tokens and tiles.
        tokens_per_tile: tokens per tile.
    """
    rng = np.random.default_rng(0)
    weights, texts, supervised, tiles = (np.array(column, float) for column in zip(*groups, strict=True))
    group = rng.choice(len(groups), _SAMPLE, p=weights / weights.sum())
    factor = rng.uniform(1 - _SPREAD, 1 + _SPREAD, (3, _SAMPLE))
    tile_counts = np.floor(tiles[group] * factor[0] + rng.random(_SAMPLE)).astype(np.int32)
    text_tokens = np.maximum(2, texts[group] * factor[1]).astype(np.int32)
    labels = np.clip(supervised[group] * factor[2], 1, text_tokens - 1).astype(np.int32)
    return Lengths(text_tokens + tokens_per_tile * tile_counts, labels, tile_counts)
