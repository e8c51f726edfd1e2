"""Load balance across ranks: FLOPs of the busiest rank divided by the mean, for the records of an epoch.

    python InternVL/benchmarks/load_balance.py held_out.json --model OpenGVLab/InternVL3-8B

Reads only the lengths of the records; no weights and no GPU required. If the meta file has fewer records than
`--records`, they are repeated. The FLOPs are those of InternVL3-8B.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import write_report
from benchmarks.presets.recipes import RECIPES, RECORDS_PER_EPOCH
from benchmarks.shapes import SHAPES, weightless_model
from internvl_chat.commands.common import add_data_arguments, open_sets, positive
from internvl_chat.commands.output import echo, print_table
from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.batching.sampler import epoch_order
from internvl_chat.data.index.build import index_records
from internvl_chat.model.flops import count_flops
from internvl_chat.model.lora.injection import add_lora
from internvl_chat.train.freeze import set_trainable

_STEP_RECORDS = (16, 32, 64, 128, 256)
_MAX_PACKED_TOKENS = 16_384
# Steps per row; the ratio hardly changes with more.
_MAX_STEPS = 2000


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="lora", help="recipe (default: lora)")
    add("--ranks", type=positive, default=8, help="number of ranks (default: 8)")
    add("--records", type=positive, default=RECORDS_PER_EPOCH,
        help=f"records per epoch (default: {RECORDS_PER_EPOCH})")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write the results as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    args = build_parser().parse_args(argv)
    tokens, costs = record_costs(args)
    rows = [
        measure(tokens, costs, args.ranks, step_records, packing=packing)
        for step_records in _STEP_RECORDS
        if step_records >= args.ranks
        for packing in (True, False)
    ]
    print_table(
        ["records per step", "packing", "balanced by FLOPs", "99th percentile", "file order"],
        [
            [r["step_records"], "on" if r["packing"] else "off", f"{r['balanced']:.3f}",
             f"{r['balanced_p99']:.3f}", f"{r['file_order']:.3f}"]
            for r in rows
        ],
    )  # fmt: skip
    echo(f"FLOPs of the busiest of {args.ranks} ranks, divided by the mean of all ranks")
    if args.out:
        write_report(args.out, ranks=args.ranks, recipe=args.recipe, records=len(tokens), rows=rows)
    return 0


def record_costs(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the training FLOPs of each record of the epoch."""
    lengths = [index.lengths for index in index_records(open_sets(args))]
    tokens, supervised, tiles = (
        np.resize(np.concatenate([getattr(part, name) for part in lengths]), args.records)
        for name in ("tokens", "supervised", "tiles")
    )
    model, rank = weightless_model(SHAPES["internvl3-8b"]), RECIPES[args.recipe].lora_rank
    add_lora(model, llm_rank=rank)
    set_trainable(model, freeze_llm=rank > 0, freeze_mlp=rank > 0, freeze_backbone=True)
    return tokens, count_flops(model).records(tokens, supervised, tiles)


def measure(
    tokens: np.ndarray, costs: np.ndarray, ranks: int, step_records: int, *, packing: bool
) -> dict[str, float | bool]:
    """Return a table row: the busiest rank's cost divided by the mean cost of all ranks, averaged over steps.

    Args:
        tokens: tokens of each record of the epoch: (R,).
        costs: FLOPs of each record of the epoch: (R,).
        step_records: records per step across all ranks.
        packing: whether the records of a rank are packed; otherwise, all ranks get equally many records.
    """
    planner = StepPlanner(ranks, tokens, costs, max_packed_tokens=_MAX_PACKED_TOKENS if packing else None)
    order = epoch_order([len(tokens)], seed=0, epoch=0)
    steps = order[: len(order) // step_records * step_records].reshape(-1, step_records)[:_MAX_STEPS]
    balanced = np.array([planner.load_imbalance(planner(step)) for step in steps])
    split = np.array([[costs[part].sum() for part in np.array_split(step, ranks)] for step in steps])
    return {
        "step_records": step_records,
        "packing": packing,
        "balanced": float(balanced.mean()),
        "balanced_p99": float(np.quantile(balanced, 0.99)),
        "file_order": float((split.max(axis=1) / split.mean(axis=1)).mean()),
    }


if __name__ == "__main__":
    sys.exit(main())
