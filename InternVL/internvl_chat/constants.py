"""Special tokens, indices and option names shared across the package.

The tokens and indices are InternVL's: changing one would break compatibility with all published checkpoints.
The option names are defined here, so that the command line can list them without importing torch.
"""

IGNORE_INDEX = -100

# Upper limit of max_dynamic_patch, because the time to plan an image's tiles grows with its cube.
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

# Special tokens that are part of an answer's text; all others are control tokens.
ANSWER_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<tool_call>", "</tool_call>")

# Default system prompt of each conversation template, from the reference. All templates use ChatML markup and
# differ only in the system prompt.
SYSTEM_TEXTS = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
}

# Background colors for transparent pixels; `none` drops the alpha channel, like the reference.
BACKGROUNDS = ("none", "white", "black")

# Mean and standard deviation of pixel values, per channel.
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

ATTENTION_NAMES = ("auto", "flash_attention_2", "varlen", "sdpa", "eager")

# Environment variable with the key of an OpenAI-compatible server.
API_KEY_VARIABLE = "M3LLM_API_KEY"

# Order of the training records.
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")

LOSS_REDUCTIONS = ("sample", "token", "square")

# How the questions of a benchmark are asked, see eval/protocol.py.
STANDARD_PROTOCOL, PUBLISHED_PROTOCOL = PROTOCOLS = ("standard", "published")

# How bf16 weights are updated: float32 master copies, stochastic rounding, or plain bf16.
WEIGHT_PRECISIONS = ("master", "stochastic", "bf16")
