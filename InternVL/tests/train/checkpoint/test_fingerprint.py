"""Fingerprint of a run."""

from dataclasses import replace

import pytest
from helpers import flags

from internvl_chat.train.arguments import parse_arguments
from internvl_chat.train.checkpoint.fingerprint import FINGERPRINT, check_same_run, fingerprint
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.files import write_json


@pytest.mark.parametrize("deepspeed", [None, '{"zero_optimization": {"stage": 1}}'])
def test_world_size_is_fixed_only_with_deepspeed(tmp_path, deepspeed):
    config = parse_arguments(
        flags(model_name_or_path="m", meta_path="d", output_dir="o", deepspeed=deepspeed)
    )
    two, four = (fingerprint(replace(config, run=replace(config.run, world_size=n))) for n in (2, 4))
    write_json(tmp_path / FINGERPRINT, two)
    check_same_run(tmp_path, two)
    if deepspeed is None:
        check_same_run(tmp_path, four)
        return
    with pytest.raises(UsageError, match=r"use as many as before.* is 4, but the checkpoint has 2"):
        check_same_run(tmp_path, four)
