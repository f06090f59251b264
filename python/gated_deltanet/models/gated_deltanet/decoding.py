"""One token further for every row of a batch, as one CUDA graph.

The step takes five operators a layer (`torch.ops.gdn.small_batch_linear` and
`gated_delta_rule_step`), which read weights that lie one after another, and updates the cache's own
tensors in place. It is captured when a cache is used for the third token in a row, and replayed
from then on.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import gated_deltanet._library  # noqa: F401 (registers the operators)
from gated_deltanet.layers import GatedDeltaNet
from gated_deltanet.models.gated_deltanet.cache import GatedDeltaNetCache
from gated_deltanet.modules import FusedRMSNormGated, GatedMLP, RMSNorm, ShortConvolution

if TYPE_CHECKING:
    from gated_deltanet.models.gated_deltanet.modeling import GatedDeltaNetForCausalLM

gdn = torch.ops.gdn

_PLAIN = (nn.Linear, nn.Embedding, GatedDeltaNet, GatedMLP, RMSNorm, FusedRMSNormGated,
          ShortConvolution)  # fmt: skip


def why_not(model: "GatedDeltaNetForCausalLM") -> str:
    """Why a model cannot be decoded by a DecodeStep; empty if it can."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return "its parameters are on several devices"
    for block in model.model.layers:
        if not isinstance(block.attn, GatedDeltaNet):
            return "a layer is attention, whose cache grows"
        if not block.attn.use_short_conv or block.attn.q_conv1d.bias is not None:
            return "a layer has no short convolution, or one with a bias"
    for module in model.modules():
        # Adapters, quantised layers, hooks and patched forwards compute something else.
        if next(module.children(), None) is None and type(module) not in _PLAIN:
            return f"a module is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"a {type(module).__name__} has hooks"
        if "base_layer" in module._modules:
            return f"a {type(module).__name__} is an adapter"
    return ""


