"""Names of the evaluation metrics, and the packages and models that they require."""

import importlib.util
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.metrics import bertscore, sts
from internvl_chat.utils.errors import ModelError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Family -> its metrics for open questions, in the order of the report.
FAMILIES = {
    "bleu": ("bleu1", "bleu2", "bleu3", "bleu4"),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "overlap": ("em", "f1", "precision", "recall"),
    "cider": ("cider",),
    "bertscore": ("bertscore",),
    "sts": ("sts",),
    "macro": (),
}
OPEN_METRICS = tuple(name for names in FAMILIES.values() for name in names)
# Fraction of answers that a language model graded as correct, see eval/judge.py.
JUDGE = "judge"
CHOICE_METRICS = ("accuracy", "f1", "recall", "precision")
_PACKAGES = {
    "bleu": "nltk",
    "rouge": "rouge",
    "bertscore": "bert_score",
    "sts": "sentence_transformers",
    "macro": "sklearn",
}
# Weight formats that are not used, so they are not downloaded.
_IGNORED_FILES = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*", "*.tflite", "coreml/*"]


@dataclass(frozen=True)
class Suite:
    """The metrics to compute.

    Attributes:
        families: keys of `FAMILIES` (accuracy is always computed).
        bertscore_model: folder of the BERTScore encoder, if used.
        bertscore_layer: layer whose outputs BERTScore compares.
        sts_model: folder of the sentence encoder, if used.
        device: device of both encoders (default: GPU if available).
    """

    families: frozenset[str]
    bertscore_model: Path | None = None
    bertscore_layer: int = 0
    sts_model: Path | None = None
    device: str | None = None


def build_suite(
    requested: Sequence[str] | None,
    *,
    has_open: bool = True,
    bertscore_model: str | None = None,
    sts_model: str | None = None,
    device: str | None = None,
) -> Suite:
    """Return the metrics to compute, after checking their packages and locating their models.

    Unavailable metrics are skipped with a warning, unless they were requested.

    Args:
        requested: families to compute (default: all available).
        has_open: whether there are open questions; if not, the default is only `macro`.
        bertscore_model: folder or Hub id of the encoder; setting it also requests BERTScore.
        sts_model: folder or Hub id of the encoder; setting it also requests STS.
        device: device of the encoders, or `auto`.

    Raises:
        UsageError: a requested metric is unavailable; the message lists all missing packages and models.
    """
    families = set(requested if requested is not None else FAMILIES if has_open else ("macro",))
    required = set(requested or ())
    required |= {f for f, model in (("bertscore", bertscore_model), ("sts", sts_model)) if model}
    missing = {
        family: f"the package {package} is not installed (pip install '.[eval]')"
        for family, package in _PACKAGES.items()
        if family in families | required and importlib.util.find_spec(package) is None
    }
    models: dict[str, Path] = {}
    names = {"bertscore": bertscore_model or bertscore.DEFAULT_MODEL, "sts": sts_model or sts.DEFAULT_MODEL}
    layer = 0
    for family in (families | required) & names.keys() - missing.keys():
        try:
            models[family] = _find_model(names[family])
            if family == "bertscore":
                layer = bertscore.select_layer(names[family], models[family])
        except ModelError as error:
            missing[family] = f"{error}; pass a local folder with --{family}_model"
    unavailable = [f"{family}: {reason}" for family, reason in missing.items() if family in required]
    if unavailable:
        raise UsageError(
            [f"{text}; alternatively, choose different metrics with --metrics" for text in unavailable]
        )
    for family, reason in missing.items():
        logger.warning("%s is not computed: %s", family, reason)
    computed = frozenset((families | required) - missing.keys())
    return Suite(
        computed, models.get("bertscore"), layer, models.get("sts"), None if device == "auto" else device
    )


def _find_model(name: str) -> Path:
    """Return the folder of an encoder, downloading it if `name` is a Hub id.

    Raises:
        ModelError: the model is neither in a local folder nor on the Hub, or its folder has no weights.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(file.suffix in (".safetensors", ".bin") for file in folder.rglob("*")):
            raise ModelError(f"{name}: contains no weights (*.safetensors or *.bin)")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=_IGNORED_FILES))
    except Exception as error:
        reason = textwrap.shorten(str(error).strip() or type(error).__name__, 200, placeholder=" ...")
        raise ModelError(
            f"{name}: neither a local folder nor available from the Hugging Face Hub ({reason})"
        ) from error
