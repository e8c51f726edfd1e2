"""Answer the items of a benchmark; each answer is on disk as soon as it is complete."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.eval.benchmarks.item import Benchmark, Item, Key, log_lost_content
from internvl_chat.eval.benchmarks.reading import raise_problems, skipped_message
from internvl_chat.eval.predictions import PredictionLog, checkpoint_digest, merge_predictions, task_digests
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.model.io.folders import model_folder, read_config
from internvl_chat.utils.distributed import rank, shard, world_size
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# The rank with the longest answers may take days; if it dies, torchrun stops the others.
_BARRIER_TIMEOUT = timedelta(days=7)


def answer_benchmark(
    benchmark: Benchmark,
    selected: Benchmark,
    system: Mapping[str, str | None],
    *,
    model: str,
    out: Path,
    base: str | None,
    device: str | None,
    max_new_tokens: int,
    max_dynamic_patch: int | None,
    options: Mapping[str, Any],
    progress: Callable[..., Iterable[Item]],
    on_bad_record: str = "fail",
) -> dict[Key, str]:
    """Answer the items that have no answer yet; under torchrun each rank answers its shard.

    Args:
        benchmark: the full benchmark.
        selected: the part of it to answer.
        system: system text of each task.
        model: model folder, adapter folder or hub id.
        base: base model of an adapter, if it has moved.
        device: device of the model, or None for the default.
        max_dynamic_patch: maximum tiles per item, or None for the limit of the checkpoint.
        options: preprocessing options that replace the checkpoint's; None keeps one.
        progress: progress bar around the answered items; receives `total`.
        on_bad_record: `fail`, or `skip` to leave items unanswered that cannot be used, and log them.

    Returns:
        On rank 0 all answers in the output folder, on other ranks nothing.

    Raises:
        DataError: images cannot be read, or an item does not fit the model.
    """
    folder = model_folder(model).resolve()
    settings: dict[str, Any] = {
        "benchmark": benchmark.name,
        "questions": task_digests(benchmark.items, system),
        "model": str(folder),
        "checkpoint": checkpoint_digest(folder),
        "max_new_tokens": max_new_tokens,
        "max_dynamic_patch": max_dynamic_patch,
        **{name: value for name, value in options.items() if value is not None},
    }
    with PredictionLog(out, settings, rank()) as log:
        skip = on_bad_record == "skip"
        items = [item for item in shard(selected.items) if item.key not in log.done]
        items = _check_images(items, skip=skip)
        if items:
            preprocessing = Preprocessing.from_folder(
                folder, read_config(folder), max_dynamic_patch=max_dynamic_patch
            ).with_options(**options)
            log_lost_content(items, preprocessing.image_options)
            engine = Engine.from_checkpoint(folder, device=device, base=base, preprocessing=preprocessing)
            answered = answer_items(engine, items, system, log, max_new_tokens=max_new_tokens, skip=skip)
            for _ in progress(answered, total=len(items)) if rank() == 0 else answered:
                pass
    wait_for_all_ranks()
    return merge_predictions(out, benchmark.items) if rank() == 0 else {}


def _check_images(items: Sequence[Item], *, skip: bool) -> list[Item]:
    """Return the items whose images can be read, so that a damaged image does not stop a run after hours.

    Raises:
        DataError: images cannot be read, and their items are not skipped; lists all of them.
    """
    usable, problems = [], []
    for item in items:
        try:
            item.check_images()
        except DataError as error:
            problems.append(str(error))
        else:
            usable.append(item)
    if problems and not skip:
        raise_problems(
            problems, ["replace these images, or evaluate without the items: --on_bad_record skip"]
        )
    if problems:
        logger.warning("%s", skipped_message(problems, len(items)))
    return usable


def answer_items(
    engine: Engine,
    items: Sequence[Item],
    system: Mapping[str, str | None],
    log: PredictionLog,
    *,
    max_new_tokens: int,
    skip: bool = False,
) -> Iterator[Item]:
    """Answer items greedily and log the answers; yields each item once its answer is on disk.

    Args:
        engine: the model.
        items: items to answer.
        system: system text of each task.
        log: receives the answers.
        max_new_tokens: maximum tokens per answer.
        skip: whether to log and skip items that cannot be used.

    Raises:
        DataError: an image cannot be read, or an item does not fit the model, unless it is skipped.
    """
    options = engine.encoder.preprocessing.image_options
    asked: list[Item] = []

    def prompts() -> Iterator[Prompt]:
        for item in items:
            try:
                prompt = item.prompt(system[item.task], options)
                if skip:
                    engine.encode(prompt)
            except DataError as error:
                if not skip:
                    raise
                logger.warning("%s: skipped: %s", _name(item), error)
                continue
            asked.append(item)
            yield prompt

    for number, answer in engine.answer_each(prompts(), max_new_tokens=max_new_tokens):
        log.append(asked[number], answer)
        yield asked[number]


def _name(item: Item) -> str:
    return f"{item.task}, item {item.index}"


def wait_for_all_ranks() -> None:
    """Block until all ranks of torchrun have reached this call."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_BARRIER_TIMEOUT)
    dist.barrier()
    dist.destroy_process_group()
