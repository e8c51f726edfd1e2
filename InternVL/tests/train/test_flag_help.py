"""The help of the training flags: complete, grouped, and without rejected flags."""

import dataclasses
import re

import pytest

from internvl_chat.train.flag_help import build_help_parser, flag_groups
from internvl_chat.train.flags import DataArguments, ModelArguments, RunArguments
from internvl_chat.train.internvl_chat_finetune import main as train
from internvl_chat.train.refused_flags import REFUSED_FLAGS

SUPPORTED = [
    f.name for kind in (ModelArguments, DataArguments, RunArguments) for f in dataclasses.fields(kind)
]


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """Sections of the help, keyed by title."""
    parts = re.split(r"^(\S.*):\n", build_help_parser().format_help(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_supported_flag_is_in_exactly_one_group(sections):
    groups = flag_groups()
    assert sorted(flag.name for flags in groups.values() for flag in flags) == sorted(SUPPORTED)
    for title, flags in groups.items():
        shown = re.findall(r"^  --(\w+)", sections[title], flags=re.MULTILINE)
        assert shown == [flag.name for flag in flags]
    assert list(groups) == list(sections)[-len(groups) :]


def test_groups_of_common_flags():
    """One flag from each of the most common groups."""
    groups = {flag.name: title for title, flags in flag_groups().items() for flag in flags}
    expected = {
        "model_name_or_path": "Model", "meta_path": "Data", "use_llm_lora": "LoRA",
        "learning_rate": "Optimization", "grad_checkpoint": "Memory and speed",
        "eval_strategy": "Validation", "report_to": "Logging and checks",
    }  # fmt: skip
    assert {name: groups[name] for name in expected} == expected


def test_rejected_flags_are_not_shown(capfd):
    assert train(["--help"]) == 0
    shown = set(re.findall(r"--([a-z]\w+)", capfd.readouterr().out))
    assert shown == set(SUPPORTED) | {"help"}
    assert not shown & REFUSED_FLAGS.keys()


def test_each_flag_has_one_short_sentence_and_its_default(sections):
    flags = {flag.name: flag for group in flag_groups().values() for flag in group}
    for flag in flags.values():
        assert flag.help[0].isupper() or flag.name == "fsdp"
        assert flag.help.endswith((".", "].")) and len(flag.help) < 150, flag.name
    assert (flags["learning_rate"].type, flags["learning_rate"].default) == ("float", 5e-5)
    assert (flags["eval_steps"].type, flags["eval_steps"].default) == ("float", None)
    assert (flags["report_to"].type, flags["report_to"].default) == ("list", ["none"])
    assert flags["check"].choices == ("full", "fast", "off")
    text = " ".join("".join(sections.values()).split())
    for shown in (
        "--learning_rate FLOAT Peak learning rate. [5e-05]",
        "--ps_version {v1,v2} Version of the pixel shuffle. [v2]",
        "a fraction of all steps if below 1 [--save_steps].",
        "--packing [BOOL]",
    ):
        assert shown in text
