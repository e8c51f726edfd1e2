"""Result of `m3llm plan`: tables for the user and JSON values for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_chat.train.planning.estimate import Estimate, Planner

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True, eq=False)
class PlanReport:
    """Predictions of all parallel modes for one run.

    Attributes:
        model: model as given on the command line.
        recipe: `lora` or `full`.
        gpus: GPUs per node, including idle ones.
        nodes: number of nodes, including idle ones.
        planner: model, records and hardware.
        estimates: prediction of each mode.
        best: recommended mode; None if none fits.
        command: launcher command of the recommended mode.
        notes: result of `plan_notes`.
        limits: result of `save_plot`; empty without a plot.
    """

    model: str
    recipe: str
    gpus: int
    nodes: int
    planner: Planner
    estimates: Sequence[Estimate]
    best: Estimate | None
    command: str | None
    notes: Sequence[str]
    limits: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        (total, trained), workload = self.planner.planned.parameters, self.planner.workload
        return {
            "model": self.model,
            "recipe": self.recipe,
            "parameters": total,
            "trained_parameters": trained,
            "gpu": self.planner.hardware.name,
            "gpus": self.gpus,
            "nodes": self.nodes,
            "records": workload.records,
            "mean_tokens": workload.mean_tokens,
            "mean_tiles": workload.mean_tiles,
            "data": workload.source,
            "modes": [estimate.to_dict() for estimate in self.estimates],
            "recommended": None if self.best is None else self.best.mode.name,
            "command": self.command,
            "notes": list(self.notes),
            "limits": list(self.limits),
        }

    def summary(self) -> list[str]:
        """Return lines that describe the model, the records and the ranks."""
        (total, trained), data, first = (
            self.planner.planned.parameters,
            self.planner.workload,
            self.estimates[0],
        )
        used, available = first.ranks, self.gpus * self.nodes
        ranks = f"{used}" if used == available else f"{used} of {available}"
        return [
            f"{self.model}, recipe {self.recipe}: {total / 1e9:.2f} B parameters, {trained / 1e9:.3g} B "
            "trained",
            f"{data.records:,} records: {data.source}; mean {data.mean_tokens:,.0f} tokens, "
            f"{data.mean_tiles:.1f} tiles",
            f"{ranks} x {self.planner.hardware.name} on {first.nodes} of {self.nodes} nodes; "
            f"{first.batch_size} records per step, {first.steps:,} steps per epoch; largest pack: "
            f"{first.memory.pack.tokens:,} tokens, {first.memory.pack.tiles} tiles",
        ]

    def memory_table(self) -> Table:
        """Return header and rows of the memory per rank in GB."""
        header = ["layout", "fits", "total", "weights", "gradients", "optimizer", "buffers", "activations"]
        return header, [
            [
                e.mode.name,
                "yes" if e.fits else "no",
                *(f"{size / 1e9:.1f}" for size in (e.memory.total, *e.memory.parts())),
            ]
            for e in self.estimates
        ]

    def speed_table(self) -> Table:
        """Return header and rows of speed, cost and checkpoints."""
        header = ["layout", "records/s", "epoch hours", "GPU hours", "cost", "limit", "imbalance",
                  "checkpoint GB", "s"]  # fmt: skip
        rows = [
            [
                e.mode.name,
                f"{e.records / e.epoch_hours / 3600:.3g}",
                f"{e.epoch_hours:,.3g}",
                f"{e.device_hours:,.4g}",
                "-" if e.cost is None else f"{e.cost:,.0f}",
                e.step.limit,
                f"{e.balance:.2f}",
                f"{e.checkpoint_bytes / 1e9:,.3g}",
                f"{e.checkpoint_seconds:,.3g}",
            ]
            for e in self.estimates
        ]
        return header, rows
