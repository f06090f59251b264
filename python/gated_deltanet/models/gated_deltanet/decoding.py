"""One token further for every row of a batch, in as few operators as can be.

The step takes five operators a layer (`torch.ops.gdn.small_batch_linear` and
`gated_delta_rule_step`), which read weights that lie one after another, and updates the cache's own
tensors in place. On a CPU it runs from a cache's second token on. On a GPU it is captured as a CUDA
graph when a cache is used for the third token in a row, and replayed from then on.
"""

from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import gated_deltanet._library  # noqa: F401 (registers the operators)
from gated_deltanet.layers import GatedDeltaNet
from gated_deltanet.models.gated_deltanet.cache import GatedDeltaNetCache
from gated_deltanet.modules import FusedRMSNormGated, GatedMLP, RMSNorm, ShortConvolution

if TYPE_CHECKING:
    from gated_deltanet.models.gated_deltanet.modeling import GatedDeltaNetForCausalLM

gdn = torch.ops.gdn

_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, GatedDeltaNet, GatedMLP, RMSNorm,
          FusedRMSNormGated, ShortConvolution)  # fmt: skip
_WIDE = (".A_log", ".dt_bias")
_CPU_ROWS = 16  # the operators compose what has more rows, no faster than the forward
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


def why_not(model: "GatedDeltaNetForCausalLM") -> str:
    """Why a model cannot be decoded by a DecodeStep; empty if it can.

    The step reads weights and calls no module, so whatever else a module may compute, as adapters,
    quantised layers, parametrizations, hooks and patched forwards do, is a reason.
    """
    from gated_deltanet.models.gated_deltanet import modeling  # which imports this module

    plain = (*_PLAIN, modeling.GatedDeltaNetBlock, modeling.GatedDeltaNetModel)
    for block in model.model.layers:
        if type(block) is modeling.GatedDeltaNetBlock and not isinstance(block.attn, GatedDeltaNet):
            return "a layer is attention, whose cache grows"
    for module in model.modules():
        kind = type(module).__name__
        if module is not model and type(module) not in plain:
            return f"a module is a {kind}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"a {kind} has hooks"
        if isinstance(module, GatedDeltaNet) and not module.use_short_conv:
            return "a layer has no short convolution"
        if getattr(module, "bias", None) is not None:
            return f"a {kind} has a bias"
    if any(_GLOBAL_HOOKS):
        return "every module has hooks"
    named = dict(model.named_parameters())
    weights = [*named.values()]
    if any(type(weight) is not nn.Parameter or weight.is_inference() for weight in weights):
        return "a parameter is of another kind, or made in inference mode"
    if not all(weight.is_contiguous() for weight in weights):
        return "a parameter is not contiguous"
    if min(weight.numel() for weight in weights) < 2:
        return "a parameter has one element, which _Watch could take for another of its value"
    if len({weight.device for weight in weights}) != 1:
        return "its parameters are on several devices"
    if not weights[0].is_cuda and any(weight.is_shared() for weight in weights):
        return "other processes see its parameters"
    gates = {name: each.dtype for name, each in named.items() if name.endswith(_WIDE)}
    dtypes = {each.dtype for name, each in named.items() if name not in gates}
    if len(dtypes) != 1 or {*gates.values()} != {torch.float32}:
        return "its parameters are not of one dtype, with gates in fp32"
    return ""


