"""The command `m3llm`.

Exit codes: 0 done, 1 the data or the model is at fault, 2 the command line is.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from internvl_chat import __version__
from internvl_chat.commands import check, convert, data, doctor, evaluate, generate, models, parity
from internvl_chat.utils.errors import M3LLMError
from internvl_chat.utils.logging import configure_logging


@dataclass(frozen=True)
class _Command:
    """A subcommand: its words, what it does, an example, how it is set up and run."""

    words: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


_COMMANDS = (
    _Command("data check", "Look at every record and image before training: what can be used, and why not.",
             "m3llm data check PMC-data.json --model OpenGVLab/InternVL3-8B --report work_dirs/check",
             check.add_arguments, check.run),
    _Command("data inspect", "Show what each record becomes: tiles, tokens, what is learnt.",
             "m3llm data inspect PMC-data.json --model OpenGVLab/InternVL3-8B --limit 3",
             data.add_inspect_arguments, data.inspect),
    _Command("loss", "Compute the teacher-forced loss of each record and data set.",
             "m3llm loss PMC-data.json --model work_dirs/run --limit 100 --json",
             evaluate.add_loss_arguments, evaluate.loss),
    _Command("eval", "Evaluate on PMC-MI-Bench or another benchmark, or by exact match on a meta file.",
             "m3llm eval --bench pmc-mi --data PMC-MI-Bench --model work_dirs/run --out work_dirs/eval; "
             "or m3llm eval held_out.json --model work_dirs/run",
             evaluate.add_eval_arguments, evaluate.evaluate),
    _Command("generate", "Answer questions about any number of images.",
             'm3llm generate --model work_dirs/run --image figure.jpg "What does panel A show?"',
             generate.add_arguments, generate.run),
    _Command("merge", "Fold LoRA adapters into their base: a plain checkpoint that opens everywhere.",
             "m3llm merge work_dirs/lora work_dirs/merged",
             convert.add_merge_arguments, convert.run_merge),
    _Command("export", "Write a checkpoint in transformers' own format, or back in the reference's.",
             "m3llm export work_dirs/run work_dirs/run-hf",
             convert.add_export_arguments, convert.run_export),
    _Command("parity", "Compare two checkpoints or formats: tokens, tiles, pixels, logits, answers.",
             "m3llm parity work_dirs/run work_dirs/run-hf --meta held_out.json --limit 8",
             parity.add_arguments, parity.run),
    _Command("doctor", "Check whether this machine can train, and what to do about each problem.",
             "m3llm doctor --folder work_dirs",
             doctor.add_arguments, doctor.run),
    _Command("sample-data", "Draw a small data set of compound figures with questions and answers.",
             "m3llm sample-data work_dirs/sample --seed 0",
             data.add_sample_data_arguments, data.sample_data),
    _Command("tiny-model", "Make a small InternVL3 with random weights and its own tokenizer.",
             "m3llm tiny-model work_dirs/tiny --text work_dirs/sample/train",
             models.add_tiny_model_arguments, models.run_tiny_model),
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="m3llm",
        description="Fine-tune InternVL3 on compound figures, and use the result.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"m3llm {__version__}")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for command in _COMMANDS:
        *parents, name = command.words.split()
        group = " ".join(parents)
        if group not in groups:
            holder = groups[""].add_parser(group, help=f"Commands on {group}.")
            groups[group] = holder.add_subparsers(dest=f"{group}_command", required=True, metavar="COMMAND")
        sub = groups[group].add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"Example: {command.example}",
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    train = groups[""].add_parser(
        "train", add_help=False, help="Fine-tune; the flags are those of the training script (see --help)."
    )
    train.set_defaults(run=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if tokens[:1] == ["train"]:
        from internvl_chat.train.internvl_chat_finetune import main as train

        return train(tokens[1:])
    configure_logging()
    args = build_parser().parse_args(tokens)
    try:
        return args.run(args)
    except M3LLMError as error:
        print(f"m3llm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"m3llm: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
