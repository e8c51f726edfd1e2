"""Vary one quantity of a plan at a time: GPUs, records, tokens, tiles and model size."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from internvl_chat.data.index.cache import Lengths
from internvl_chat.train.planning.estimate import Estimate, PlannedModel, Planner, recommend
from internvl_chat.train.planning.models import FAMILY, family_config
from internvl_chat.train.planning.workload import Workload

MAX_GPUS = 4096
_RECORDS = (10_000, 100_000, 1_000_000, 10_000_000)
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_TILES = (0, 1, 2, 4, 8, 12, 24)
# What limits a run with more GPUs than records per step.
IDLE = "records per step"


class Point(NamedTuple):
    """Prediction for one value of the varied quantity.

    Attributes:
        x: the value.
        hours: duration of an epoch.
        device_hours: device hours of an epoch, with those of idle devices.
        limit: what limits the speed.
    """

    x: float
    hours: float
    device_hours: float
    limit: str


class Series(NamedTuple):
    """Points of one line; values for which nothing fits in memory are left out."""

    label: str
    points: list[Point]


def gpu_counts(per_node: int) -> list[tuple[int, int]]:
    """Return numbers of ranks per node and of nodes: doubled from one GPU to `MAX_GPUS`.

    >>> gpu_counts(8)[:5]
    [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2)]
    """
    counts = [1 << i for i in range(MAX_GPUS.bit_length())]
    return [(min(n, per_node), max(1, n // per_node)) for n in counts if n <= per_node or n % per_node == 0]


def sweep_gpus(planner: Planner, batch_size: int, per_node: int) -> Iterator[Series]:
    """Yield epoch durations against the number of GPUs, for the recipe's batch and for larger ones."""
    labels = {
        1: f"{batch_size} records per step (the recipe)",
        0: "as many records per step as GPUs",
        8: "8 records per step and GPU",
    }
    for factor, label in labels.items():
        points = []
        for gpus, nodes in gpu_counts(per_node):
            total = gpus * nodes
            batch = batch_size if factor == 1 else max(batch_size, total * max(1, factor))
            batch = batch if factor == 1 else -(-batch // total) * total
            used = total
            while batch % used:
                used //= 2
            best = recommend(planner.compare(used, max(1, used // per_node), batch))
            if best is not None:
                limit = best.step.limit if used == total else IDLE
                points.append(Point(total, best.epoch_hours, best.epoch_hours * total, limit))
        yield Series(label, points)


def sweep_records(best: Estimate) -> Series:
    """Return epoch durations against the number of records."""
    hours = best.epoch_hours / best.records
    return Series("", [Point(n, n * hours, n * hours * best.ranks, best.step.limit) for n in _RECORDS])


def sweep_tokens(planner: Planner, best: Estimate) -> Series:
    """Return epoch durations against the mean number of tokens per record; tiles are unchanged."""
    mean = planner.workload.mean_tokens
    return _sweep_lengths(planner, best, [mean * factor for factor in _FACTORS], _scale_tokens)


def sweep_tiles(planner: Planner, best: Estimate) -> Series:
    """Return epoch durations against the mean number of tiles per record; the text is unchanged."""
    per_tile = planner.planned.model.config.tokens_per_tile
    return _sweep_lengths(planner, best, _TILES, lambda lengths, mean: _set_tiles(lengths, mean, per_tile))


def sweep_models(planner: Planner, best: Estimate) -> Series:
    """Return epoch durations against the number of parameters, for the published InternVL3 models."""
    points, labels = [], []
    for name in FAMILY:
        planned = PlannedModel.build(planner.planned.config, family_config(name), planner.planned.device)
        point = _point(Planner(planned, planner.workload, planner.hardware), best, planned.parameters[0] / 1e9)
        if point is not None:
            points.append(point)
            labels.append(name.removeprefix("InternVL3-"))
    return Series(" ".join(labels), points)


def _sweep_lengths(
    planner: Planner, best: Estimate, values: Sequence[float], change: Callable[[Lengths, float], Lengths]
) -> Series:
    points = []
    for value in values:
        lengths = change(planner.workload.lengths, value)
        workload = Workload(lengths, planner.workload.records, "", False)
        point = _point(Planner(planner.planned, workload, planner.hardware), best, value)
        points += [] if point is None else [point]
    return Series("", points)


def _point(planner: Planner, like: Estimate, x: float) -> Point | None:
    """Return the prediction for the same ranks and batch as another plan; None if nothing fits."""
    best = recommend(planner.compare(like.ranks, like.nodes, like.batch_size))
    return None if best is None else Point(x, best.epoch_hours, best.device_hours, best.step.limit)


def _scale_tokens(lengths: Lengths, mean: float) -> Lengths:
    factor = mean / lengths.tokens.mean()
    tokens = np.maximum(2, lengths.tokens * factor).astype(np.int32)
    return dataclasses.replace(lengths, tokens=tokens, supervised=np.minimum(lengths.supervised, tokens - 1))


def _set_tiles(lengths: Lengths, mean: float, per_tile: int) -> Lengths:
    text = lengths.tokens - per_tile * lengths.tiles
    tiles = np.full(len(lengths), round(mean), np.int32)
    tokens = np.maximum(2, text + per_tile * tiles).astype(np.int32)
    return dataclasses.replace(lengths, tokens=tokens, tiles=tiles, supervised=np.minimum(lengths.supervised, tokens - 1))
