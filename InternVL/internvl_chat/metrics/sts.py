"""STS: semantic similarity of answer and reference, as the cosine of their sentence embeddings."""

from collections.abc import Sequence
from pathlib import Path

from internvl_chat.utils.errors import ModelError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def sentence_similarity(
    predictions: Sequence[str], references: Sequence[str], *, model: Path, device: str | None = None
) -> list[float]:
    """Return the cosine similarity of each answer and its reference, from -1 to 1.

    Args:
        predictions: the answers; empty answers are embedded as well.
        references: one reference per answer.
        model: folder of a sentence-transformers model.
        device: device of the encoder (default: GPU if available).

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
