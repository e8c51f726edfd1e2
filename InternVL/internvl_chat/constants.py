"""Special tokens, indices and names of options that several parts of the package must agree on.

The tokens and indices are InternVL's: changing one makes every published checkpoint unreadable. The names are
here so that the command line can list them without importing torch.
"""

IGNORE_INDEX = -100

# Upper bound of max_dynamic_patch: planning an image takes time cubic in it.
MAX_TILES = 100

IMAGE_PLACEHOLDER = "<image>"

IMG_START = "<img>"
IMG_END = "</img>"
IMG_CONTEXT = "<IMG_CONTEXT>"

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

SPECIAL_TOKENS = (
    IMG_START,
    IMG_END,
    IMG_CONTEXT,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)

# The reference's default system message of each conversation template. All templates use ChatML markup, so a
# new entry changes the system message only.
SYSTEM_TEXTS = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
}

# Colors behind transparent pixels; none drops the transparency, as the reference does.
BACKGROUNDS = ("none", "white", "black")

# Mean and standard deviation of pixel values, per channel.
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

ATTENTION_NAMES = ("auto", "flash_attention_2", "varlen", "sdpa", "eager")

# Order of the training records.
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")

LOSS_REDUCTIONS = ("sample", "token", "square")

# Update of bf16 weights: float32 master copies, stochastic rounding, or plain bf16.
WEIGHT_PRECISIONS = ("master", "stochastic", "bf16")
