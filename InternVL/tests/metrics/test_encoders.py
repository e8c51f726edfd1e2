"""BERTScore and STS against transformers' own outputs, with small random encoders."""

import pytest
import torch
from encoders import write_bert, write_sentence_encoder
from helpers import rounding_bound, terms_of
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from internvl_chat.metrics.bertscore import bert_score, scored_layer
from internvl_chat.metrics.sts import sentence_similarity
from internvl_chat.utils.errors import ModelError

PAIRS = [
    ("the scan shows a mass in the left lobe .", "a mass in the right lobe ."),
    ("yes", "no"),
    ("Größe 3.5 µm 左肺", "größe 3 µm"),
    ("the same text", "the same text"),
    ("", "yes"),
    ("yes", " \n"),
    ("mass " * 100, "left lobe " * 100),
]
ANSWERS, REFERENCES = (list(side) for side in zip(*PAIRS, strict=True))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("encoder") / "bert")


def rounding(folder) -> float:
    """A similarity is at most 1, and a sum over the width of two outputs of the encoder."""
    model = AutoModel.from_pretrained(folder)
    return rounding_bound(2 * terms_of(model) + model.config.hidden_size, torch.float32, 1)


def hidden_states(folder, text: str) -> tuple[torch.Tensor, ...]:
    """What each layer says of a text's tokens, [CLS] and [SEP] among them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(text.strip(), truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


def bert_score_by_hand(folder, answer: str, reference: str, layer: int) -> float:
    """Zhang et al. (2020): the best match of every token but the special ones, both ways."""
    if not answer.strip() or not reference.strip():
        return 0.0
    said, expected = (
        torch.nn.functional.normalize(hidden_states(folder, text)[layer][0], dim=-1)
        for text in (answer, reference)
    )
    similarity = said @ expected.T
    precision = similarity.max(dim=1).values[1:-1].mean()
    recall = similarity.max(dim=0).values[1:-1].mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_bert_score(bert, layer):
    found = bert_score(ANSWERS, REFERENCES, model=bert, layer=layer, device="cpu")
    expected = [bert_score_by_hand(bert, *pair, layer) for pair in PAIRS]
    assert found == pytest.approx(expected, abs=rounding(bert))
    assert found[3] == pytest.approx(1, abs=rounding(bert)) and found[4] == found[5] == 0


def test_bert_score_without_a_word_to_score(bert):
    assert bert_score([""], ["yes"], model=bert, layer=1, device="cpu") == [0.0]


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("microsoft/deberta-xlarge-mnli", 48, 40),
        ("/models/roberta-large", 24, 17),
        ("/hub/models--bert-base-uncased", 12, 9),
        ("/models/own", 12, 9),
        ("/models/own", 1, 1),
        ("/models/bert-base-uncased", 4, 3),  # a model of that name, but not that one
    ],
)
def test_the_layer_that_is_compared(tmp_path, name, layers, expected):
    (tmp_path / "config.json").write_text(f'{{"num_hidden_layers": {layers}, "model_type": "bert"}}')
    assert scored_layer(name, tmp_path) == expected


def test_a_folder_named_as_the_hub_names_it(tmp_path):
    folder = tmp_path / "models--microsoft--deberta-xlarge-mnli/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_hidden_layers": 48}')
    assert scored_layer(str(folder), folder) == 40


@pytest.mark.parametrize("config", [None, "[]", "{}", "no json"])
def test_a_folder_that_is_no_encoder(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json: does not say how many layers"):
        scored_layer(str(tmp_path), tmp_path)


def test_a_path_that_bert_score_would_mistake(tmp_path):
    folder = tmp_path / "t5" / "bert"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_hidden_layers": 2, "model_type": "bert"}')
    with pytest.raises(ModelError, match="rename or link"):
        scored_layer(str(folder), folder)


def test_folders_that_cannot_be_loaded(bert, tmp_path):
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded for BERTScore"):
        bert_score(["a"], ["b"], model=tmp_path, layer=1, device="cpu")
    with pytest.raises(ModelError, match="cannot be loaded as a sentence encoder"):
        sentence_similarity(["a"], ["b"], model=tmp_path, device="cpu")


def test_an_encoder_whose_positions_begin_behind_the_paddings(bert, tmp_path):
    """RoBERTa has fewer positions than its configuration says."""
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=200, max_position_embeddings=30, **shape)).save_pretrained(tmp_path)
    [score] = bert_score(["mass " * 100], ["mass " * 90], model=tmp_path, layer=1, device="cpu")
    assert score == pytest.approx(1, abs=rounding(tmp_path))  # both are cut to the same words


def test_sentence_similarity(tmp_path):
    folder = write_sentence_encoder(tmp_path / "sentences")
    found = sentence_similarity(ANSWERS[:6], REFERENCES[:6], model=folder, device="cpu")
    bert = folder.with_name("sentences-bert")
    means = [[hidden_states(bert, text)[-1][0].mean(0) for text in side] for side in (ANSWERS, REFERENCES)]
    expected = [float(torch.cosine_similarity(*pair, dim=0)) for pair in zip(*means, strict=True)][:6]
    assert found == pytest.approx(expected, abs=rounding(bert))
    assert found[3] == pytest.approx(1, abs=rounding(bert))
