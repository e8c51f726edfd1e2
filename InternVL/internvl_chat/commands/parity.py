"""`m3llm parity`: two checkpoints, or two formats of one, on the same records."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import find_device, open_sets, positive
from internvl_chat.commands.output import emit, print_table, progress, say
from internvl_chat.utils.paths import REPOSITORY

if TYPE_CHECKING:
    from internvl_chat.convert.parity import Difference
    from internvl_chat.convert.parity_sides import Example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `parity`."""
    parser.add_argument("first", help="model or adapter folder; transformers' format is run by transformers")
    parser.add_argument("second", help="another, or the same in another format")
    parser.add_argument("--meta", help="meta file of the records to compare on [synthetic records]")
    parser.add_argument(
        "--data_root",
        default=REPOSITORY,
        type=Path,
        help="folder that relative paths in the meta file count from [the repository]",
    )
    parser.add_argument("--limit", type=positive, default=8, metavar="N", help="records of each dataset [8]")
    parser.add_argument("--max_dynamic_patch", type=positive, help="most tiles of a record [each model's]")
    parser.add_argument("--max_new_tokens", type=positive, default=16, help="most tokens of an answer [16]")
    parser.add_argument("--base_first", help="for adapters: where the base of the first is now")
    parser.add_argument("--base_second", help="for adapters: where the base of the second is now")
    parser.add_argument("--device", help="e.g. cpu or cuda:0 [the GPU if there is one]")
    for flag, meaning, default in (
        ("--pixel_tolerance", "largest difference of a normalised pixel", "1e-05"),
        ("--logit_tolerance", "largest difference of a logit / largest logit", "what rounding explains"),
        ("--same_answers", "smallest share of equal greedy answers", "1; in 16 bits 0"),
    ):
        parser.add_argument(flag, type=float, metavar="X", help=f"{meaning} [{default}]")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Compare two checkpoints; returns 1 if they differ by more than is allowed."""
    from internvl_chat.convert.parity import compare, comparison_dtype, faults, rounding_tolerances
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
        progress=lambda records: progress(records, total=len(examples)),
    ):
        differences.append(difference)
        if args.json:
            emit(dataclasses.asdict(difference))
    allowed = rounding_tolerances(*folders, dtype)
    for field, value in (
        ("pixels", args.pixel_tolerance),
        ("logits", args.logit_tolerance),
        ("same_answers", args.same_answers),
    ):
        if value is not None:
            allowed = dataclasses.replace(allowed, **{field: value})
    problems = faults(differences, allowed)
    arithmetic = str(dtype).removeprefix("torch.")
    if args.json:
        emit({"records": len(differences), "same": not problems, "faults": problems, "dtype": arithmetic})
    else:
        _show(differences)
        say()
        for problem in problems:
            say(f"differs: {problem}")
        if not problems:
            say(
                f"the same within {allowed.pixels:g} (pixels) and {allowed.logits:.2g} of the largest logit "
                f"({arithmetic})"
            )
    return int(bool(problems))


def _examples(args: argparse.Namespace, first: Path) -> list[Example]:
    """Return the records to compare on, read by the first checkpoint's rules."""
    from internvl_chat.convert.parity import examples_of, synthetic_examples

    if args.meta is None:
        return synthetic_examples(first)
    sets, _, _ = open_sets(argparse.Namespace(**vars(args), model=first))
    return examples_of(sets, args.limit, args.max_dynamic_patch)


def _show(differences: Sequence[Difference]) -> None:
    """Print a row for each dataset."""
    header = ("dataset", "records", "same tokens", "same tiles", "pixels", "logits", "same answers")
    rows = []
    for name in dict.fromkeys(d.dataset for d in differences):
        own = [d for d in differences if d.dataset == name]
        equal = [sum(getattr(d, f) for d in own) for f in ("same_ids", "same_tiles", "same_answer")]
        most = [_most([getattr(d, field) for d in own]) for field in ("pixels", "logits")]
        rows.append((name, len(own), *equal[:2], *most, equal[2]))
    print_table(header, rows)


def _most(values: Sequence[float | None]) -> str:
    """Return the largest of the values that could be compared."""
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else "-"
