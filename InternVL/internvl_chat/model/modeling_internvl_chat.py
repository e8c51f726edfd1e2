"""InternVL-Chat: a vision tower and a projector turn image tiles into tokens for a language model.

Shapes: N tiles, S pixels per side, K tokens per tile, F vision features per token, B rows, T tokens per row,
C hidden size of the language model, U supervised tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import ModelOutput

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.loss import next_token_losses
from internvl_chat.model.modeling_intern_vit import InternVisionModel
from internvl_chat.model.projector import build_projector, pixel_shuffle


@dataclass
class InternVLOutput(ModelOutput):
    """Output of a forward pass.

    Attributes:
        loss: weighted sum of `token_losses`, or their mean if no weights are given.
        token_losses: (U,) cross-entropy of each supervised token.
        logits: (B, T, V), only if no labels are given.
    """

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class InternVLChatModel(nn.Module):
    """InternVL-Chat with the reference's parameter names (`vision_model`, `mlp1`, `language_model`).

    Args:
        image_context_id: id of `<IMG_CONTEXT>`, whose embeddings are replaced with image features.
        attn: attention implementation of the vision tower and the language model (see `resolve_attention`).
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
        # `apply_kernels` may replace this function.
        self.loss_function = next_token_losses
        # True if all ranks must run the same modules (ZeRO-3, FSDP).
        self.always_run_vision = False
        # Modules that an adapter must store in full because their weights differ from the base model.
        self.replaced_modules: set[str] = set()

    @property
    def pixel_dtype(self) -> torch.dtype:
        """Dtype of the vision tower's input."""
        return self.vision_model.embeddings.patch_embedding.weight.dtype

    @property
    def projector_weight(self) -> torch.Tensor:
        """First weight of `mlp1` (its LayerNorm)."""
        return self.mlp1.get_parameter("0.weight")

    @property
    def vision_is_frozen(self) -> bool:
        """Whether the vision tower has no trainable parameters."""
        return not any(p.requires_grad for p in self.vision_model.parameters())

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks of the vision tower and the language model."""
        return [*self.vision_model.encoder.layers, *self.language_model.get_decoder().layers]

    def train(self, mode: bool = True) -> "InternVLChatModel":
        """Set training or evaluation mode; a frozen vision tower stays in evaluation mode (no dropout)."""
        super().train(mode)
        if self.vision_is_frozen:
            self.vision_model.eval()
        return self

    def checkpoint_layers(self, count: int) -> None:
        """Enable activation checkpointing in `count` evenly spaced decoder layers.

        If `count` is above 0, it is also enabled in all blocks of the vision tower.
        """
        llm = self.language_model
        # transformers renamed the method after 5.17.
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        layers = llm.get_decoder().layers
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = (i + 1) * count // len(layers) > i * count // len(layers)
        self.vision_model.gradient_checkpointing = count > 0

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the transformer blocks with dynamic sequence lengths; parameter names do not change."""
        for layer in self.blocks:
            layer.compile(backend=backend, dynamic=True)

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision tower and pixel shuffle, (N, 3, S, S) -> (N, K, F).

        A frozen vision tower builds no autograd graph.
        """
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            x = self.vision_model(pixel_values, config.select_layer)[:, 1:]
        x = x.unflatten(1, (int(x.shape[1] ** 0.5), -1))
        return pixel_shuffle(x, config.downsample_ratio, config.ps_version).flatten(1, 2)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode normalized tiles, (N, 3, S, S) -> (N, K, C).

        Without tiles, `mlp1` runs on an empty batch, so that its gradients are zero instead of None. The
        optimizer then applies momentum and weight decay to it, as in the reference. The vision tower runs on
        a blank tile if it is trained or `always_run_vision` is set.
        """
        if len(pixel_values):
            return self.mlp1(self.vision_features(pixel_values))
        if self.always_run_vision or not self.vision_is_frozen:
            blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            return self.mlp1(self.vision_features(blank))[:0]
        return self.mlp1(self.empty_features())

    def empty_features(self) -> torch.Tensor:
        """Return empty vision features (no tiles), (0, K, F)."""
        config = self.config
        width = int(config.vision_config.hidden_size / config.downsample_ratio**2)
        return self.projector_weight.new_zeros(0, config.tokens_per_tile, width)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens and replace the embeddings of `<IMG_CONTEXT>` with image features.

        Args:
            input_ids: (B, T).
            pixel_values: normalized tiles of all rows in order, (N, 3, S, S); N may be 0.
            vision_features: precomputed vision features (N, K, F), used instead of `pixel_values`.
            image_positions: positions of `<IMG_CONTEXT>` in the flattened rows; computed if None.

        Returns:
            (B, T, C).

        Raises:
            ValueError: the numbers of `<IMG_CONTEXT>` tokens and image features differ, or neither
                `pixel_values` nor `vision_features` is given.
        """
        text = self.language_model.get_input_embeddings()(input_ids)
        if vision_features is not None:
            features = self.mlp1(vision_features)
        elif pixel_values is not None:
            features = self.image_features(pixel_values)
        else:
            raise ValueError("pass pixel_values or vision_features")
        if image_positions is None:
            image_positions = (input_ids.flatten() == self.image_context_id).nonzero().squeeze(1)
        tiles, features = len(features), features.flatten(0, 1)
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
        """Run one row of packed records, or a batch of rows of equal length.

        Records do not attend to each other. Varlen attention and flash-attn get their boundaries from
        `cu_seq_lens`. For other implementations, transformers derives a mask from `position_ids`, which
        restart at 0 in each record.

        If `image_positions` and `label_positions` are not given, they are computed, which synchronizes the
        GPU.

        Args:
            input_ids: (1, T) packed, or (B, T) without `cu_seq_lens`.
            pixel_values: normalized tiles of all records in order, (N, 3, S, S).
            labels: (1, T), `IGNORE_INDEX` where not supervised, as at the first token of each record.
            token_weights: (U,) loss weight of each supervised token.
            position_ids: (1, T) or (B, T).
            cu_seq_lens: (records + 1,) int32, record boundaries.
            max_length: length of the longest record in tokens.
            vision_features: precomputed vision features (N, K, F), used instead of `pixel_values`.
            image_positions: positions of `<IMG_CONTEXT>` in the row.
            label_positions: (U,) positions whose next token is supervised.

        Returns:
            Losses if labels are given, otherwise logits.
        """
        llm_inputs: dict[str, Any] = {
            "inputs_embeds": self.embed(input_ids, pixel_values, vision_features, image_positions),
            "position_ids": position_ids,
            "use_cache": False,
        }
        if cu_seq_lens is not None:
            llm_inputs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
            llm_inputs |= {"max_length_q": max_length, "max_length_k": max_length}
        if labels is None:
            return InternVLOutput(logits=self.language_model(**llm_inputs).logits)
        if len(input_ids) != 1:
            raise ValueError("labels require a single packed row")
        if label_positions is None:
            label_positions = (labels[0, 1:] != IGNORE_INDEX).nonzero().squeeze(1)
        targets = labels[0, label_positions + 1]
        losses = self.loss_function(self.language_model, llm_inputs, label_positions, targets)
        loss = losses.mean() if token_weights is None else (losses * token_weights).sum()
        return InternVLOutput(loss=loss, token_losses=losses)
