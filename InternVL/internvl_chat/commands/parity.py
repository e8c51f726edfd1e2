"""`m3llm parity`: compare a checkpoint with another one, another format or an endpoint, record by record."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.commands.common import add_data_root, add_tile_limit, open_sets, positive
from internvl_chat.commands.output import echo, print_json, print_table, progress
from internvl_chat.constants import API_KEY_VARIABLE
from internvl_chat.utils.errors import UsageError

if TYPE_CHECKING:
    from internvl_chat.convert.endpoint_parity import EndpointDifference
    from internvl_chat.convert.parity import Difference
    from internvl_chat.convert.parity_runners import Example

_LIMITS = ("pixels", "logits", "same_answers")
# Arguments that have no effect with an endpoint, and those that require one.
_CHECKPOINTS_ONLY = {"second": "SECOND", "base_second": "--base_second", "pixels": "--pixel_tolerance",
                     "logits": "--logit_tolerance"}  # fmt: skip
_ENDPOINT_ONLY = {"api_key": "--api_key", "served_model_name": "--served_model_name"}
# Default of --same_answers with an endpoint: rounding in 16-bit formats changes some answers.
_SAME_ANSWERS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `parity`."""
    add = parser.add_argument
    add("first", help="model or adapter folder; transformers runs checkpoints in its own format")
    add("second", nargs="?",
        help="checkpoint to compare with, such as the first one in a different format")  # fmt: skip
    add("--endpoint", metavar="URL",
        help="OpenAI-compatible endpoint to compare with instead, for example http://localhost:8000/v1: "
        "prompt tokens, image tokens and greedy answers")  # fmt: skip
    add("--api_key", help=f"key of the endpoint (default: ${API_KEY_VARIABLE})")
    add("--served_model_name", metavar="NAME",
        help="name of the model at the endpoint (default: the only one)")  # fmt: skip
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
        help="minimum fraction of identical greedy answers (default: 1, or 0 in 16-bit formats; 0.5 with an "
        "endpoint)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Compare a checkpoint with another one or an endpoint; return 1 if they differ beyond tolerance."""
    _check_arguments(args)
    return _compare_endpoint(args) if args.endpoint else _compare_checkpoints(args)


def _check_arguments(args: argparse.Namespace) -> None:
    """Check that the arguments fit together.

    Raises:
        UsageError: neither or both of a checkpoint and an endpoint are given, or an argument has no effect.
    """
    if not args.endpoint and args.second is None:
        raise UsageError("SECOND (a checkpoint) or --endpoint (a URL) is required")
    others = _CHECKPOINTS_ONLY if args.endpoint else _ENDPOINT_ONLY
    given = [flag for name, flag in others.items() if getattr(args, name) is not None]
    verb = "cannot be combined with" if args.endpoint else "requires"
    if given:
        raise UsageError([f"{flag} {verb} --endpoint" for flag in given])


def _compare_endpoint(args: argparse.Namespace) -> int:
    from internvl_chat.convert.endpoint import Endpoint
    from internvl_chat.convert.endpoint_parity import EndpointComparison
    from internvl_chat.inference.engine import Engine
    from internvl_chat.model.io.folders import model_folder

    key = args.api_key or os.environ.get(API_KEY_VARIABLE)
    endpoint = Endpoint(args.endpoint, api_key=key, model=args.served_model_name)
    first = model_folder(args.first)
    examples = _examples(args, first)
    engine = Engine.from_checkpoint(first, device=args.device, base=args.base_first)
    comparison = EndpointComparison(engine, endpoint)
    differences = []
    for difference in comparison.run(progress(examples), args.max_new_tokens):
        differences.append(difference)
        if args.json:
            print_json(dataclasses.asdict(difference))
    same_answers = _SAME_ANSWERS if args.same_answers is None else args.same_answers
    problems = comparison.faults(differences, same_answers)
    if args.json:
        print_json({"records": len(differences), "same": not problems, "faults": problems})
    else:
        print_endpoint_differences(differences)
        _print_faults(problems)
        if not problems:
            echo(f"the token counts are equal, and at least {same_answers:.0%} of the answers are identical")
    return int(bool(problems))


def _compare_checkpoints(args: argparse.Namespace) -> int:
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
        _print_faults(problems)
        if not problems:
            echo(
                f"equal within {allowed.pixels:g} (pixels) and {allowed.logits:.2g} of the largest logit "
                f"({dtype_name})"
            )
    return int(bool(problems))


def _examples(args: argparse.Namespace, first: Path) -> list[Example]:
    """Return the records on which to compare, with the preprocessing of the first checkpoint."""
    from internvl_chat.convert.parity import examples_of, synthetic_examples

    if args.meta is None:
        return synthetic_examples(first)
    sets = open_sets(argparse.Namespace(**vars(args), model=first))
    return examples_of(sets, args.limit, args.max_dynamic_patch)


def _print_differences(differences: Sequence[Difference]) -> None:
    """Print a table of the differences, with one row per dataset."""
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


def print_endpoint_differences(differences: Sequence[EndpointDifference]) -> None:
    """Print one table row per dataset; "-" if the endpoint does not report token counts."""
    header = ("dataset", "records", "same prompt tokens", "same image tokens", "same answers")
    rows = []
    for name in dict.fromkeys(d.dataset for d in differences):
        of_set = [d for d in differences if d.dataset == name]
        equal = {
            field: sum(getattr(d, field) for d in of_set)
            for field in ("same_prompt_tokens", "same_image_tokens", "same_answer")
        }
        if all(d.prompt_tokens[1] is None for d in of_set):
            equal["same_prompt_tokens"] = equal["same_image_tokens"] = "-"
        rows.append((name, len(of_set), *equal.values()))
    print_table(header, rows)


def _print_faults(problems: Sequence[str]) -> None:
    echo()
    for problem in problems:
        echo(f"differs: {problem}")


def _largest(values: Sequence[float | None]) -> str:
    """Format the largest value, ignoring None; "-" if all values are None."""
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else "-"
