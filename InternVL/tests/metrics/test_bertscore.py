"""BERTScore compared with a computation from transformers' outputs, with small random encoders."""

import pytest
import torch
from encoders import ANSWERS, ENCODER_PAIRS, REFERENCES, hidden_states, similarity_tolerance, write_bert
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from internvl_chat.metrics.bertscore import bert_score, select_layer
from internvl_chat.utils.errors import ModelError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("encoder") / "bert")


def expected_bert_score(folder, answer: str, reference: str, layer: int) -> float:
    """Zhang et al. (2020): best match of each token except special tokens, in both directions."""
    if not answer.strip() or not reference.strip():
        return 0.0
    predicted, expected = (
        torch.nn.functional.normalize(hidden_states(folder, text)[layer][0], dim=-1)
        for text in (answer, reference)
    )
    similarity = predicted @ expected.T
    precision = similarity.max(dim=1).values[1:-1].mean()
    recall = similarity.max(dim=0).values[1:-1].mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_bert_score(bert, layer):
    scores = bert_score(ANSWERS, REFERENCES, model=bert, layer=layer, device="cpu")
    expected = [expected_bert_score(bert, *pair, layer) for pair in ENCODER_PAIRS]
    assert scores == pytest.approx(expected, abs=similarity_tolerance(bert))
    assert scores[3] == pytest.approx(1, abs=similarity_tolerance(bert)) and scores[4] == scores[5] == 0


def test_only_empty_answers(bert):
    assert bert_score([""], ["yes"], model=bert, layer=1, device="cpu") == [0.0]


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("microsoft/deberta-xlarge-mnli", 48, 40),
        ("/models/roberta-large", 24, 17),
        ("/hub/models--bert-base-uncased", 12, 9),
        ("/models/own", 12, 9),
        ("/models/own", 1, 1),
        ("/models/bert-base-uncased", 4, 3),  # the name matches, but the model is smaller
    ],
)
def test_select_layer(tmp_path, name, layers, expected):
    (tmp_path / "config.json").write_text(f'{{"num_hidden_layers": {layers}, "model_type": "bert"}}')
    assert select_layer(name, tmp_path) == expected


def test_layer_of_a_hub_cache_folder(tmp_path):
    folder = tmp_path / "models--microsoft--deberta-xlarge-mnli/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_hidden_layers": 48}')
    assert select_layer(str(folder), folder) == 40


@pytest.mark.parametrize("config", [None, "[]", "{}", "no json"])
def test_folder_without_a_usable_config(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json: does not contain the number of layers"):
        select_layer(str(tmp_path), tmp_path)


def test_path_with_t5(tmp_path):
    folder = tmp_path / "t5" / "bert"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_hidden_layers": 2, "model_type": "bert"}')
    with pytest.raises(ModelError, match="rename or symlink"):
        select_layer(str(folder), folder)


def test_unloadable_encoder(bert, tmp_path):
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded for BERTScore"):
        bert_score(["a"], ["b"], model=tmp_path, layer=1, device="cpu")


def test_positions_after_the_padding_index(bert, tmp_path):
    """RoBERTa has fewer usable positions than its configuration specifies."""
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=200, max_position_embeddings=30, **shape)).save_pretrained(tmp_path)
    [score] = bert_score(["mass " * 100], ["mass " * 90], model=tmp_path, layer=1, device="cpu")
    assert score == pytest.approx(
        1, abs=similarity_tolerance(tmp_path)
    )  # both are truncated to the same words
