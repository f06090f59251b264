"""Gated DeltaNet as a body and as a causal language model of transformers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from gated_deltanet.layers import Attention, GatedDeltaNet
from gated_deltanet.layers.mixer import refuse_attentions
from gated_deltanet.models.gated_deltanet.cache import GatedDeltaNetCache
from gated_deltanet.models.gated_deltanet.configuration import GatedDeltaNetConfig
from gated_deltanet.models.gated_deltanet.decoding import decode
from gated_deltanet.models.gated_deltanet.inputs import (
    FLATTENING_KEYS,
    check_ids,
    packed_boundaries,
    refuse_unknown,
)
from gated_deltanet.modules import (
    FusedRMSNormGated,
    GatedMLP,
    RMSNorm,
    ShortConvolution,
    next_token_targets,
    token_cross_entropy,
    token_linear_cross_entropy,
)
from gated_deltanet.modules.loss import IGNORE_INDEX
from gated_deltanet.modules.projections import apply
from gated_deltanet.ops.utils import check_shape, find_padding, reject


class GatedDeltaNetBlock(GradientCheckpointingLayer):
    """x + attn(attn_norm(x)), then x + mlp(mlp_norm(x)); attn is Gated DeltaNet or attention.

    The last sum is left to the next norm, which takes and gives it in one pass.
    """

    def __init__(self, config: GatedDeltaNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, config.fuse_norm)
        if (attention := config.attention_of(layer_idx)) is not None:
            options = {key: value for key, value in attention.items() if key != "layers"}
            self.attn: nn.Module = Attention(config.hidden_size, layer_idx=layer_idx, **options)
        else:
            self.attn = GatedDeltaNet(
                hidden_size=config.hidden_size,
                expand_v=config.expand_v,
                head_dim=config.head_dim,
                num_heads=config.num_heads,
                num_v_heads=config.num_v_heads,
                mode=config.attn_mode,
                use_gate=config.use_gate,
                use_short_conv=config.use_short_conv,
                allow_neg_eigval=config.allow_neg_eigval,
                conv_size=config.conv_size,
                layer_idx=layer_idx,
                norm_eps=config.norm_eps,
            )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, config.fuse_norm)
        self.mlp = GatedMLP(config.hidden_size, config.mlp_size, config.fuse_swiglu)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: GatedDeltaNetCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Input and output are two summands [B, T, hidden_size]; B is 1 with cu_seqlens [N + 1]."""
        normed, residual = self.attn_norm(hidden_states, residual, prenorm=True)
        mixed, _, _ = self.attn(normed, cu_seqlens=cu_seqlens, past_key_values=past_key_values)
        normed, residual = self.mlp_norm(mixed, residual, prenorm=True)
        return self.mlp(normed), residual


class GatedDeltaNetPreTrainedModel(PreTrainedModel):
    """What transformers must know of both models."""

    config: GatedDeltaNetConfig
    config_class = GatedDeltaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["GatedDeltaNetBlock"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = ["A_log", "dt_bias"]
    _supports_sdpa = True
    _is_stateful = True  # a state cannot forget, as assisted generation needs

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, ShortConvolution)):
            initialization.normal_(module.weight, 0.0, deviation)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                initialization.zeros_(bias)
        elif isinstance(module, GatedDeltaNet):
            fresh = GatedDeltaNet(8, 1.0, 8, module.num_heads, module.num_v_heads)
            initialization.copy_(module.A_log, fresh.A_log)
            initialization.copy_(module.dt_bias, fresh.dt_bias)
        elif isinstance(module, (RMSNorm, FusedRMSNormGated)):
            initialization.ones_(module.weight)


