"""STS: how near in meaning an answer is to its reference, the cosine of two sentence embeddings."""

from collections.abc import Sequence
from pathlib import Path

from internvl_chat.utils.errors import ModelError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def sentence_similarity(
    predictions: Sequence[str], references: Sequence[str], *, model: Path, device: str | None = None
) -> list[float]:
    """Return the cosine of each answer's embedding with its reference's, from -1 to 1.

    Args:
        predictions: the answers; an empty one is embedded as it is.
        references: one for each.
        model: folder of a sentence-transformers model.
        device: by default the GPU if there is one.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import pairwise_cos_sim

    try:
        encoder = SentenceTransformer(str(model), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model}: cannot be loaded as a sentence encoder: {error}") from error
    embeddings = [
        encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float()
        for texts in (predictions, references)
    ]
    return pairwise_cos_sim(*embeddings).tolist()
