"""Parallel modes (layouts that a plan compares), and the launcher command for each of them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from internvl_chat.model.io.folders import read_json

_SHELL = Path(__file__).resolve().parents[2] / "shell"
_LAUNCHERS = {"lora": "M3LLM-fulldata-lora.sh", "full": "M3LLM-fulldata-fullmodel.sh"}
RECIPES = tuple(_LAUNCHERS)


@dataclass(frozen=True)
class Mode:
    """A parallel layout, with the number of times that weights and gradients are communicated.

    Each communication sends (R - 1) / R times their size, with R ranks.

    Attributes:
        name: name in tables.
        parallel: layout in the memory planner: `single`, `ddp`, `hsdp`, `fsdp` or `deepspeed`.
        gathers: number of all-gathers of all weights per pack.
        reduces: number of collectives with the size of the trained weights per step, which reduce gradients
            or gather updated weights.
        zero: name of the DeepSpeed configuration file in `shell/deepspeed`; None without DeepSpeed.
    """

    name: str
    parallel: str
    gathers: int
    reduces: int
    zero: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the launcher that select this mode."""
        if self.zero:
            return {"DEEPSPEED": str(_SHELL / "deepspeed" / self.zero)}
        return {} if self.parallel == "single" else {"PARALLEL": self.parallel}

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """DeepSpeed configuration of this mode; None without DeepSpeed."""
        return _read_zero(self.zero) if self.zero else None


@cache
def _read_zero(name: str) -> dict[str, Any]:
    return read_json(_SHELL / "deepspeed" / name)


SINGLE = Mode("single", "single", 0, 0)
# In order of preference among equally fast modes.
MODES = (
    Mode("ddp", "ddp", 0, 2),
    Mode("hsdp", "hsdp", 2, 1),
    Mode("fsdp", "fsdp", 2, 1),
    Mode("zero1", "deepspeed", 0, 2, "zero1.json"),
    Mode("zero2", "deepspeed", 0, 2, "zero2.json"),
    Mode("zero3", "deepspeed", 2, 1, "zero3.json"),
)


def modes_for(ranks: int, nodes: int) -> Sequence[Mode]:
    """Return the modes for a number of ranks; HSDP needs several nodes with several ranks each."""
    if ranks == 1:
        return (SINGLE,)
    return [mode for mode in MODES if mode.parallel != "hsdp" or 1 < nodes < ranks]


def recipe_file(recipe: str) -> Path:
    """Return the YAML file with the flags of a recipe."""
    return _SHELL / "recipes" / f"{recipe}.yaml"


def launcher_command(
    recipe: str,
    mode: Mode,
    *,
    device: str,
    gpus: int,
    nodes: int,
    batch_size: int,
    paths: Mapping[str, str],
    flags: Sequence[str],
) -> str:
    """Return the shell command that starts the run on each node.

    Args:
        recipe: `lora` or `full`.
        mode: parallel mode.
        device: `cuda` or `cpu`.
        gpus: ranks per node.
        nodes: number of nodes.
        batch_size: records per step across all ranks.
        paths: variables of the launcher with paths, such as `MODEL_PATH`.
        flags: training flags after the launcher.
    """
    ranks = {"GPUS": gpus} if device == "cuda" else {"GPUS": 0, "NPROC": gpus}
    network = {"NNODES": nodes, "NODE_RANK": "$NODE_RANK", "MASTER_ADDR": "$MASTER_ADDR"} if nodes > 1 else {}
    variables = ranks | network | {"BATCH_SIZE": batch_size} | mode.environment | dict(paths)
    words = [f"{name}={_quote(str(value))}" for name, value in variables.items()]
    launcher = _SHELL / "internvl3.0/2nd_finetune" / _LAUNCHERS[recipe]
    return " ".join([*words, "bash", shlex.quote(_shorten(launcher)), *map(shlex.quote, flags)])


def _quote(value: str) -> str:
    return (
        value
        if value in ("$NODE_RANK", "$MASTER_ADDR")
        else shlex.quote(_shorten(Path(value)) if value.startswith(str(_SHELL)) else value)
    )


def _shorten(path: Path) -> str:
    """Return a path relative to the current folder if it is inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
