"""Notes on a plan: idle GPUs and larger batches, checkpoints, and the source of the predicted speed."""

from collections.abc import Sequence

from internvl_chat.train.config import RunConfig
from internvl_chat.train.planning.estimate import Estimate, Planner, recommend
from internvl_chat.train.planning.hardware import Hardware

_LARGER_BATCH = (
    "With a larger batch, an epoch has fewer updates at the same learning rate, so the weights move less per "
    "epoch unless the learning rate is raised as well. Evaluate it like a new recipe."
)


def plan_notes(
    planner: Planner, estimates: Sequence[Estimate], best: Estimate | None, gpus: int, nodes: int
) -> list[str]:
    """Return all notes on a plan.

    Args:
        planner: predicts the run with a larger batch.
        estimates: predictions of all modes.
        best: recommended mode; None if none fits.
        gpus: GPUs per node.
        nodes: number of nodes.
    """
    run = planner.planned.config.run
    notes: list[str | None] = []
    if estimates[0].batch_size != run.records_per_step:
        notes.append(
            f"{estimates[0].batch_size} records per step instead of {run.records_per_step}: this is not the "
            f"recipe. {_LARGER_BATCH}"
        )
    if best is None:
        notes.append(shortage_note(estimates))
    else:
        notes += [batch_note(planner, best, gpus, nodes), checkpoint_note(best, run)]
    return [note for note in [*notes, lengths_note(planner), efficiency_note(planner.hardware)] if note]


def shortage_note(estimates: Sequence[Estimate]) -> str:
    """Describe how much memory the run needs, and the flags that would make it fit."""
    closest = min(estimates, key=lambda estimate: estimate.memory.total)
    memory = closest.memory
    flags = ", or ".join(memory.fitting_flags(memory.available))
    others = "more or larger GPUs, LoRA (--recipe lora) or QLoRA (also -- --load_in_4bit True)"
    remedy = f"flags that would fit: {flags}; alternatives: {others}" if flags else f"use {others}"
    return (
        f"the largest pack does not fit: {closest.mode.name} needs {memory.total / 1e9:.3g} of "
        f"{memory.available / 1e9:.3g} GB; {remedy}"
    )


def batch_note(planner: Planner, best: Estimate, gpus: int, nodes: int) -> str | None:
    """Describe how many GPUs stay idle because the batch is small, and what a larger batch changes."""
    total, batch_size = gpus * nodes, best.batch_size
    if best.ranks == total:
        return None
    larger = -(-batch_size // total) * total
    text = (
        f"{total - best.ranks} of {total} GPUs stay idle: a step has {batch_size} records, which must be "
        "divisible by the number of ranks."
    )
    if (wide := recommend(planner.compare(total, nodes, larger))) is None:
        return text
    return (
        f"{text} With --batch_size {larger}, all GPUs are used ({wide.mode.name}: {wide.epoch_hours:.3g} h "
        f"per epoch instead of {best.epoch_hours:.3g}, {wide.device_hours:.3g} GPU hours instead of "
        f"{best.device_hours:.3g}), but this is not the recipe: an epoch has {wide.steps:,} updates instead "
        f"of {best.steps:,}. {_LARGER_BATCH}"
    )


def checkpoint_note(estimate: Estimate, run: RunConfig) -> str | None:
    """Compare the time to write a checkpoint with the interval between saves."""
    if run.save_strategy != "steps" or run.save_steps < 1:
        return None
    interval = run.save_steps * estimate.step.total
    text = (
        f"a checkpoint has {estimate.checkpoint_bytes / 1e9:.3g} GB and takes "
        f"{_duration(estimate.checkpoint_seconds)} to write; a save is due every {run.save_steps:g} steps "
        f"({_duration(interval)})"
    )
    if estimate.checkpoint_seconds > interval:
        text += "; saves that are due while another one is being written are skipped"
    return text


def lengths_note(planner: Planner) -> str | None:
    """Warn about longer records than those of the plan, if the lengths are assumed."""
    if planner.workload.exact:
        return None
    longest, allowed = planner.workload.lengths.tokens.max(), planner.planned.config.data.max_seq_length
    return (
        f"record lengths: assumed, at most {longest:,} tokens; longer records, up to --max_seq_length "
        f"{allowed:,}, need more memory; --meta measures them"
    )


def efficiency_note(hardware: Hardware) -> str:
    """Describe the assumed or measured fraction of the peak FLOP/s, and its source."""
    achieved = hardware.efficiency
    kind = "measured" if achieved.measured else "assumed, not measured"
    return f"speed: {achieved.compute:.0%} of the peak FLOP/s ({kind}: {achieved.source})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
