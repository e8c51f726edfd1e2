"""A benchmark's items through the engine, each answer on disk as soon as it is complete."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark, Item
from internvl_chat.eval.predictions import PredictionLog, checkpoint_digest, items_digest
from internvl_chat.inference.engine import Engine
from internvl_chat.inference.parallel import share


def settings_of(
    benchmark: Benchmark,
    system: Mapping[str, str | None],
    folder: Path,
    *,
    max_new_tokens: int,
    max_dynamic_patch: int | None,
) -> dict[str, object]:
    """Return what decides the answers to a benchmark, for `PredictionLog`.

    Args:
        benchmark: all of it, whatever part is to be answered.
        system: the system text of each task.
        folder: the checkpoint's.
        max_new_tokens: most tokens of an answer.
        max_dynamic_patch: most tiles of an item, or None for the checkpoint's.
    """
    return {
        "benchmark": benchmark.name,
        "questions": items_digest(benchmark.items, system),
        "model": str(folder),
        "checkpoint": checkpoint_digest(folder),
        "max_new_tokens": max_new_tokens,
        "max_dynamic_patch": max_dynamic_patch,
    }


def own_items(items: Sequence[Item], log: PredictionLog) -> list[Item]:
    """Return what this process has to answer: its share of the items, but for those that are answered."""
    return [item for item in share(items) if item.key not in log.done]


def answer_items(
    engine: Engine,
    items: Sequence[Item],
    system: Mapping[str, str | None],
    log: PredictionLog,
    *,
    max_new_tokens: int,
) -> Iterator[Item]:
    """Answer items greedily and write the answers; yields each item when its answer is on disk.

    Raises:
        DataError: an image cannot be used, or an item does not fit the model.
    """
    prompts = (item.prompt(system[item.task]) for item in items)
    for number, answer in engine.answer_each(prompts, max_new_tokens=max_new_tokens):
        log.append(items[number], answer)
        yield items[number]
