"""Help for the training flags, by group. Does not import torch, so that help and completion are fast."""

import argparse
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from internvl_chat.train.flags import GROUPS, DataArguments, ModelArguments, RunArguments

_DESCRIPTION = "Fine-tune InternVL3. The flags override the values in CONFIG, an optional YAML or JSON file."
_USAGE = "%(prog)s [CONFIG] [--FLAG VALUE ...]"
_EXAMPLE = (
    "Example: m3llm train recipe.yaml --model_name_or_path OpenGVLab/InternVL3-8B --meta_path PMC-data.json "
    "--output_dir work_dirs/run"
)


@dataclass(frozen=True)
class FlagHelp:
    """Help entry of a flag.

    Attributes:
        name: name without leading dashes.
        type: type of the value: `str`, `int`, `float`, `bool` or `list`.
        default: default value; None if the flag has none, or if `help` gives it in brackets.
        help: one-sentence description.
        choices: accepted values; empty if there is no fixed set.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


def flag_groups() -> dict[str, list[FlagHelp]]:
    """Return all supported flags, keyed by group title, in display order."""
    groups: dict[str, list[FlagHelp]] = {title: [] for title in GROUPS.values()}
    for kind in (ModelArguments, DataArguments, RunArguments):
        for flag in fields(kind):
            groups[GROUPS[flag.metadata["group"]]].append(_describe(flag))
    return groups


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the CONFIG argument and all supported flags to a parser, for help and shell completion."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EXAMPLE
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML or JSON file with flags")
    for title, flags in flag_groups().items():
        group = parser.add_argument_group(title)
        for flag in flags:
            is_switch, is_list = flag.type == "bool", flag.type == "list"
            choices = ("True", "False") if is_switch else flag.choices
            shown = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.type.upper()
            group.add_argument(
                f"--{flag.name}",
                nargs="?" if is_switch else "+" if is_list else None,
                metavar="STR" if is_list else shown,
                choices=choices or None,
                help=(flag.help + _shown_default(flag)).replace("%", "%%"),
            )


def build_help_parser() -> argparse.ArgumentParser:
    """Return a parser that prints the help of the training script."""
    parser = argparse.ArgumentParser("internvl_chat_finetune.py")
    add_flags(parser)
    return parser


def _describe(flag: Field) -> FlagHelp:
    default = flag.default if flag.default_factory is MISSING else flag.default_factory()
    # `int | None` is shown as `int` and `list[str]` as `list`.
    name = flag.type.__name__ if isinstance(flag.type, type) else str(flag.type)
    kind = name.removesuffix(" | None").split("[")[0]
    return FlagHelp(flag.name, kind, default, flag.metadata["help"], tuple(flag.metadata.get("choices", ())))


def _shown_default(flag: FlagHelp) -> str:
    if flag.default is None or flag.default == "":
        return ""
    value = " ".join(flag.default) if isinstance(flag.default, list) else flag.default
    return f" [{value}]"
