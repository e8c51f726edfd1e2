"""BERTScore: similarity of contextual token embeddings, computed by the `bert-score` package."""

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
    """Return the F1 score of each answer, from -1 to 1; 0 if the answer or its reference is empty.

    As in the published results, there is no baseline rescaling and no idf weighting.

    Args:
        predictions: the answers.
        references: one reference per answer.
        model: folder of an encoder in transformers format.
        layer: layer whose outputs are compared; see `select_layer`.
        device: device of the encoder (default: GPU if available).

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    from bert_score import BERTScorer

    settings = {"num_layers": layer, "device": device, "idf": False, "rescale_with_baseline": False}
    try:
        scorer = BERTScorer(model_type=str(model), **settings)
    except (OSError, ValueError, AssertionError) as error:
        raise ModelError(f"{model}: cannot be loaded for BERTScore: {error}") from error
    # Without a configured limit, `model_max_length` is 10**30, which fast tokenizers reject.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, _max_length(scorer._model))
    pairs = zip(predictions, references, strict=True)
    nonempty = [i for i, texts in enumerate(pairs) if all(text.strip() for text in texts)]
    scores = [0.0] * len(predictions)
    if nonempty:
        f_scores = scorer.score([predictions[i] for i in nonempty], [references[i] for i in nonempty])[2]
        for i, score in zip(nonempty, f_scores.tolist(), strict=True):
            scores[i] = score
    return scores


def _max_length(model: Any) -> int:
    """Return an encoder's maximum sequence length in tokens.

    RoBERTa does not use the positions up to the padding index, so it accepts fewer tokens.
    """
    length = getattr(model.config, "max_position_embeddings", 512)
    tables = (table for name, table in model.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return length if padding is None else length - padding - 1


def select_layer(name: str, model: Path) -> int:
    """Return the layer whose outputs BERTScore compares.

    For models that the BERTScore authors have evaluated, identified by their folder name, this is the layer
    that they recommend. For other models, it is the layer at three quarters of the depth, close to most of
    the recommended layers.

    Args:
        name: model name given by the user.
        model: model folder.

    Raises:
        ModelError: the folder does not contain an encoder that bert-score can load.
    """
    from bert_score.utils import model2layers

    file = model / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layers = int(config.get("num_hidden_layers") or config.get("n_layers") or config["num_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file}: does not contain the number of layers, which BERTScore requires") from None
    if "t5" in str(model) and config.get("model_type") not in _T5:
        raise ModelError(
            f"{model}: bert-score treats paths that contain 't5' as T5 models; rename or symlink the folder"
        )
    known = {full.rpartition("/")[2]: layer for full, layer in model2layers.items()}
    for part in (name.rpartition("/")[2], *reversed(model.resolve().parts)):
        if (layer := known.get(part.rpartition("--")[2])) is not None and layer <= layers:
            return layer
    layer = max(1, round(0.75 * layers))
    logger.info("BERTScore: comparing the outputs of layer %d of %d in %s", layer, layers, model)
    return layer