class GatedDeltaNetModel(GatedDeltaNetPreTrainedModel):
    """The body: embeddings, blocks, final norm.

    State-dict keys: `embeddings`, `layers.N.{attn_norm,attn,mlp_norm,mlp}`, `norm`.
    """

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GatedDeltaNetBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.fuse_norm)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GatedDeltaNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: [B, T] int64; or else inputs_embeds.
            attention_mask: [B, T] (or [B, past + T]), 1 for tokens, 0 for padding, on the left:
                padded positions change neither states nor later outputs.
            position_ids: [B, T]; only read for packed sequences: where there is neither an
                attention_mask nor a cache, a position that does not follow its neighbour's starts
                another sequence.
            past_key_values: read and updated.
            inputs_embeds: [B, T, hidden_size].
            use_cache: return a cache. Default: the configuration's in evaluation, else False.
            output_hidden_states: also return the embeddings and each block's output, the last one
                normalised.
            output_attentions: must be false.
            cu_seqlens: [N + 1] int64 or int32: B is 1 and holds N sequences; excludes
                attention_mask and a cache. transformers' name cu_seq_lens_q means the same.
            **kwargs: nothing but what transformers passes to every model.

        Returns:
            last_hidden_state [B, T, hidden_size] and past_key_values.

        Raises:
            ValueError: naming the argument, what was expected and what came.
            TypeError: for an unknown keyword argument.
        """
        name = type(self).__name__
        refuse_unknown(name, kwargs, FLATTENING_KEYS)
        refuse_attentions(name, output_attentions)
        hidden_states = self._embed(input_ids, inputs_embeds)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        B, T = hidden_states.shape[:2]
        if past_key_values is None and attention_mask is None:
            cu_seqlens = packed_boundaries(name, cu_seqlens, kwargs, position_ids, B, T)
        cache = self._cache(past_key_values, use_cache, packed=cu_seqlens is not None)

        # A padded batch is computed in packed form from here to the last norm.
        padding = None
        if attention_mask is not None:
            if cu_seqlens is not None:
                reject(name, "attention_mask", "None with cu_seqlens", attention_mask)
            padding = find_padding(name, attention_mask, B, T)
        if padding is not None:
            hidden_states, cu_seqlens = padding.unpad(hidden_states), padding.cu_seqlens

        collected = [hidden_states] if output_hidden_states else []
        residual = None
        for block in self.layers:
            hidden_states, residual = block(
                hidden_states, residual, cu_seqlens=cu_seqlens, past_key_values=cache
            )
            if output_hidden_states:
                collected.append(hidden_states + residual)
        hidden_states = self.norm(hidden_states, residual)
        if output_hidden_states:
            collected[-1] = hidden_states
        if cache is not None:
            cache.seen_tokens += T

        def restore(x: Tensor) -> Tensor:
            return x if padding is None else padding.repad(x)

        return BaseModelOutputWithPast(
            last_hidden_state=restore(hidden_states),
            past_key_values=cache,
            hidden_states=tuple(map(restore, collected)) if output_hidden_states else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        name = type(self).__name__
        if input_ids is not None and inputs_embeds is None:
            check_ids(name, "input_ids", input_ids, self.config.vocab_size)
            return self.embeddings(input_ids)
        if inputs_embeds is None or input_ids is not None:
            reject(name, "input_ids", "given, or else inputs_embeds", "both or neither")
        sizes = (-1, -1, self.config.hidden_size)
        check_shape(name, "inputs_embeds", inputs_embeds, sizes, "[B, T, hidden_size]")
        return inputs_embeds

    def _cache(
        self, past_key_values: GatedDeltaNetCache | None, use_cache: bool | None, packed: bool
    ) -> GatedDeltaNetCache | None:
        name = type(self).__name__
        if past_key_values is None:
            if packed and use_cache:
                reject(name, "use_cache", "False with packed sequences", use_cache)
            if self.training and self.gradient_checkpointing:
                return None
            default = self.config.use_cache and not self.training and not packed
            wanted = default if use_cache is None else use_cache
            return GatedDeltaNetCache() if wanted else None
        if not isinstance(past_key_values, GatedDeltaNetCache):
            got = type(past_key_values).__name__
            reject(name, "past_key_values", "a GatedDeltaNetCache or None", got)
        if packed or (self.training and self.gradient_checkpointing):
            expected = "None with packed sequences, and in training with gradient checkpointing"
            reject(name, "past_key_values", expected, "a cache")
        cached, layers = len(past_key_values.layers), len(self.layers)
        if cached not in (0, layers):
            reject(name, "past_key_values", f"empty or of {layers} layers", f"{cached} layers")
        return past_key_values


class GatedDeltaNetForCausalLM(GatedDeltaNetPreTrainedModel, GenerationMixin):
    """The body and a projection to the vocabulary.

    State-dict keys: `model.*` and `lm_head.weight` (absent from checkpoints when tied).

    Examples:
        >>> import torch
        >>> from gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
        >>> config = GatedDeltaNetConfig(hidden_size=64, num_hidden_layers=2, num_heads=2,
        ...                              head_dim=16, vocab_size=100)
        >>> model = GatedDeltaNetForCausalLM(config)
        >>> tokens = torch.randint(100, (2, 50))
        >>> model(tokens, labels=tokens).loss.backward()
        >>> model.eval().generate(tokens[:, :5], max_new_tokens=4, do_sample=False,
        ...                       eos_token_id=None, pad_token_id=0).shape
        torch.Size([2, 9])
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.weight"}
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.model = GatedDeltaNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            got = generation_config.cache_implementation
            reject(type(self).__name__, "cache_implementation", "None: states have one size", got)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = GatedDeltaNetCache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _decode(
        self, ids: Tensor | None, attention_mask: Tensor | None, cache: GatedDeltaNetCache | None
    ) -> Tensor | None:
        """Logits [B, 1, vocab_size] of a single token of each row, in the few operators of
        decoding.py where that is possible, or None.
        """
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return None
        if cache is None or ids is None or ids.ndim != 2 or ids.shape[1] != 1:
            return None
        kind = ids.device.type
        if kind not in ("cpu", "cuda") or torch.is_autocast_enabled(kind):
            return None
        if self.config.output_hidden_states:
            return None
        name = type(self).__name__
        check_ids(name, "input_ids", ids, self.config.vocab_size)
        if attention_mask is not None and find_padding(name, attention_mask, ids.shape[0], 1):
            return None
        logits = decode(self, ids, cache)
        if logits is None:
            return None
        cache.seen_tokens += 1
        return logits.unsqueeze(1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GatedDeltaNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of next-token prediction.

        Arguments, besides those of `GatedDeltaNetModel.forward`:

        Args:
            labels: [B, T] int64, aligned with input_ids: position t's logits are compared with
                labels[t + 1], never across two packed sequences and never at padding. -100 is
                ignored.
            logits_to_keep: logits of only the last so many positions, or of these positions; 0: of
                all. The loss is over all positions in any case.
            num_items_in_batch: what the loss's sum is divided by. Default: the counted labels.

        Returns:
            loss (a scalar fp32, with labels), logits [B, T or logits_to_keep, vocab_size] (None
            with labels and fuse_linear_cross_entropy), past_key_values and hidden_states.

        Raises:
            ValueError: naming the argument, what was expected and what came.
            TypeError: for an unknown keyword argument.
        """
        name = type(self).__name__
        refuse_unknown(name, kwargs, FLATTENING_KEYS)
        if past_key_values is None and attention_mask is None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is not None:
                sizes = given.shape[:2]
                cu_seqlens = packed_boundaries(name, cu_seqlens, kwargs, position_ids, *sizes)
        plain = not (output_hidden_states or output_attentions)
        plain = plain and labels is None and inputs_embeds is None and cu_seqlens is None
        if (
            plain
            and (logits := self._decode(input_ids, attention_mask, past_key_values)) is not None
        ):
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        hidden_states = body.last_hidden_state
        loss = logits = None
        if labels is None:
            logits = apply(self.lm_head, slice_logits_to_keep(hidden_states, logits_to_keep))
        else:
            check_shape(name, "labels", labels, tuple(hidden_states.shape[:2]), "[B, T]")
            check_ids(name, "labels", labels, self.config.vocab_size, also=IGNORE_INDEX)
            targets = next_token_targets(labels, cu_seqlens)
            if attention_mask is not None:
                tokens = attention_mask[:, -labels.shape[1] :] != 0
                targets = targets.masked_fill(~tokens, IGNORE_INDEX)
            targets, count = targets.flatten(), num_items_in_batch
            if self.config.fuse_linear_cross_entropy:
                rows = hidden_states.flatten(0, 1)
                loss = token_linear_cross_entropy(rows, self.lm_head.weight, targets, count)
            else:
                logits = apply(self.lm_head, hidden_states)
                rows, fused = logits.flatten(0, 1), self.config.fuse_cross_entropy
                loss = token_cross_entropy(rows, targets, fused, count)
                logits = slice_logits_to_keep(logits, logits_to_keep)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
        )
