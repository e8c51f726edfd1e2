"""Small random encoders and their outputs, for the BERTScore and sentence similarity tests."""

from pathlib import Path

import torch
from helpers import rounding_bound, terms_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

TEXT = ["the scan shows a mass in left lobe right small . of fig is to größe µm 左肺 no yes"]
# (answer, reference)
ENCODER_PAIRS = [
    ("the scan shows a mass in the left lobe .", "a mass in the right lobe ."),
    ("yes", "no"),
    ("Größe 3.5 µm 左肺", "größe 3 µm"),
    ("the same text", "the same text"),
    ("", "yes"),
    ("yes", " \n"),
    ("mass " * 100, "left lobe " * 100),
]
ANSWERS, REFERENCES = (list(side) for side in zip(*ENCODER_PAIRS, strict=True))


def write_bert(folder: Path, layers: int = 3) -> Path:
    """Write a BERT model with hidden size 16 and a tokenizer without a length limit."""
    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXT * 5, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def write_sentence_encoder(folder: Path) -> Path:
    """Write a sentence-transformers model that averages the outputs of a BERT model from `write_bert`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    words = Transformer(str(write_bert(folder.with_name(f"{folder.name}-bert"))))
    SentenceTransformer(modules=[words, Pooling(16)], device="cpu").save(str(folder))
    return folder


def similarity_tolerance(folder: Path) -> float:
    """Return the rounding bound of a similarity, which sums over two encoder outputs and is at most 1."""
    model = AutoModel.from_pretrained(folder)
    return rounding_bound(2 * terms_of(model) + model.config.hidden_size, torch.float32, 1)


def hidden_states(folder: Path, text: str) -> tuple[torch.Tensor, ...]:
    """Return the outputs of each layer for the tokens of a text, including [CLS] and [SEP]."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(text.strip(), truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states