class _Watch:
    """Whether nobody has replaced a part of a model since why_not() was asked.

    It is asked for every token: so one call compares all of a kind where that can be.
    """

    def __init__(self, model: "GatedDeltaNetForCausalLM") -> None:
        modules = [*model.modules()]
        self.attributes = [module.__dict__ for module in modules]
        self.hooks = [*_GLOBAL_HOOKS]
        for module in modules:
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        self.children = [module._modules for module in modules if module._modules]
        self.seen_children = [dict(children) for children in self.children]
        self.owners = [module._parameters for module in modules if module._parameters]
        self.seen_owners = [dict(parameters) for parameters in self.owners]
        self.weights = [*model.parameters()]
        self.places = self._places()

    def _places(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.weights)]

    def _same_weights(self) -> bool:
        # Dictionaries compare by identity first: the tensors' own ==, which has no truth value
        # beyond one element, is only asked where they are others.
        try:
            return self.owners == self.seen_owners
        except RuntimeError:
            return False

    def holds(self) -> bool:
        """Whether the same modules have the same weights at the same place, and no hooks."""
        return (
            not any(self.hooks)
            and not any(map(dict.__contains__, self.attributes, repeat("forward")))
            and self.children == self.seen_children
            and self._same_weights()
            and self._places() == self.places
        )


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

    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        H, HV, K, V = attn.num_heads, attn.num_v_heads, attn.head_k_dim, attn.head_v_dim
        self.q_shape, self.v_shape = (-1, 1, H, K), (-1, 1, HV, V)
        self.sizes = [H * K, H * K, HV * V, *([HV * V] if attn.use_gate else []), HV, HV]
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        if attn.use_gate:
            projections.append(attn.g_proj)
        self.attn_norm, self.mlp_norm, self.o_norm = block.attn_norm, block.mlp_norm, attn.o_norm
        self.in_proj = _join([*projections, attn.a_proj, attn.b_proj])
        self.conv_weight = _join([attn.q_conv1d, attn.k_conv1d, attn.v_conv1d]).squeeze(1)
        self.A_log, self.dt_bias = attn.A_log, attn.dt_bias
        self.allow_neg_eigval = attn.allow_neg_eigval
        self.o_proj = attn.o_proj.weight
        self.gate_up_proj = _join([mlp.gate_proj, mlp.up_proj])
        self.down_proj = mlp.down_proj.weight
        self.conv_state = self.state = torch.empty(0)

    def take(self, cached: Any) -> None:
        """The cached tensors become views of the step's."""
        parts = [cached.conv_q, cached.conv_k, cached.conv_v]
        self.conv_state = torch.cat(parts, 1)
        channels = [part.shape[1] for part in parts]
        cached.conv_q, cached.conv_k, cached.conv_v = self.conv_state.split(channels, 1)
        self.state = cached.recurrent_state = cached.recurrent_state.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, hidden_size] -> [B, hidden_size]."""
        projected = gdn.small_batch_linear(
            x, self.in_proj, self.attn_norm.weight, self.attn_norm.eps,
            conv_weight=self.conv_weight, conv_state=self.conv_state, overlap=True,
        )  # fmt: skip
        q, k, v, *gate, a, b = torch.split_with_sizes(projected, self.sizes, 1)
        o = gdn.gated_delta_rule_step(
            q.view(self.q_shape), k.view(self.q_shape), v.view(self.v_shape),
            a.unsqueeze(1), b.unsqueeze(1), self.state, self.A_log, self.dt_bias,
            self.allow_neg_eigval, overlap=True,
        )  # fmt: skip
        x = gdn.small_batch_linear(
            o.flatten(1), self.o_proj, self.o_norm.weight, self.o_norm.eps,
            gate=gate[0] if gate else None, residual=x, overlap=True,
        )  # fmt: skip
        hidden = gdn.small_batch_linear(
            x, self.gate_up_proj, self.mlp_norm.weight, self.mlp_norm.eps, swiglu=True,
            overlap=True,
        )  # fmt: skip
        return gdn.small_batch_linear(hidden, self.down_proj, residual=x, overlap=True)


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
        # Weights that inference mode had made could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [_Layer(block) for block in model.model.layers]
        self.watch = _Watch(model)
        self.unchanged = True
        self.take(cache)

    def take(self, cache: GatedDeltaNetCache) -> None:
        """From now on the step is for this cache's tensors."""
        for layer, cached in zip(self.layers, cache.layers, strict=True):
            layer.take(cached)
        self.used = tensors_of(cache)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tokens = self.logits = torch.empty(0)

    def serves(self, model: "GatedDeltaNetForCausalLM") -> bool:
        """Whether it is this model's, of which nothing has been replaced.

        On a GPU only hooks are looked for now: the rest was compared while the GPU made the last
        token, and shows one token late.
        """
        if self.graph is None:
            self.unchanged = self.watch.holds()
        return self.unchanged and self.head is model.lm_head and not any(self.watch.hooks)

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
            logits = self.logits.clone()
            self.unchanged = self.watch.holds()  # while the GPU works, for the next token
            return logits
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


def same_tensors(a: list[Any] | None, b: list[Any]) -> bool:
    """Whether both name the same objects."""
    return a is not None and len(a) == len(b) and all(map(is_, a, b))


def decode(model: "GatedDeltaNetForCausalLM", ids: Tensor, cache: Any) -> Tensor | None:
    """Logits [B, vocab_size] after ids [B, 1] from a step, or None where there is none.

    Beam search and the like give a cache other tensors at every token. On a CPU a step takes them;
    on a GPU a capture would be for nothing, so it waits until a cache has kept its tensors from one
    token to the next. A cache that met a model without a step gets none any more.
    """
    if not isinstance(cache, GatedDeltaNetCache) or type(ids) is not Tensor:
        return None
    step, tensors = cache.step, tensors_of(cache)
    if isinstance(step, str) or not tensors or any(tensor is None for tensor in tensors):
        return None
    if tensors[0].shape[0] != ids.shape[0] or model.lm_head.weight.device != ids.device:
        return None  # the forward says what is wrong
    if not ids.is_cuda and ids.shape[0] > _CPU_ROWS:
        return None
    kept = same_tensors(step.used if isinstance(step, DecodeStep) else step, tensors)
    if ids.is_cuda and not kept:
        cache.step = tensors
        return None
    if not isinstance(step, DecodeStep) or not step.serves(model):
        reason = why_not(model)
        cache.step = step = reason or DecodeStep(model, cache)
        if reason:
            return None
    elif not kept:
        step.take(cache)
    return step.replay(ids[:, 0]) if ids.is_cuda else step.forward(ids[:, 0])
