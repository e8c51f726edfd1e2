"""Trainable parameters."""

import pytest
from model.conftest import make_model

from internvl_chat.train.freeze import set_trainable


@pytest.mark.parametrize(("select", "used"), [(-1, 2), (-2, 1), (1, 1), (2, 2), (0, 0)])
@pytest.mark.parametrize("flags", [{}, {"freeze_backbone": True, "unfreeze_vit_layers": -2}])
def test_blocks_after_the_selected_one_are_not_trained(select, used, flags):
    """They get no gradients, so DDP would wait for them forever."""
    model = make_model(select_layer=select)
    set_trainable(model, **flags)
    trained = [
        all(p.requires_grad for p in block.parameters()) for block in model.vision_model.encoder.layers
    ]
    assert trained == [number < used for number in range(len(trained))]
