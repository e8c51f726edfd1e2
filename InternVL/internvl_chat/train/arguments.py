"""Parse the training command line, or a JSON or YAML file, into a frozen `TrainConfig`.

All errors are reported together.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from internvl_chat import __version__
from internvl_chat.train.config import TrainConfig, resolve_run
from internvl_chat.train.flag_help import flag_groups
from internvl_chat.train.flags import DataArguments, ModelArguments, RunArguments
from internvl_chat.train.refused_flags import split_refused
from internvl_chat.utils.errors import UsageError


class _Parser(HfArgumentParser):
    """A parser that raises `UsageError` instead of exiting."""

    def add_argument(self, *names: str, group: str = "", **options: Any) -> argparse.Action:
        # HfArgumentParser passes the metadata of a field on; only the help uses the group.
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _build_parser() -> HfArgumentParser:
    kinds: Any = (ModelArguments, DataArguments, RunArguments)
    return _Parser(kinds, add_help=False, allow_abbrev=False, exit_on_error=False)


def parse_arguments(argv: Sequence[str] | None = None) -> TrainConfig:
    """Parse flags, optionally after a configuration file, whose values they override.

    Raises:
        UsageError: lists all unknown flags and invalid values.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    if tokens and tokens[0].endswith((".json", ".yaml", ".yml")) and not tokens[0].startswith("--"):
        tokens = _tokens_from_file(Path(tokens[0])) + tokens[1:]
    parser = _build_parser()
    tokens, problems = split_refused(tokens)
    while True:
        try:
            _, unknown = parser.parse_known_args(tokens)
            break
        except argparse.ArgumentError as error:
            flag = error.argument_name.split("/")[0] if error.argument_name else None
            problems.append(f"{flag}: {error.message}")
            tokens = _without(tokens, flag)
    problems += _unknown_flags(unknown)
    problems += _missing(tokens)
    if problems:
        raise UsageError(problems)
    try:
        model, data, run = parser.parse_args_into_dataclasses(args=tokens, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    return TrainConfig(model, data, resolve_run(run))


def dump_config(config: TrainConfig) -> str:
    """Return the flags that differ from their defaults as YAML, which `parse_arguments` reads again."""
    run = config.run
    ranks = "1 rank" if run.world_size == 1 else f"{run.world_size} ranks"
    lines = [f"# m3llm {__version__}: flags that differ from their defaults\n",
             f"# {ranks} on {run.device.type}, {run.records_per_step} records per step\n"]  # fmt: skip
    given = {**vars(config.model), **vars(config.data), **run.flags}
    for title, flags in flag_groups().items():
        changed = {flag.name: given[flag.name] for flag in flags if given[flag.name] != flag.default}
        if changed:
            lines += [f"# {title}\n", yaml.safe_dump(changed, sort_keys=False)]
    return "".join(lines)


class _Loader(yaml.SafeLoader):
    """A loader that reads only true and false as truth values, so that `eval_strategy: no` is text."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def _missing(tokens: list[str]) -> list[str]:
    """Report missing required flags."""
    given = {token.partition("=")[0].replace("-", "_") for token in tokens if token.startswith("--")}
    problems = [f"--{name} is required" for name in ("output_dir", "meta_path") if f"__{name}" not in given]
    if not given & {"__model_name_or_path"} and not given >= {"__vision_path", "__llm_path"}:
        problems.append("--model_name_or_path is required (or --vision_path with --llm_path)")
    return problems


def _unknown_flags(unknown: list[str]) -> list[str]:
    """Report unknown flags, each with the closest known flag."""
    known = [f"--{f.name}" for kind in (ModelArguments, DataArguments, RunArguments) for f in fields(kind)]
    problems = []
    for token in unknown:
        if token.startswith("--"):
            name = token.partition("=")[0]
            matches = difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown flag {name}" + (f"; did you mean {matches[0]}?" if matches else ""))
    return problems or [f"unexpected argument {token!r}" for token in unknown]


def _without(tokens: list[str], flag: str | None) -> list[str]:
    """Remove a flag and its values."""
    if flag is None:
        return []
    kept, skipping = [], False
    for token in tokens:
        if token.startswith("--"):
            skipping = token.partition("=")[0].replace("-", "_") == flag.replace("-", "_")
        if not skipping:
            kept.append(token)
    return kept


def _tokens_from_file(path: Path) -> list[str]:
    """Return the flags of a JSON or YAML file, flat or in the groups of an older `config.yaml`."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid JSON or YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: must map flag names to values")
    tokens = []
    for name, value in loaded.items():
        is_group = name in ("model", "data", "training") and isinstance(value, dict)
        tokens += as_tokens(value if is_group else {name: value})
    return tokens


def as_tokens(values: Mapping[str, Any]) -> list[str]:
    """Return the names and values of flags as command-line tokens, without empty values."""
    tokens = []
    for name, value in values.items():
        if value is None or value == "":
            continue
        if isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)] if value else []
        else:
            tokens += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return tokens
