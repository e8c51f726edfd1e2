"""`m3llm parity`: compare two checkpoints, or two formats of a checkpoint, on the same records."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import add_data_root, add_tile_limit, open_sets, positive
from internvl_chat.commands.output import echo, print_json, print_table, progress

if TYPE_CHECKING:
    from internvl_chat.convert.parity import Difference
    from internvl_chat.convert.parity_runners import Example

_LIMITS = ("pixels", "logits", "same_answers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `parity`."""
    add = parser.add_argument
    add("first", help="model or adapter folder; transformers runs checkpoints in its own format")
    add("second", help="checkpoint to compare with, such as the first one in a different format")
    add("--meta", help="meta file of the records to run (default: synthetic records)")
    add_data_root(parser)
    add("--limit", type=positive, default=8, metavar="N", help="records per dataset (default: 8)")
    add_tile_limit(parser)
    add("--max_new_tokens", type=positive, metavar="N", default=16,
        help="maximum tokens per answer (default: 16)")  # fmt: skip
    add("--base_first", help="base model of the first adapter, if it has been moved")
    add("--base_second", help="base model of the second adapter, if it has been moved")
    add("--device", help="for example cpu or cuda:0 (default: GPU if available)")
    add("--pixel_tolerance", type=float, metavar="X", dest="pixels",
        help="maximum difference of a normalized pixel value (default: 1e-5)")  # fmt: skip
    add("--logit_tolerance", type=float, metavar="X", dest="logits",
        help="maximum difference of a logit relative to the largest logit (default: rounding "
        "error)")  # fmt: skip
    add("--same_answers", type=float, metavar="X",
        help="minimum fraction of identical greedy answers (default: 1, or 0 in 16-bit formats)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Compare two checkpoints; return 1 if a difference exceeds its tolerance."""
    from internvl_chat.convert.parity import compare, comparison_dtype, faults, rounding_tolerances
    from internvl_chat.inference.devices import find_device
    from internvl_chat.model.io.folders import model_folder

    folders = model_folder(args.first), model_folder(args.second)
    bases = (args.base_first, args.base_second)
    device = find_device(args.device)
    examples = _examples(args, folders[0])
    dtype = comparison_dtype(folders, device, bases)
    differences = []
    for difference in compare(
        *folders,
        examples,
        device=device,
        dtype=dtype,
        bases=bases,
        max_new_tokens=args.max_new_tokens,
        progress=partial(progress, total=len(examples)),
    ):
        differences.append(difference)
        if args.json:
            print_json(dataclasses.asdict(difference))
    limits = {field: limit for field in _LIMITS if (limit := getattr(args, field)) is not None}
    allowed = dataclasses.replace(rounding_tolerances(*folders, dtype), **limits)
    problems = faults(differences, allowed)
    dtype_name = str(dtype).removeprefix("torch.")
    if args.json:
        print_json(
            {"records": len(differences), "same": not problems, "faults": problems, "dtype": dtype_name}
        )
    else:
        _print_differences(differences)
        echo()
        for problem in problems:
            echo(f"differs: {problem}")
        if not problems:
            echo(
                f"equal within {allowed.pixels:g} (pixels) and {allowed.logits:.2g} of the largest logit "
                f"({dtype_name})"
            )
    return int(bool(problems))


def _examples(args: argparse.Namespace, first: Path) -> list[Example]:
    """Return the records for the comparison, preprocessed as for the first checkpoint."""
    from internvl_chat.convert.parity import examples_of, synthetic_examples

    if args.meta is None:
        return synthetic_examples(first)
    sets = open_sets(argparse.Namespace(**vars(args), model=first))
    return examples_of(sets, args.limit, args.max_dynamic_patch)


def _print_differences(differences: Sequence[Difference]) -> None:
    """Print one table row per dataset."""
    header = ("dataset", "records", "same tokens", "same tiles", "pixels", "logits", "same answers")
    rows = []
    for name in dict.fromkeys(d.dataset for d in differences):
        of_set = [d for d in differences if d.dataset == name]
        equal = [
            sum(getattr(d, field) for d in of_set) for field in ("same_ids", "same_tiles", "same_answer")
        ]
        largest = [_largest([getattr(d, field) for d in of_set]) for field in ("pixels", "logits")]
        rows.append((name, len(of_set), *equal[:2], *largest, equal[2]))
    print_table(header, rows)


def _largest(values: Sequence[float | None]) -> str:
    """Format the largest value, ignoring None; "-" if all values are None."""
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else "-"
