"""Command-line interface `m3llm`.

Exit codes: 0 success, 1 data, model or training error, 2 invalid command line, 128 + n stopped by signal n.
"""

# PYTHON_ARGCOMPLETE_OK

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from internvl_chat import __version__
from internvl_chat.commands import compare, doctor, export, merge, parity, plan, report, tiny_model
from internvl_chat.commands import eval as evaluate
from internvl_chat.commands.data import browse, check, inspect, sample_data, shard
from internvl_chat.commands.inference import chat, generate, loss, serve, web
from internvl_chat.train.flag_help import add_flags
from internvl_chat.utils.errors import M3LLMError
from internvl_chat.utils.logging import configure_logging

# Name, module (with `add_arguments` and `run`), summary, example.
_COMMANDS: tuple[tuple[str, ModuleType, str, str], ...] = (
    ("data check", check, "Check every record and image before training.",
     "m3llm data check PMC-data.json --model OpenGVLab/InternVL3-8B --report work_dirs/check"),
    ("data inspect", inspect, "Print the tiles, tokens and supervised text of each record.",
     "m3llm data inspect PMC-data.json --model OpenGVLab/InternVL3-8B --limit 3"),
    ("data browse", browse, "Page through the records as the model sees them, in a web browser.",
     "m3llm data browse PMC-data.json --model OpenGVLab/InternVL3-8B"),
    ("data shard", shard, "Write the images to tar shards, for shared file systems and object storage.",
     "m3llm data shard PMC-data.json /data/pmc-shards"),
    ("loss", loss, "Compute the teacher-forced loss of each record and dataset.",
     "m3llm loss PMC-data.json --model work_dirs/run --limit 100 --json"),
    ("eval", evaluate, "Evaluate on PMC-MI-Bench or another benchmark, or with exact match on a meta file.",
     "m3llm eval --bench pmc-mi --data PMC-MI-Bench --model work_dirs/run --out work_dirs/eval\n"
     "         m3llm eval held_out.json --model work_dirs/run\n"
     "         m3llm eval compare work_dirs/eval-base work_dirs/eval  (see m3llm eval compare --help)"),
    ("eval compare", compare, "Compare the evaluations of several models with significance tests.",
     "m3llm eval compare work_dirs/eval-base work_dirs/eval --out work_dirs/compare"),
    ("generate", generate, "Answer questions about one or more images.",
     'm3llm generate --model work_dirs/run --image figure.jpg "What does panel A show?"'),
    ("chat", chat, "Chat about images in the terminal.",
     "m3llm chat work_dirs/run --image figure.jpg"),
    ("web", web, "Ask one or two models about figures on a web page.",
     "m3llm web work_dirs/merged"),
    ("serve", serve, "Serve a model through an OpenAI-compatible API.",
     "m3llm serve work_dirs/merged --port 8000"),
    ("merge", merge, "Merge LoRA adapters into their base model and write a standalone checkpoint.",
     "m3llm merge work_dirs/lora work_dirs/merged"),
    ("export", export, "Convert a checkpoint to the transformers format, or back to the reference format.",
     "m3llm export work_dirs/run work_dirs/run-hf"),
    ("parity", parity, "Compare the tokens, tiles, pixels, logits and answers of two checkpoints or formats.",
     "m3llm parity work_dirs/run work_dirs/run-hf --meta held_out.json --limit 8\n"
     "         m3llm parity work_dirs/run --endpoint http://localhost:8000"),
    ("plan", plan, "Predict memory, time, checkpoints and cost of a training run on given hardware.",
     "m3llm plan --recipe full --gpu h200 --gpus 8 --nodes 2"),
    ("report", report, "Write an HTML report of a training run, or compare several.",
     "m3llm report work_dirs/run"),
    ("doctor", doctor, "Check whether this machine can train, and suggest a fix for each problem.",
     "m3llm doctor --folder work_dirs"),
    ("sample-data", sample_data, "Create a small synthetic dataset of compound figures with questions and "
     "answers.", "m3llm sample-data work_dirs/sample --seed 0"),
    ("tiny-model", tiny_model, "Create a small InternVL3 model with random weights and its own tokenizer.",
     "m3llm tiny-model work_dirs/tiny --text work_dirs/sample/train"),
)  # fmt: skip

# Commands whose first word is a command too; parsed as a single word.
_NESTED = ("eval compare",)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="m3llm",
        description="Fine-tune InternVL3 on compound figures; evaluate, export and run the result.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"m3llm {__version__}")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for words, module, summary, example in _COMMANDS:
        group, _, name = ("", "", words) if words in _NESTED else words.rpartition(" ")
        if group not in groups:
            group_parser = groups[""].add_parser(group, help="Check or inspect the training data.")
            groups[group] = group_parser.add_subparsers(required=True, metavar="COMMAND")
        command = groups[group].add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"Example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    # Only for help and completion: the training script parses its own flags.
    add_flags(groups[""].add_parser("train", help="Fine-tune a model with the given recipe and flags."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if " ".join(tokens[:2]) in _NESTED:
        tokens = [" ".join(tokens[:2]), *tokens[2:]]
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell during completion
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options="long")
    if tokens[:1] == ["train"] and not {"-h", "--help"} & {*tokens}:
        from internvl_chat.train.internvl_chat_finetune import main as train

        return train(tokens[1:])
    configure_logging()
    args = parser.parse_args(tokens)
    try:
        return args.run(args)
    except M3LLMError as error:
        print(f"m3llm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"m3llm: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