def _join(owner: list[nn.Module], name: str = "weight") -> Tensor:
    """Parameters [n_i, ...] one after another, of which they become views."""
    parameters: list[Tensor] = [getattr(module, name) for module in owner]
    first, following, joined = parameters[0], parameters[0].storage_offset(), True
    for parameter in parameters:
        storage = parameter.untyped_storage().data_ptr()
        joined &= parameter.is_contiguous() and parameter.storage_offset() == following
        joined &= storage == first.untyped_storage().data_ptr()
        following += parameter.numel()
    rows = [parameter.shape[0] for parameter in parameters]
    if joined:
        return first.detach().as_strided((sum(rows), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(rows), strict=True):
        parameter.data = part
    return whole


class _Layer:
    """What the step reads of a block, and its part of the cache."""

    def __init__(self, block: Any, cached: Any) -> None:
        attn, mlp = block.attn, block.mlp
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        if attn.use_gate:
            projections.append(attn.g_proj)
        convolutions = [attn.q_conv1d, attn.k_conv1d, attn.v_conv1d]
        self.block = block
        self.in_proj = _join([*projections, attn.a_proj, attn.b_proj])
        self.conv_weight = _join(convolutions).squeeze(1)
        self.gate_up_proj = _join([mlp.gate_proj, mlp.up_proj])
        self.conv_state = torch.cat([cached.conv_q, cached.conv_k, cached.conv_v], 1)
        channels = [convolution.weight.shape[0] for convolution in convolutions]
        cached.conv_q, cached.conv_k, cached.conv_v = self.conv_state.split(channels, 1)
        cached.recurrent_state = cached.recurrent_state.contiguous()
        self.state = cached.recurrent_state

    def forward(self, x: Tensor) -> Tensor:
        """x [B, hidden_size] -> [B, hidden_size]."""
        attn, norm, mlp = self.block.attn, self.block.attn_norm, self.block.mlp
        H, HV, K, V = attn.num_heads, attn.num_v_heads, attn.head_k_dim, attn.head_v_dim
        projected = gdn.small_batch_linear(
            x, self.in_proj, norm.weight, norm.eps, conv_weight=self.conv_weight,
            conv_state=self.conv_state, overlap=True,
        )  # fmt: skip
        sizes = [H * K, H * K, HV * V, *([HV * V] if attn.use_gate else []), HV, HV]
        q, k, v, *gate, a, b = projected.split(sizes, 1)
        o = gdn.gated_delta_rule_step(
            q.unflatten(1, (1, H, K)), k.unflatten(1, (1, H, K)), v.unflatten(1, (1, HV, V)),
            a.unsqueeze(1), b.unsqueeze(1), self.state, attn.A_log, attn.dt_bias,
            attn.allow_neg_eigval, overlap=True,
        )  # fmt: skip
        x = gdn.small_batch_linear(
            o.flatten(1), attn.o_proj.weight, attn.o_norm.weight, attn.o_norm.eps,
            gate=gate[0] if gate else None, residual=x, overlap=True,
        )  # fmt: skip
        norm = self.block.mlp_norm
        hidden = gdn.small_batch_linear(
            x, self.gate_up_proj, norm.weight, norm.eps, swiglu=True,
            overlap=True,
        )  # fmt: skip
        return gdn.small_batch_linear(hidden, mlp.down_proj.weight, residual=x, overlap=True)


class DecodeStep:
    """A model's step for the rows of one cache, whose tensors it updates in place.

    Raises:
        ValueError: for a model of which why_not() says so.
    """

    def __init__(self, model: "GatedDeltaNetForCausalLM", cache: GatedDeltaNetCache) -> None:
        if reason := why_not(model):
            raise ValueError(f"DecodeStep: {reason}")
        self.embeddings, self.norm = model.model.embeddings, model.model.norm
        self.head = model.lm_head
        self.layers = [
            _Layer(block, cached)
            for block, cached in zip(model.model.layers, cache.layers, strict=True)
        ]
        self.used = tensors_of(cache)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tokens = self.logits = torch.empty(0)

    def serves(self, model: "GatedDeltaNetForCausalLM", cache: GatedDeltaNetCache) -> bool:
        """Whether it is this model's, and the cache still has the tensors that it updates."""
        return self.head is model.lm_head and same_tensors(self.used, tensors_of(cache))

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64 -> logits [B, vocab_size]."""
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer.forward(x)
        norm = self.norm
        return gdn.small_batch_linear(x, self.head.weight, norm.weight, norm.eps, overlap=True)

    @torch.no_grad()
    def replay(self, tokens: Tensor) -> Tensor:
        """The same; the first call captures the step. The result is a copy."""
        if self.graph is not None:
            self.tokens.copy_(tokens)
            self.graph.replay()
            return self.logits.clone()
        self.tokens = tokens.clone()
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            logits = self.forward(self.tokens).clone()  # this token's step
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            self.logits = self.forward(self.tokens)  # recorded, not computed
            graph.capture_end()
        stream.wait_stream(side)
        logits.record_stream(stream)
        self.graph = graph
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied cache has other tensors."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def tensors_of(cache: GatedDeltaNetCache) -> list[Any]:
    """The tensors of every layer's part of a cache, or None where there is none."""
    return [
        tensor
        for layer in cache.layers
        for tensor in (layer.recurrent_state, layer.conv_q, layer.conv_k, layer.conv_v)
    ]


def same_tensors(a: list[Any], b: list[Any]) -> bool:
    """Whether both name the same objects."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def decode(model: "GatedDeltaNetForCausalLM", ids: Tensor, cache: Any) -> Tensor | None:
    """Logits [B, vocab_size] after ids [B, 1] from a captured step, or None where there is none.

    Beam search and the like give a cache other tensors at every step, and a capture would be for
    nothing: so it waits until a cache has kept its tensors from one token to the next.
    """
    if not isinstance(cache, GatedDeltaNetCache) or not cache.layers:
        return None
    step = cache.step
    if isinstance(step, DecodeStep) and step.serves(model, cache):
        return step.replay(ids[:, 0])
    tensors = tensors_of(cache)
    if any(tensor is None for tensor in tensors):
        return None
    settled = isinstance(step, list) and same_tensors(step, tensors)
    cache.step = DecodeStep(model, cache) if settled and not why_not(model) else tensors
    return cache.step.replay(ids[:, 0]) if isinstance(cache.step, DecodeStep) else None
