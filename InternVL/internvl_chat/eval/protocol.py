"""The published protocol of PMC-MI-Bench: prompts as in the published InternVL wrapper.

By default (`standard`), each image is at its own placeholder, as in training. The published results were
measured with a wrapper that calls InternVL's `chat` without `num_patches_list`, which has these effects:

- The tiles of all images replace the first `<image>`; the other placeholders remain text.
- The system prompt of the task is the beginning of the user message. The system message is the template's
  default.
- Each image is split into up to 12 tiles, however many images there are, and the tokens are not limited.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from internvl_chat.constants import (
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
)
from internvl_chat.data.encode.conversation import token_ids
from internvl_chat.data.encode.encoder import EncodedConversation
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.utils.files import sha256

_MAX_TILES_PER_IMAGE = 12
# File with the published system prompts, in the parent of the published folder of questions.
_TASK_CONFIG = "task_config.py"
# First 16 hexadecimal digits of the SHA-256 of the published system prompts.
_PROMPT_DIGESTS = {
    "puretext": "49abb0b6c3497f10",
    "multi-choice": "8220a13552710897",
    "single-subimageVQA": "c8fd0ca0065cc13d",
    "bboxVQA": "bf5703ddd473ed8e",
    "compoundVQA": "f2d0419bd77ad5b9",
    "multisubimageVQA": "aec5bc6e24f21975",
}


def find_published_prompts(data: Path) -> Path | None:
    """Return the file with the published system prompts, in the folder of the questions or its parent."""
    folders = (data, data.resolve().parent)
    return next((file for folder in folders if (file := folder / _TASK_CONFIG).is_file()), None)


def are_published(system: Mapping[str, str | None]) -> bool:
    """Return whether the system prompts of all tasks are the published ones."""
    digests = {task: sha256((text or "").encode())[:16] for task, text in system.items()}
    return digests.items() <= _PROMPT_DIGESTS.items()


def published_preprocessing(model_config: Any) -> Preprocessing:
    """Return the preprocessing of the published wrapper; tile size and template are those of the model."""
    return Preprocessing.from_model_config(model_config).with_options(
        min_dynamic_patch=1,
        max_dynamic_patch=_MAX_TILES_PER_IMAGE,
        dynamic_image_size=True,
        use_thumbnail=True,
        pad2square=False,
    )


class PublishedEngine(Engine):
    """Engine that encodes prompts like the published wrapper."""

    def encode(self, prompt: Prompt) -> EncodedConversation:
        """Return the token ids of a prompt and the tile grids of its images; all messages form one."""
        options = self.encoder.preprocessing
        limit = options.max_dynamic_patch
        grids = tuple(self.encoder.plan_grid(image.size, limit) for image in prompt.images)
        text = "\n".join(message.content for message in prompt.messages)
        if grids:
            context = IMG_CONTEXT * (options.tokens_per_tile * sum(grid.tiles for grid in grids))
            text = text.replace(IMAGE_PLACEHOLDER, f"{IMG_START}{context}{IMG_END}", 1)
        rendered = (
            f"{IM_START}system\n{options.system_text}{IM_END}\n"
            f"{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n"
        )
        [ids] = token_ids(self.tokenizer, [rendered])
        input_ids = torch.tensor(ids)
        positions = torch.nonzero(input_ids == self.encoder.template.context_id).flatten()
        return EncodedConversation(input_ids, torch.full_like(input_ids, IGNORE_INDEX), positions, grids)
