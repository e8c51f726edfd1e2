"""Answer the items of a benchmark and write each answer to disk as soon as it is complete."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from internvl_chat.constants import PUBLISHED_PROTOCOL, STANDARD_PROTOCOL
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.eval.benchmarks.item import Benchmark, Item, Key, log_lost_content
from internvl_chat.eval.benchmarks.reading import raise_problems, skipped_message
from internvl_chat.eval.predictions import (
    PredictionLog,
    checkpoint_digest,
    image_digests,
    merge_predictions,
    task_digests,
)
from internvl_chat.eval.protocol import PublishedEngine, published_preprocessing
from internvl_chat.inference.devices import default_dtype
from internvl_chat.inference.engine import Engine, Prompt, Reply
from internvl_chat.model.io.folders import model_folder, read_config
from internvl_chat.utils.distributed import rank, shard, world_size
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Long, because ranks may finish days apart. If a rank dies, torchrun stops the others.
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
    protocol: str = STANDARD_PROTOCOL,
) -> dict[Key, Reply]:
    """Answer the items that have no answer yet; under torchrun, each rank answers its shard of the items.

    Args:
        benchmark: the full benchmark.
        selected: subset of the benchmark to answer.
        system: task -> system prompt; None for the checkpoint's.
        model: model folder, adapter folder or hub id.
        out: output folder.
        base: base model of an adapter, if it has been moved.
        device: device of the model (default: GPU if available).
        max_new_tokens: maximum tokens per answer.
        max_dynamic_patch: maximum tiles per item (default: from the checkpoint).
        options: preprocessing option -> value; None for the checkpoint's.
        progress: function that wraps an iterable in a progress bar; gets the number of items as `total`.
        on_bad_record: `fail`, or `skip` to log unusable items and leave them unanswered.
        protocol: one of `PROTOCOLS`; `published` ignores `max_dynamic_patch` and `options`.

    Returns:
        On rank 0, all answers in the output folder; on other ranks, an empty dict.

    Raises:
        DataError: an item is unusable and `on_bad_record` is `fail`.
    """
    folder = model_folder(model).resolve()
    settings = _settings(benchmark, system, folder, device) | {
        "max_new_tokens": max_new_tokens,
        "max_dynamic_patch": max_dynamic_patch,
        **{name: value for name, value in options.items() if value is not None},
        "protocol": protocol,
    }
    with PredictionLog(out, settings, rank()) as log:
        skip = on_bad_record == "skip"
        items = [item for item in shard(selected.items) if item.key not in log.done]
        items = _check_images(items, skip=skip)
        if items:
            log.check_dtype()
            engine_type, preprocessing = _engine_options(folder, protocol, max_dynamic_patch, options)
            log_lost_content(items, preprocessing.image_options)
            engine = engine_type.from_checkpoint(
                folder, device=device, base=base, preprocessing=preprocessing
            )
            answered = answer_items(engine, items, system, log, max_new_tokens=max_new_tokens, skip=skip)
            for _ in progress(answered, total=len(items)) if rank() == 0 else answered:
                pass
    wait_for_all_ranks()
    return merge_predictions(out, benchmark.items) if rank() == 0 else {}


def _engine_options(
    folder: Path, protocol: str, max_dynamic_patch: int | None, options: Mapping[str, Any]
) -> tuple[type[Engine], Preprocessing]:
    """Return the class and the preprocessing of the engine for a protocol; see `answer_benchmark`."""
    config = read_config(folder)
    if protocol == PUBLISHED_PROTOCOL:
        return PublishedEngine, published_preprocessing(config)
    preprocessing = Preprocessing.from_folder(folder, config, max_dynamic_patch=max_dynamic_patch)
    return Engine, preprocessing.with_options(**options)


def _settings(
    benchmark: Benchmark, system: Mapping[str, str | None], folder: Path, device: str | None
) -> dict[str, Any]:
    """Return the evaluation settings that depend on the benchmark, the checkpoint and the device."""
    return {
        "benchmark": benchmark.name,
        "questions": task_digests(benchmark.items, system),
        "images": image_digests(benchmark.items),
        "model": str(folder),
        "checkpoint": checkpoint_digest(folder),
        "dtype": str(default_dtype(device)).removeprefix("torch."),
    }


def _check_images(items: Sequence[Item], *, skip: bool) -> list[Item]:
    """Return the items whose images are intact.

    Call this before answering, so that a damaged image cannot stop the run hours later.

    Raises:
        DataError: an image is missing or damaged and `skip` is False; see `raise_problems`.
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
        raise_problems(problems, ["replace these images, or exclude the items with --on_bad_record skip"])
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
    """Answer items with greedy decoding, and yield each item once its answer is on disk.

    Args:
        engine: model that answers.
        items: items to answer.
        system: task -> system prompt; None for the checkpoint's.
        log: log to which the answers are written.
        max_new_tokens: maximum tokens per answer.
        skip: log and skip unusable items instead of failing.

    Raises:
        DataError: an item is unusable and `skip` is False.
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
    """Block until all ranks have reached this call."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_BARRIER_TIMEOUT)
    dist.barrier()
    dist.destroy_process_group()
