"""InternVL-Chat: tiles become tokens, tokens meet text, the language model reads both.

Shapes: N tiles, S pixels a side, T tokens a row, B rows, U supervised tokens, V vocabulary, C width of the
language model, K tokens a tile, F width of the vision features (folded).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.modeling_intern_vit import InternVisionModel
from internvl_chat.model.projector import build_projector, pixel_shuffle


@dataclass
class InternVLOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: the weighted sum of `token_losses`, or their mean without weights.
        token_losses: (U,) cross-entropy of every supervised token, rows one after the other.
        logits: (B, T, V), only when no labels were given.
    """

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class InternVLChatModel(nn.Module):
    """The reference's model, with its parameter names: `vision_model`, `mlp1`, `language_model`.

    Args:
        config: shape and options.
        image_context_id: id of `<IMG_CONTEXT>`, the token that features replace.
        attn: an attention name of `resolve_attention`, for both towers.
    """

    def __init__(self, config: InternVLChatConfig, image_context_id: int, attn: str = "sdpa") -> None:
        super().__init__()
        self.config, self.image_context_id, self.attn = config, image_context_id, attn
        self.vision_model = InternVisionModel(config.vision_config, attn)
        self.language_model = AutoModelForCausalLM.from_config(
            config.build_llm_config(), attn_implementation=attn
        )
        self.mlp1 = build_projector(
            config.vision_config.hidden_size, config.hidden_size, config.downsample_ratio
        )
        # `apply_kernels` replaces it.
        self.loss_function = next_token_losses
        # True where processes must all run the same modules (ZeRO-3, FSDP).
        self.always_run_vision = False
        # Modules whose weights are no longer those of an adapter's base.
        self.replaced_modules: set[str] = set()

    @property
    def pixel_dtype(self) -> torch.dtype:
        """What the vision tower takes tiles in."""
        return self.vision_model.embeddings.patch_embedding.weight.dtype

    @property
    def vision_is_frozen(self) -> bool:
        """True where no parameter of the vision tower is trained."""
        return not any(p.requires_grad for p in self.vision_model.parameters())

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of both towers."""
        return [*self.vision_model.encoder.layers, *self.language_model.get_decoder().layers]

    def train(self, mode: bool = True) -> "InternVLChatModel":
        """Set the training mode; a frozen vision tower stays in evaluation mode (no dropout)."""
        super().train(mode)
        if self.vision_is_frozen:
            self.vision_model.eval()
        return self

    def recompute_layers(self, count: int) -> None:
        """Let `count` decoder layers, spread evenly, keep only inputs and run again in the backward pass.

        The vision tower's blocks do so too where it is trained and `count` is not 0.
        """
        llm = self.language_model
        # The method's name until transformers 5.17 and after it.
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        layers = llm.get_decoder().layers
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = (i + 1) * count // len(layers) > i * count // len(layers)
        self.vision_model.gradient_checkpointing = count > 0

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks of both towers, each kind once for rows of any length; names stay the same."""
        for layer in self.blocks:
            layer.compile(backend=backend, dynamic=True)

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision tower and fold its patches, (N, 3, S, S) -> (N, K, F); without a graph if frozen."""
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            x = self.vision_model(pixel_values, config.select_layer)[:, 1:]
        x = x.unflatten(1, (int(x.shape[1] ** 0.5), -1))
        return pixel_shuffle(x, config.downsample_ratio, config.ps_version).flatten(1, 2)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode normalised tiles, (N, 3, S, S) -> (N, K, C).

        With no tiles a frozen tower is not run at all, yet `mlp1` is, so that its parameters get zero
        gradients rather than none, as when the reference encodes a blank tile: Adam then still applies
        momentum and decay to them.
        """
        if len(pixel_values):
            return self.mlp1(self.vision_features(pixel_values))
        if self.always_run_vision or not self.vision_is_frozen:
            blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            return self.mlp1(self.vision_features(blank))[:0]
        return self.mlp1(self.no_features())

    def no_features(self) -> torch.Tensor:
        """Return the vision features of no tile, (0, K, F)."""
        config = self.config
        width = int(config.vision_config.hidden_size / config.downsample_ratio**2)
        dtype, device = self.mlp1[0].weight.dtype, self.mlp1[0].weight.device
        return torch.zeros(0, config.tokens_per_tile, width, dtype=dtype, device=device)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed text and put the tiles' features in the place of their `<IMG_CONTEXT>` tokens.

        Args:
            input_ids: (B, T).
            pixel_values: all tiles of all rows in order, (N, 3, S, S); N may be 0.
            vision_features: what `vision_features` made of the tiles, instead of them, (N, K, F).
            image_positions: of the `<IMG_CONTEXT>` tokens in the rows behind one another; found if not given.

        Returns:
            (B, T, C).

        Raises:
            ValueError: tiles and placeholders do not match.
        """
        text = self.language_model.get_input_embeddings()(input_ids)
        features = (
            self.image_features(pixel_values) if vision_features is None else self.mlp1(vision_features)
        )
        tiles, features = len(features), features.flatten(0, 1)
        if image_positions is None:
            image_positions = (input_ids.flatten() == self.image_context_id).nonzero().squeeze(1)
        if len(image_positions) != len(features):
            raise ValueError(
                f"{len(image_positions)} <IMG_CONTEXT> tokens in the text, but {len(features)} features "
                f"from {tiles} tiles"
            )
        rows = text.flatten(0, 1).index_copy(0, image_positions, features.to(text.dtype))
        return rows.unflatten(0, input_ids.shape)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        max_length: int | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
    ) -> InternVLOutput:
        """Run one row of records packed behind one another, or a batch of single rows of equal length.

        Attention never crosses from one record to the next: the kernels get the records' bounds, and
        transformers' masks are built from the positions, which restart at 0 in each record. The places may be
        left out; a GPU then has to wait for them to be counted.

        Args:
            input_ids: (1, T) packed, or (B, T) without `cu_seq_lens`.
            pixel_values: normalised tiles of all records in order, (N, 3, S, S).
            labels: as `input_ids`, `IGNORE_INDEX` where nothing is learnt; the first token of each record
                is never a target. The head runs at the supervised positions only.
            token_weights: (U,), weight of each supervised token in the loss.
            position_ids: as `input_ids`.
            cu_seq_lens: (records + 1,) int32, bounds of the records.
            max_length: tokens of the longest record.
            vision_features: of `vision_features`, instead of `pixel_values`, (N, K, F).
            image_positions: of the `<IMG_CONTEXT>` tokens in the row.
            label_positions: (U,) places whose next token is supervised.

        Returns:
            Losses with labels; the logits of every position without.
        """
        llm_inputs = {
            "inputs_embeds": self.embed(input_ids, pixel_values, vision_features, image_positions),
            "position_ids": position_ids,
            "use_cache": False,
        }
        if cu_seq_lens is not None:
            llm_inputs.update(
                cu_seq_lens_q=cu_seq_lens,
                cu_seq_lens_k=cu_seq_lens,
                max_length_q=max_length,
                max_length_k=max_length,
            )
        if labels is None:
            return InternVLOutput(logits=self.language_model(**llm_inputs).logits)
        if len(input_ids) != 1:
            raise ValueError("losses are computed for one packed row; got a batch of rows with labels")
        if label_positions is None:
            label_positions = (labels[0, 1:] != IGNORE_INDEX).nonzero().squeeze(1)
        targets = labels[0, label_positions + 1]
        losses = self.loss_function(self.language_model, llm_inputs, label_positions, targets)
        loss = losses.mean() if token_weights is None else (losses * token_weights).sum()
        return InternVLOutput(loss=loss, token_losses=losses)


def next_token_losses(
    llm: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of targets (U,) that follow positions (U,) of one row; (U,) float32.

    Args:
        llm: the language model.
        inputs: its arguments for a row (1, T).
        positions: at which logits are computed.
        targets: the token ids that they should predict.
    """
    logits = llm(**inputs, logits_to_keep=positions).logits[0]
    return F.cross_entropy(logits.float(), targets, reduction="none")
