"""InternVL-Chat: tiles become tokens, tokens meet text, the language model reads both.

Shapes: N tiles, S pixels a side, T tokens a row, B rows, U supervised tokens, V vocabulary, C width of the
language model, K tokens a tile.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import ModelOutput

from internvl_chat.constants import IGNORE_INDEX
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.loss import token_losses
from internvl_chat.model.projector import build_projector, pixel_shuffle
from internvl_chat.model.vision import InternVisionModel


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
        # True where processes must all run the same modules (ZeRO-3, FSDP).
        self.always_run_vision = False
        # Modules whose weights are no longer those of an adapter's base.
        self.replaced_modules: set[str] = set()

    @property
    def vision_is_frozen(self) -> bool:
        """True where no parameter of the vision tower is trained."""
        return not any(p.requires_grad for p in self.vision_model.parameters())

    def train(self, mode: bool = True) -> "InternVLChatModel":
        """Set the training mode; a frozen vision tower stays in evaluation mode (no dropout)."""
        super().train(mode)
        if self.vision_is_frozen:
            self.vision_model.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks of both towers in the backward pass instead of keeping activations."""
        llm = self.language_model
        # The method's name until transformers 5.17 and after it.
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self.vision_model.gradient_checkpointing = True

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode normalised tiles, (N, 3, S, S) -> (N, K, C).

        A frozen tower runs without a graph. With no tiles it is not run at all, yet `mlp1` is, so that its
        parameters get zero gradients rather than none, as when the reference encodes a blank tile: Adam
        then still applies momentum and decay to them.
        """
        config, frozen = self.config, self.vision_is_frozen
        tiles = pixel_values
        if len(tiles) == 0 and (self.always_run_vision or not frozen):
            tiles = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        if len(tiles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                x = self.vision_model(tiles, config.select_layer)[:, 1:]
            x = x.unflatten(1, (int(x.shape[1] ** 0.5), -1))
            x = pixel_shuffle(x, config.downsample_ratio, config.ps_version).flatten(1, 2)
        else:
            x = self.mlp1[0].weight.new_zeros(0, config.tokens_per_tile, self.mlp1[0].weight.shape[0])
        return self.mlp1(x)[: len(pixel_values)]

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed text and put the tiles' features in the place of their `<IMG_CONTEXT>` tokens.

        Args:
            input_ids: (B, T).
            pixel_values: all tiles of all rows in order, (N, 3, S, S); N may be 0.

        Returns:
            (B, T, C).

        Raises:
            ValueError: tiles and placeholders do not match.
        """
        text = self.language_model.get_input_embeddings()(input_ids)
        features = self.image_features(pixel_values).flatten(0, 1)
        places = input_ids == self.image_context_id
        expected, found = int(places.sum()), len(features)
        if expected != found:
            raise ValueError(
                f"{expected} <IMG_CONTEXT> tokens in the text, but {found} features "
                f"from {len(pixel_values)} tiles"
            )
        return text.masked_scatter(places.unsqueeze(-1), features.to(text.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        max_length: int | None = None,
    ) -> InternVLOutput:
        """Run one row of records packed behind one another, or a batch of single rows of equal length.

        Attention never crosses from one record to the next: the kernels get the records' bounds, and
        transformers' masks are built from the positions, which restart at 0 in each record.

        Args:
            input_ids: (1, T) packed, or (B, T) without `cu_seq_lens`.
            pixel_values: normalised tiles of all records in order, (N, 3, S, S).
            labels: as `input_ids`, `IGNORE_INDEX` where nothing is learnt; the first token of each record
                is never a target. The head runs at the supervised positions only.
            token_weights: (U,), weight of each supervised token in the loss.
            position_ids: as `input_ids`.
            cu_seq_lens: (records + 1,) int32, bounds of the records.
            max_length: tokens of the longest record.

        Returns:
            Losses with labels; the logits of every position without.
        """
        llm_inputs = {
            "inputs_embeds": self.embed(input_ids, pixel_values),
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
        targets = labels[0, 1:]
        supervised = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        logits = self.language_model(**llm_inputs, logits_to_keep=supervised).logits[0]
        losses = token_losses(logits, targets[supervised])
        loss = losses.mean() if token_weights is None else (losses * token_weights).sum()
        return InternVLOutput(loss=loss, token_losses=losses)
