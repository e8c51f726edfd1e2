"""Sentence similarity compared with transformers' outputs, with a small random encoder."""

import pytest
import torch
from encoders import (
    ANSWERS,
    REFERENCES,
    hidden_states,
    similarity_tolerance,
    write_bert,
    write_sentence_encoder,
)

from internvl_chat.metrics.sts import sentence_similarity
from internvl_chat.utils.errors import ModelError


def test_sentence_similarity(tmp_path):
    folder = write_sentence_encoder(tmp_path / "sentences")
    scores = sentence_similarity(ANSWERS[:6], REFERENCES[:6], model=folder, device="cpu")
    bert = folder.with_name("sentences-bert")
    means = [[hidden_states(bert, text)[-1][0].mean(0) for text in side] for side in (ANSWERS, REFERENCES)]
    expected = [float(torch.cosine_similarity(*pair, dim=0)) for pair in zip(*means, strict=True)][:6]
    assert scores == pytest.approx(expected, abs=similarity_tolerance(bert))
    assert scores[3] == pytest.approx(1, abs=similarity_tolerance(bert))


def test_unloadable_encoder(tmp_path):
    (tmp_path / "config.json").write_bytes((write_bert(tmp_path / "bert") / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded as a sentence encoder"):
        sentence_similarity(["a"], ["b"], model=tmp_path, device="cpu")
