"""Vary one quantity of a plan at a time: GPUs, records, tokens, tiles and model size."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from internvl_chat.data.index.cache import Lengths
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.published import PUBLISHED_MODELS, published_config
from internvl_chat.train.planning.estimate import Estimate, PlannedModel, Planner, recommend, usable_ranks
from internvl_chat.train.planning.workload import Workload

MAX_GPUS = 4096
MAX_RANKS_PER_MODEL = 64
_RECORDS = (10_000, 100_000, 1_000_000, 10_000_000)
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MODELS = tuple(name for name in PUBLISHED_MODELS if name.startswith("InternVL3-"))
_TILES = (0, 1, 2, 4, 8, 12, 24)
# Limit of a run that cannot use all GPUs.
IDLE = "records per step"


class Point(NamedTuple):
    """Prediction for one value of the varied quantity.

    Attributes:
        x: the value.
        hours: duration of an epoch.
        device_hours: device hours of an epoch, including idle devices.
        limit: `StepTime.limit`, or `IDLE`.
    """

    x: float
    hours: float
    device_hours: float
    limit: str


class Series(NamedTuple):
    """Points of one line; values for which no mode fits in memory are omitted.

    Attributes:
        label: label of the line; empty if its panel has only one.
        points: the points.
        names: labels of the points; empty if they have none.
    """

    label: str
    points: list[Point]
    names: Sequence[str] = ()


def gpu_counts(per_node: int) -> list[tuple[int, int]]:
    """Return (GPUs per node, nodes) for numbers of GPUs that double from one to at most `MAX_GPUS`.

    >>> gpu_counts(6)[:6]
    [(1, 1), (2, 1), (4, 1), (6, 1), (6, 2), (6, 4)]
    """
    doubled = [1 << i for i in range(MAX_GPUS.bit_length())]
    nodes = [n for n in doubled if n * per_node <= MAX_GPUS]
    return [(n, 1) for n in doubled if n < per_node] + [(per_node, n) for n in nodes]


def sweep_gpus(planner: Planner, batch_size: int, per_node: int) -> Iterator[Series]:
    """Yield epoch durations against the number of GPUs: for `batch_size`, and for 1 and 8 records per GPU."""
    labels = {
        0: f"{batch_size} records per step",
        1: "one record per step and GPU",
        8: "8 records per step and GPU",
    }
    for per_gpu, label in labels.items():
        points = []
        for gpus, nodes in gpu_counts(per_node):
            total = gpus * nodes
            batch = per_gpu * total or batch_size
            used_gpus, used_nodes = usable_ranks(batch, gpus, nodes)
            used = used_gpus * used_nodes
            best = recommend(planner.compare(used, used_nodes, batch)) if batch >= batch_size else None
            if best is not None:
                limit = best.step.limit if used == total else IDLE
                points.append(Point(total, best.epoch_hours, best.epoch_hours * total, limit))
        yield Series(label, points)


def sweep_records(_: Planner, best: Estimate) -> Series:
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
    """Return epoch durations against the number of parameters, for the InternVL3 models.

    If a model does not fit, the number of GPUs is doubled until it does, with at least one record per GPU.
    """
    points, names = [], []
    for name in _MODELS:
        model_config = InternVLChatConfig.from_dict(published_config(name))
        planned = PlannedModel.build(planner.planned.config, model_config, planner.planned.device)
        sized = Planner(planned, planner.workload, planner.hardware)
        ranks, fitting = best.ranks, None
        while fitting is None and ranks <= MAX_RANKS_PER_MODEL:
            nodes = max(1, ranks * best.nodes // best.ranks)
            fitting = recommend(sized.compare(ranks, nodes, max(best.batch_size, ranks)))
            ranks *= 2
        if fitting is not None:
            points.append(_point(fitting, planned.parameters[0] / 1e9))
            gpus = "" if fitting.ranks == best.ranks else f" ({fitting.ranks} GPUs)"
            names.append(name.removeprefix("InternVL3-") + gpus)
    return Series("", points, names)


def _sweep_lengths(
    planner: Planner, like: Estimate, values: Sequence[float], change: Callable[[Lengths, float], Lengths]
) -> Series:
    """Return predictions for changed lengths, with the ranks and the batch size of `like`."""
    points = []
    for value in values:
        workload = Workload(change(planner.workload.lengths, value), planner.workload.records, "", False)
        changed = Planner(planner.planned, workload, planner.hardware)
        best = recommend(changed.compare(like.ranks, like.nodes, like.batch_size))
        points += [] if best is None else [_point(best, value)]
    return Series("", points)


def _point(estimate: Estimate, x: float) -> Point:
    return Point(x, estimate.epoch_hours, estimate.device_hours, estimate.step.limit)


def describe_limits(series: Series, quantity: str) -> str:
    """List the limits on the speed along a line, each with the value from which it applies.

    >>> describe_limits(Series("", [Point(1, 9, 9, "compute"), Point(2, 9, 18, "optimizer")]), "GPUs")
    'GPUs: compute from 1, optimizer from 2'
    """
    changes = [
        f"{point.limit} from {point.x:,.0f}" if point.x >= 100 else f"{point.limit} from {point.x:.3g}"
        for before, point in zip([None, *series.points], series.points, strict=False)
        if before is None or before.limit != point.limit
    ]
    return f"{quantity}{', ' * bool(series.label)}{series.label}: {', '.join(changes)}"


def _scale_tokens(lengths: Lengths, mean: float) -> Lengths:
    factor = mean / lengths.tokens.mean()
    tokens = np.maximum(2, lengths.tokens * factor).astype(np.int32)
    return dataclasses.replace(lengths, tokens=tokens, supervised=np.minimum(lengths.supervised, tokens - 1))


def _set_tiles(lengths: Lengths, mean: float, per_tile: int) -> Lengths:
    text = lengths.tokens - per_tile * lengths.tiles
    tiles = np.full(len(lengths), round(mean), np.int32)
    tokens = np.maximum(2, text + per_tile * tiles).astype(np.int32)
    return dataclasses.replace(
        lengths, tokens=tokens, tiles=tiles, supervised=np.minimum(lengths.supervised, tokens - 1)
    )
