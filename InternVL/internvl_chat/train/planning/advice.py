"""Notes to a plan: idle GPUs and larger batches, checkpoints, and the source of the predicted speed."""

from internvl_chat.train.config import RunConfig
from internvl_chat.train.planning.estimate import Estimate, Planner, recommend
from internvl_chat.train.planning.hardware import Hardware


def notes_of(planner: Planner, best: Estimate | None, batch_size: int, gpus: int, nodes: int) -> list[str]:
    """Return all notes to a plan; see `batch_note` for the arguments."""
    notes = [batch_note(planner, batch_size, gpus, nodes, best)]
    if best is not None:
        notes.append(checkpoint_note(best, planner.planned.config.run))
    return [note for note in [*notes, efficiency_note(planner.hardware)] if note]


def batch_note(planner: Planner, batch_size: int, gpus: int, nodes: int, best: Estimate | None) -> str | None:
    """Explain which GPUs stay idle because the batch is small, and what a larger batch changes.

    Args:
        planner: predicts the run with a larger batch.
        batch_size: records per step.
        gpus: GPUs per node.
        nodes: number of nodes.
        best: recommended mode with this batch, if any fits.
    """
    total = gpus * nodes
    used = best.ranks if best else 0
    if best is None or used == total:
        return None
    larger = -(-batch_size // total) * total
    text = (
        f"{total - used} of {total} GPUs stay idle: a step has {batch_size} records, which must be divisible "
        f"by the number of ranks. More GPUs cannot help."
    )
    if (wide := recommend(planner.compare(total, nodes, larger))) is None:
        return text
    return (
        f"{text} With --batch_size {larger}, all GPUs are used ({wide.mode.name}: {wide.epoch_hours:.3g} h "
        f"per epoch instead of {best.epoch_hours:.3g}, {wide.device_hours:.3g} GPU hours instead of "
        f"{best.device_hours:.3g}). This is not the recipe: an epoch has {best.steps / wide.steps:.3g} times "
        f"fewer updates ({wide.steps:,} instead of {best.steps:,}) at the same learning rate, so the model "
        "changes less per epoch unless you raise the learning rate. The result must be evaluated anew."
    )


def checkpoint_note(estimate: Estimate, run: RunConfig) -> str | None:
    """Compare the time to write a checkpoint with the interval between saves."""
    if run.save_strategy != "steps" or run.save_steps < 1:
        return None
    interval = run.save_steps * estimate.step.total
    text = (
        f"a checkpoint has {estimate.checkpoint_bytes / 1e9:.3g} GB; a save is due every "
        f"{run.save_steps:g} steps ({_duration(interval)}), and writing takes "
        f"{_duration(estimate.checkpoint_seconds)} at the given disk speed"
    )
    if estimate.checkpoint_seconds > interval:
        text += "; saves that are due while the previous one is being written are skipped"
    return text


def efficiency_note(hardware: Hardware) -> str:
    """Describe the source of the efficiency, and whether it was measured."""
    achieved = hardware.efficiency
    kind = "measured" if achieved.measured else "assumed, not measured"
    return f"speed: {achieved.compute:.0%} of the peak FLOP/s in the passes ({kind}: {achieved.source})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
