"""The metrics that an evaluation computes: their names, what each needs, and whether that is there."""

import importlib.util
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.metrics import bertscore, sts
from internvl_chat.utils.errors import ModelError, UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Family -> the metrics that it computes of open questions, in the order of the report.
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
CHOICE_METRICS = ("accuracy", "f1", "recall", "precision")
_PACKAGES = {
    "bleu": "nltk",
    "rouge": "rouge",
    "bertscore": "bert_score",
    "sts": "sentence_transformers",
    "macro": "sklearn",
}
# What is never read of a scoring model's repository: the same weights for other programs.
_NOT_DOWNLOADED = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*", "*.tflite", "coreml/*"]


@dataclass(frozen=True)
class Suite:
    """What is computed.

    Attributes:
        families: keys of `FAMILIES`; accuracy is always computed.
        bertscore_model: folder of the encoder of BERTScore, if it is computed.
        bertscore_layer: whose outputs it compares.
        sts_model: folder of the sentence encoder, if STS is computed.
        device: of both encoders; by default the GPU if there is one.
    """

    families: frozenset[str]
    bertscore_model: Path | None = None
    bertscore_layer: int = 0
    sts_model: Path | None = None
    device: str | None = None


def build_suite(
    wanted: Sequence[str] | None,
    *,
    has_open: bool = True,
    bertscore_model: str | None = None,
    sts_model: str | None = None,
    device: str | None = None,
) -> Suite:
    """Find all that the metrics need, before anything is answered.

    Args:
        wanted: families that are asked for; None asks for all that can be computed here.
        has_open: there are open questions; without them nothing but `macro` is computed unasked.
        bertscore_model: folder or hub id; naming one asks for BERTScore.
        sts_model: folder or hub id; naming one asks for STS.
        device: of the encoders, or `auto`.

    Raises:
        UsageError: what is asked for cannot be computed; names every package and model that is missing.
    """
    families = set(wanted if wanted is not None else FAMILIES if has_open else ("macro",))
    asked = set(wanted or ())
    asked |= {f for f, model in (("bertscore", bertscore_model), ("sts", sts_model)) if model}
    missing = {
        family: f"the package {package} is not installed (pip install '.[eval]')"
        for family, package in _PACKAGES.items()
        if family in families | asked and importlib.util.find_spec(package) is None
    }
    models: dict[str, Path] = {}
    names = {"bertscore": bertscore_model or bertscore.DEFAULT_MODEL, "sts": sts_model or sts.DEFAULT_MODEL}
    layer = 0
    for family in (families | asked) & names.keys() - missing.keys():
        try:
            models[family] = _find_model(names[family])
            if family == "bertscore":
                layer = bertscore.scored_layer(names[family], models[family])
        except ModelError as error:
            missing[family] = f"{error}; give a local folder with --{family}_model"
    refused = [f"{family}: {reason}" for family, reason in missing.items() if family in asked]
    if refused:
        raise UsageError([f"{text}, or choose others with --metrics" for text in refused])
    for family, reason in missing.items():
        logger.warning("%s is not computed: %s", family, reason)
    computed = frozenset((families | asked) - missing.keys())
    return Suite(
        computed, models.get("bertscore"), layer, models.get("sts"), None if device == "auto" else device
    )


def _find_model(name: str) -> Path:
    """Return the folder of a scoring model, downloading one that is named as on the hub.

    Raises:
        ModelError: it is not to be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(file.suffix in (".safetensors", ".bin") for file in folder.rglob("*")):
            raise ModelError(f"{name}: no weights in it (*.safetensors or *.bin)")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as error:
        reason = textwrap.shorten(str(error).strip() or type(error).__name__, 200, placeholder=" ...")
        raise ModelError(
            f"{name}: neither a local folder nor available from the Hugging Face hub ({reason})"
        ) from error
