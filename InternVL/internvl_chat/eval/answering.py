"""A benchmark's items through the engine, batch by batch, each answer on disk before the next."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark, Item
from internvl_chat.eval.predictions import PredictionLog, checkpoint_digest, items_digest
from internvl_chat.eval.processes import process_count, process_index
from internvl_chat.inference.engine import Engine


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
    share = items[process_index() :: process_count()]
    return [item for item in share if item.key not in log.done]


def answer_items(
    engine: Engine,
    items: Sequence[Item],
    system: Mapping[str, str | None],
    log: PredictionLog,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[Item]:
    """Answer items greedily and write the answers; yields each item when its answer is on disk.

    Raises:
        DataError: an image cannot be used, or an item does not fit the model.
    """
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        prompts = [item.prompt(system[item.task]) for item in batch]
        log.append(batch, engine.answer(prompts, max_new_tokens=max_new_tokens))
        yield from batch
