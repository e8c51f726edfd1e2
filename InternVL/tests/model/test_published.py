"""Numbers of parameters of the published models."""

import pytest
import torch

from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.checkpoint import empty_model
from internvl_chat.model.published import PUBLISHED_MODELS, published_config

# Billions of parameters and the number of decimals: Hugging Face collection of InternVL3, table 1 of the
# InternVL3.5 paper.
PARAMETERS = {
    "InternVL3-1B": (0.9, 1),
    "InternVL3-2B": (2, 0),
    "InternVL3-8B": (8, 0),
    "InternVL3-14B": (15, 0),
    "InternVL3-38B": (38, 0),
    "InternVL3-78B": (78, 0),
    "InternVL3.5-1B": (1.1, 1),
    "InternVL3.5-2B": (2.3, 1),
    "InternVL3.5-4B": (4.7, 1),
    "InternVL3.5-8B": (8.5, 1),
    "InternVL3.5-14B": (15.1, 1),
    "InternVL3.5-38B": (38.4, 1),
    "InternVL3.5-30B-A3B": (30.8, 1),
    "InternVL3.5-241B-A28B": (240.7, 1),
}


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_number_of_parameters(name) -> None:
    with torch.device("meta"):
        model = empty_model(InternVLChatConfig.from_dict(published_config(name)), 0, torch.bfloat16, "varlen")
    expected, digits = PARAMETERS[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, digits) == expected
