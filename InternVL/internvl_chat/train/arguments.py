"""Parse the training command line, including a JSON or YAML file, into a frozen `TrainConfig`.

All errors are reported together. If two flags have the same meaning, the later one takes effect.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from internvl_chat import __version__
from internvl_chat.train.config import TrainConfig, resolve_run
from internvl_chat.train.flag_help import flag_groups
from internvl_chat.train.flags import RANGES, DataArguments, ModelArguments, RunArguments
from internvl_chat.train.monitor.trackers import tracker_problems
from internvl_chat.train.optim.factory import optimizer_problems
from internvl_chat.train.refused_flags import CONFIG_FILES, describe_unknown, split_refused
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

_KINDS: Any = (ModelArguments, DataArguments, RunArguments)
# Alternative flags with the same meaning; the later one takes effect.
_ALTERNATIVES = (
    ({"warmup_steps"}, {"warmup_ratio"}),
    ({"eval_strategy"}, {"evaluation_strategy"}),
    ({"sanity_check"}, {"self_test"}),
    ({"model_name_or_path"}, {"vision_path", "llm_path"}),
    ({"gradient_accumulation_steps"}, {"global_batch_size"}),
)
# These exclude each other, but one on the command line may replace the other in a configuration file.
_BATCH_FLAGS = {"gradient_accumulation_steps", "global_batch_size"}
_TWO_BATCH_SIZES = (
    "--gradient_accumulation_steps and --global_batch_size: both set the batch size; use only one"
)


class _Parser(HfArgumentParser):
    """Argument parser that raises `UsageError` instead of exiting."""

    def add_argument(self, *names: str, group: str = "", **options: Any) -> argparse.Action:
        # HfArgumentParser passes on all metadata of a field; `group` is used only by the help.
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(argv: Sequence[str] | None = None) -> TrainConfig:
    """Parse command-line flags, which override those in a leading configuration file.

    Raises:
        UsageError: flags are missing, unknown or invalid; the message lists all problems.
    """
    tokens, defaults = list(sys.argv[1:] if argv is None else argv), []
    if tokens and tokens[0].endswith(CONFIG_FILES) and not tokens[0].startswith("--"):
        defaults, tokens = _tokens_from_file(Path(tokens[0])), tokens[1:]
    batch_problems = [_TWO_BATCH_SIZES for given in (defaults, tokens) if {*_names(given)} >= _BATCH_FLAGS]
    parser = _Parser(_KINDS, add_help=False, allow_abbrev=False, exit_on_error=False)
    tokens, problems = split_refused(_override(defaults, tokens))
    problems += batch_problems
    while True:
        try:
            _, unknown = parser.parse_known_args(tokens)
            break
        except argparse.ArgumentError as error:
            flag = error.argument_name.split("/")[0] if error.argument_name else None
            problems.append(f"{flag}: {error.message}")
            tokens = _without(tokens, {*_names([flag])} if flag else None)
    problems += describe_unknown(unknown, [flag.name for group in flag_groups().values() for flag in group])
    problems += _missing(tokens)
    try:
        model, data, run, _ = parser.parse_args_into_dataclasses(
            args=tokens, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        raise UsageError([*problems, str(error)]) from None
    problems += _outside_range(model, data, run)
    resolved = resolve_run(run, problems)
    if problems:
        # `check_configuration` will not run, so report these problems, which depend only on flags.
        problems += [*optimizer_problems(resolved), *tracker_problems(resolved.report_to)]
        raise UsageError(list(dict.fromkeys(problems)))
    return TrainConfig(model, data, resolved)


def dump_config(config: TrainConfig) -> str:
    """Return the flags that differ from their defaults as YAML that `parse_arguments` can read."""
    run = config.run
    ranks, records = counted(run.world_size, "rank"), counted(run.records_per_step, "record")
    lines = [f"# m3llm {__version__}: flags that differ from their defaults\n",
             f"# {ranks} on {run.device.type}, {records} per step\n"]  # fmt: skip
    given = {**vars(config.model), **vars(config.data), **run.flags}
    for title, flags in flag_groups().items():
        changed = {flag.name: given[flag.name] for flag in flags if given[flag.name] != flag.default}
        if changed:
            lines += [f"# {title}\n", yaml.safe_dump(changed, sort_keys=False)]
    return "".join(lines)


class _Number(str):
    """Number in a configuration file, kept as written: `run_name: 007` stays 007."""


class _Loader(yaml.SafeLoader):
    """YAML loader that keeps numbers and words such as `no` as text, and rejects duplicate keys.

    The argument parser converts the numbers: YAML 1.1 would read 010 as 8, 1:30 as 90 and 2025_11 as 202511.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(name)
        return node


