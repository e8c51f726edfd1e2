"""BERTScore: words matched by their contextual embeddings, by the package `bert-score`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

DEFAULT_MODEL = "microsoft/deberta-xlarge-mnli"
_T5 = ("t5", "mt5", "byt5", "umt5")


def bert_score(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    model: Path,
    layer: int,
    device: str | None = None,
) -> list[float]:
    """Return the F score of each answer, from -1 to 1; without a word on either side it is 0.

    Neither rescaled by a baseline nor weighted by idf, as the published figures.

    Args:
        predictions: the answers.
        references: one for each.
        model: folder of an encoder in transformers' format.
        layer: whose outputs are compared (`scored_layer`).
        device: by default the GPU if there is one.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    from bert_score import BERTScorer

    settings = {"num_layers": layer, "device": device, "idf": False, "rescale_with_baseline": False}
    try:
        scorer = BERTScorer(model_type=str(model), **settings)
    except (OSError, ValueError, AssertionError) as error:
        raise ModelError(f"{model}: cannot be loaded for BERTScore: {error}") from error
    # Without a limit of its own a tokenizer answers with 10**30, which the fast ones refuse.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, _longest(scorer._model))
    pairs = zip(predictions, references, strict=True)
    worded = [i for i, texts in enumerate(pairs) if all(text.strip() for text in texts)]
    scores = [0.0] * len(predictions)
    if worded:
        found = scorer.score([predictions[i] for i in worded], [references[i] for i in worded])[2]
        for i, score in zip(worded, found.tolist(), strict=True):
            scores[i] = score
    return scores


def _longest(model: Any) -> int:
    """Return how many tokens an encoder has positions for; RoBERTa's begin behind the padding's."""
    longest = getattr(model.config, "max_position_embeddings", 512)
    tables = (table for name, table in model.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return longest if padding is None else longest - padding - 1


def scored_layer(name: str, model: Path) -> int:
    """Return which layer of a model is compared.

    It is the one that the authors of BERTScore found best for a model of that name, wherever it lies; for any
    other, three quarters of the way up, where most of theirs are.

    Args:
        name: as the user gave it.
        model: its folder.

    Raises:
        ModelError: the folder holds no encoder that can be used.
    """
    from bert_score.utils import model2layers

    file = model / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layers = int(config.get("num_hidden_layers") or config.get("n_layers") or config["num_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file}: does not say how many layers the model has; BERTScore needs it") from None
    if "t5" in str(model) and config.get("model_type") not in _T5:
        raise ModelError(
            f"{model}: bert-score takes a path with 't5' in it for a T5 model; rename or link it"
        )
    known = {full.rpartition("/")[2]: layer for full, layer in model2layers.items()}
    for part in (name.rpartition("/")[2], *reversed(model.resolve().parts)):
        if (layer := known.get(part.rpartition("--")[2])) is not None and layer <= layers:
            return layer
    layer = max(1, round(0.75 * layers))
    logger.info("BERTScore compares layer %d of the %d of %s", layer, layers, model)
    return layer
