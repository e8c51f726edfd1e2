"""Special tokens and indices that the model, the data and the evaluation must agree on.

They are InternVL's: changing one makes every published checkpoint unreadable.
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
