"""Write flags.md, the page of all training flags, from their definitions.

python InternVL/docs/make_flags.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internvl_chat.train.flag_help import FlagHelp, flag_groups
from internvl_chat.train.refused_flags import REFUSED_FLAGS
from internvl_chat.utils.markdown import markdown_table

PAGE = Path(__file__).with_name("flags.md")
COMMAND = "python InternVL/docs/make_flags.py"

HEAD = f"""\
<!-- Written by `{COMMAND}`; edit the flags in train/flags.py instead. -->

# Training flags

The flags of `m3llm train`, and of the launchers, which pass them on. A JSON or YAML file with the same names
may come first ([configuration files](training.md#configuration-files)). Every flag of
[the reference](../../README.md#the-reference) is accepted. Defaults are those of the training script; the
launchers set the values of the [recipe](training.md#recipe). A switch takes `True` or `False`; its name alone
means `True`.
"""

REFUSED = """\
## Refused flags

These flags of transformers' `TrainingArguments` have no effect here. They are refused with this advice,
unless their value changes nothing.
"""

VALUES = {"str": "text", "int": "whole number", "float": "number", "bool": "switch", "list": "names"}


def flags_page() -> str:
    """Return the text of flags.md."""
    parts = [HEAD]
    for title, flags in flag_groups().items():
        rows = [(f"`--{flag.name}`", _values(flag), _default(flag), flag.help) for flag in flags]
        parts.append(f"## {title}\n\n{markdown_table(('flag', 'values', 'default', 'meaning'), rows)}\n")
    rows = [(f"`--{name}`", advice) for name, (_, advice) in sorted(REFUSED_FLAGS.items())]
    parts.append(f"{REFUSED}\n{markdown_table(('flag', 'advice'), rows)}\n")
    return "\n".join(parts)


def _values(flag: FlagHelp) -> str:
    return ", ".join(f"`{choice}`" for choice in flag.choices) or VALUES[flag.type]


def _default(flag: FlagHelp) -> str:
    """Return the default; a computed default is in brackets at the end of the help instead."""
    if flag.default is None or flag.default == "":
        return ""
    value = " ".join(flag.default) if isinstance(flag.default, list) else flag.default
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