_BOOL, _NUMBER = "tag:yaml.org,2002:bool", "!number"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(
    _NUMBER, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z"), list("-+.0123456789")
)
_Loader.add_constructor(_NUMBER, lambda _, node: _Number(node.value))


def _missing(tokens: list[str]) -> list[str]:
    """Return an error message for each missing required flag."""
    given = set(_names(tokens))
    problems = [f"--{name} is required" for name in ("output_dir", "meta_path") if name not in given]
    if "model_name_or_path" not in given and not given >= {"vision_path", "llm_path"}:
        problems.append("--model_name_or_path is required (or --vision_path with --llm_path)")
    return problems


def _outside_range(*parts: Any) -> list[str]:
    """Return an error message for each out-of-range number and reset the number to its default."""
    problems = []
    for part in parts:
        for name, value in vars(part).items():
            if name not in RANGES or value is None or _is_within(value, interval := RANGES[name]):
                continue
            low, high = interval[1:-1].split(", ")
            bounds = {"at least " if interval[0] == "[" else "above ": low}
            bounds["at most " if interval[-1] == "]" else "below "] = high
            words = [text + bound for text, bound in bounds.items() if "inf" not in bound]
            if not math.isfinite(value):
                words = ["a finite number"]
            problems.append(f"--{name} {value} must be {' and '.join(words)}")
            object.__setattr__(part, name, getattr(type(part), name))
    return problems


def _is_within(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)


def _names(tokens: Sequence[str]) -> list[str]:
    """Return the names of all flags on a command line, in order."""
    return [t.partition("=")[0][2:].replace("-", "_") for t in tokens if t.startswith("--")]


def _override(defaults: list[str], tokens: list[str]) -> list[str]:
    """Return the flags of a configuration file followed by those of the command line.

    Flags that a later alternative replaces are omitted (see `_ALTERNATIVES`). A `max_steps` in the file is
    omitted if the command line sets only `num_train_epochs`.
    """
    for flags in _ALTERNATIVES:
        given = _names([*defaults, *tokens])
        used = next((kind for name in reversed(given) for kind in flags if name in kind), None)
        if used is None or not used <= set(given):
            continue
        others = set().union(*flags) - used
        replaced = [name for name in given if name in others]
        if replaced and distributed.rank() == 0:
            winner = next(name for name in reversed(given) if name in used)
            logger.info("--%s is ignored, because --%s is given later", replaced[-1], winner)
        defaults, tokens = _without(defaults, others), _without(tokens, others)
    given = _names(tokens)
    if "num_train_epochs" in given and "max_steps" not in given:
        defaults = _without(defaults, {"max_steps"})
    return defaults + tokens


def _without(tokens: list[str], flags: set[str] | None) -> list[str]:
    """Remove the given flags and their values from a command line; return [] if `flags` is None."""
    if flags is None:
        return []
    kept, skipping = [], False
    for token in tokens:
        if token.startswith("--"):
            skipping = _names([token])[0] in flags
        if not skipping:
            kept.append(token)
    return kept


def _tokens_from_file(path: Path) -> list[str]:
    """Return the flags of a JSON or YAML file as command-line tokens.

    Older versions wrote all flags to `config.yaml`, in the groups `model`, `data` and `training`. Such groups
    are flattened, and flags with default values are omitted: they would replace alternatives that were set.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid JSON or YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: must map flag names to values")
    defaults = {flag.name: str(flag.default) for group in flag_groups().values() for flag in group}
    tokens = []
    for name, value in loaded.items():
        if name in ("model", "data", "training") and isinstance(value, dict):
            tokens += as_tokens({key: v for key, v in value.items() if str(v) != defaults.get(key)})
        else:
            tokens += as_tokens({name: value})
    names = _names(tokens)
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"{path}: duplicate key: {', '.join(repeated)}")
    return tokens


def _with_numbers(value: Any) -> Any:
    """Return a nested value of a configuration file with its numbers parsed."""
    if isinstance(value, dict):
        return {key: _with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    if isinstance(value, _Number):
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    return value


def as_tokens(values: Mapping[str, Any]) -> list[str]:
    """Return flags as command-line tokens, omitting flags with an empty value."""
    tokens = []
    for name, value in values.items():
        if value is None or value == "":
            continue
        if isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)] if value else []
        else:
            tokens += [
                f"--{name}",
                json.dumps(_with_numbers(value)) if isinstance(value, dict) else str(value),
            ]
    return tokens
