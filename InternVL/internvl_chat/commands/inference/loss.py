"""`m3llm loss`: teacher-forced loss of each record and dataset."""

import argparse
import dataclasses
from collections import defaultdict

from internvl_chat.commands.common import (
    add_data_arguments,
    add_model_arguments,
    count_records,
    log_warnings,
    open_sets,
)
from internvl_chat.commands.output import print_json, print_table, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `loss`."""
    add_data_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the loss of each record, then the mean per dataset and overall."""
    from internvl_chat.eval.losses import losses
    from internvl_chat.inference.engine import Engine

    sets = open_sets(args)
    log_warnings(sets, args.limit)
    engine = Engine.from_checkpoint(args.model, device=args.device, base=args.base)
    by_dataset: dict[str, list[float]] = defaultdict(list)
    rows = losses(engine.model, sets, sets[0].encoder.preprocessing.normalize_type, args.limit)
    for row in progress(rows, total=count_records(sets, args.limit)):
        by_dataset[row.dataset].append(row.loss)
        if args.json:
            print_json(dataclasses.asdict(row))
    everything = [value for values in by_dataset.values() for value in values]
    means = [
        (name, len(values), sum(values) / len(values))
        for name, values in [*by_dataset.items(), ("all", everything)]
    ]
    if args.json:
        for name, records, mean in means:
            print_json({"dataset": name, "records": records, "loss": mean})
    else:
        print_table(("dataset", "records", "loss"), [(name, n, f"{mean:.4f}") for name, n, mean in means])
    return 0
