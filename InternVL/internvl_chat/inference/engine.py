"""Text and any number of images in, answers out: the one way that answers are made here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedTokenizerBase

from internvl_chat.constants import IM_END, IMAGE_PLACEHOLDER
from internvl_chat.data.encoding import RecordEncoder
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.records import RecordProblem, Turn
from internvl_chat.data.tiling import normalize_tiles
from internvl_chat.data.tokenizer import image_context_id, load_tokenizer
from internvl_chat.errors import DataError, UsageError
from internvl_chat.model.checkpoint import load_model
from internvl_chat.model.folders import model_folder, read_config
from internvl_chat.model.modeling import InternVLChatModel


@dataclass(frozen=True)
class Prompt:
    """A conversation to be continued by the assistant.

    Attributes:
        turns: with one placeholder in the user's turns for each image.
        images: in the order of the placeholders.
    """

    turns: Sequence[Turn]
    images: Sequence[Image.Image] = ()


def ask(question: str, images: Sequence[Image.Image] = ()) -> Prompt:
    """Return a prompt of one question.

    Images without placeholders in the question are put before it: one plainly, several with the labels
    `Fig-0`, `Fig-1`, ... of the training data.
    """
    if images and IMAGE_PLACEHOLDER not in question:
        labels = [""] if len(images) == 1 else [f"Fig-{i}: " for i in range(len(images))]
        question = "".join(f"{label}{IMAGE_PLACEHOLDER}\n" for label in labels) + question
    return Prompt((Turn("user", question),), tuple(images))


def _find_device(name: str | torch.device | None) -> torch.device:
    """Return the named device, by default the GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device {name}: unknown; use cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: there is no GPU here; use cpu")
    return device


class Engine:
    """A model, its tokenizer and its preprocessing, ready to answer.

    Args:
        model: on the device where it is to run.
        tokenizer: of the checkpoint.
        preprocessing: of the checkpoint.
    """

    def __init__(
        self, model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder = RecordEncoder(tokenizer, preprocessing)
        self.end_id = tokenizer.convert_tokens_to_ids(IM_END)

    @classmethod
    def from_checkpoint(
        cls,
        path_or_id: str | Path,
        *,
        device: str | torch.device | None = None,
        base: str | Path | None = None,
        max_dynamic_patch: int | None = None,
    ) -> "Engine":
        """Load a checkpoint of any kind: bfloat16 on a GPU, float32 on a CPU.

        Args:
            path_or_id: folder or hub id.
            device: by default the GPU if there is one.
            base: for adapters, where their base is now.
            max_dynamic_patch: another limit of tiles than the checkpoint's.
        """
        folder = model_folder(path_or_id)
        device = _find_device(device)
        tokenizer, _ = load_tokenizer(folder)
        model = load_model(
            folder,
            image_context_id=image_context_id(tokenizer),
            dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
            attn="sdpa",
            base=base,
        ).to(device)
        preprocessing = Preprocessing.from_folder(folder, read_config(folder))
        engine = cls(model, tokenizer, preprocessing)
        engine.encoder = engine.encoder.with_max_tiles(max_dynamic_patch)
        return engine

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def generate_ids(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 512) -> list[list[int]]:
        """Answer greedily, all prompts in one batch padded on the left.

        Returns:
            The new token ids of each answer, up to and without `<|im_end|>`.

        Raises:
            DataError: a prompt does not fit the token budget, or placeholders and images differ.
        """
        embeddings = [self._embed(prompt) for prompt in prompts]
        longest = max(len(e) for e in embeddings)
        batch = embeddings[0].new_zeros(len(embeddings), longest, embeddings[0].shape[-1])
        mask = torch.zeros(len(embeddings), longest, dtype=torch.long, device=self.device)
        for row, embedding in enumerate(embeddings):
            batch[row, longest - len(embedding) :] = embedding
            mask[row, longest - len(embedding) :] = 1
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.end_id,
            pad_token_id=self.end_id,
        )
        answers = self.model.language_model.generate(
            inputs_embeds=batch, attention_mask=mask, generation_config=settings
        ).tolist()
        return [ids[: ids.index(self.end_id)] if self.end_id in ids else ids for ids in answers]

    def answer(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 512) -> list[str]:
        """Answer greedily; see `generate_ids`."""
        ids = self.generate_ids(prompts, max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _embed(self, prompt: Prompt) -> torch.Tensor:
        """Return the embeddings of a prompt, (T, C)."""
        placeholders = sum(t.text.count(IMAGE_PLACEHOLDER) for t in prompt.turns if t.role == "user")
        if placeholders != len(prompt.images):
            raise DataError(
                f"{placeholders} {IMAGE_PLACEHOLDER} placeholders, but {len(prompt.images)} images"
            )
        try:
            encoded = self.encoder.encode_prompt(prompt.turns, [image.size for image in prompt.images])
        except RecordProblem as problem:
            raise DataError(str(problem)) from None
        tiles = self.encoder.tiles(prompt.images, encoded.grids).to(self.device)
        dtype = self.model.mlp1[1].weight.dtype
        pixels = normalize_tiles(tiles, self.encoder.preprocessing.normalize_type, dtype)
        return self.model.embed(encoded.input_ids.unsqueeze(0).to(self.device), pixels)[0]
