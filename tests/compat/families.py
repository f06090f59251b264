"""Tiny random models of the three families, transformers' PyTorch path, and that path in fp64."""

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import transformers

FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)
VOCAB = 61
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.2,  # activations of order one, so that mistakes show
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@dataclass(frozen=True)
class Family:
    module: str  # transformers.models.MODULE.modeling_MODULE
    make: Callable[[], transformers.PreTrainedModel]

    @property
    def modeling(self):
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def model(self, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
        torch.manual_seed(5)
        model = self.make().to(dtype).eval()
        if self.module == "qwen3_next":
            model.set_experts_implementation("eager")  # the default one does not know fp64
        return model


FAMILIES = {
    "qwen3_next": Family(
        "qwen3_next",
        lambda: transformers.Qwen3NextForCausalLM(
            transformers.Qwen3NextConfig(**SIZES, **EXPERTS, head_dim=16)
        ),
    ),
    "qwen3_5": Family(
        "qwen3_5",
        lambda: transformers.Qwen3_5ForCausalLM(
            transformers.Qwen3_5TextConfig(**SIZES, head_dim=16)
        ),
    ),
    "olmo_hybrid": Family(
        "olmo_hybrid",
        lambda: transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**SIZES)),
    ),
}


@contextlib.contextmanager
def torch_path(family: Family) -> Iterator[None]:
    """transformers' own PyTorch functions in place of the operators that it picked up."""
    originals = {name: getattr(family.modeling, name).__wrapped__ for name in FUNCTIONS}
    with mock.patch.multiple(family.modeling, **originals):
        yield


class _WideTorch:
    """The module torch, in which fp32 is fp64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def exact_path(family: Family) -> Iterator[None]:
    """The PyTorch path with its fp32 sections in fp64, for models in fp64."""
    wide = [mock.patch.object(torch.Tensor, "float", torch.Tensor.double)]
    for name in FUNCTIONS:  # their globals are those of the module that defines them
        namespace = getattr(family.modeling, name).__wrapped__.__globals__
        wide.append(mock.patch.dict(namespace, {"torch": _WideTorch()}))
    with contextlib.ExitStack() as stack:
        for patch in [torch_path(family), *wide]:
            stack.enter_context(patch)
        yield


def exact_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return copy.deepcopy(model).double()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_as_accurate(ours, theirs, exact, what: str = "result") -> None:
    """The error of ours against fp64 is at most twice theirs, or some roundings of the norm."""
    exact = exact.double()
    assert ours.shape == theirs.shape == exact.shape, what
    assert torch.isfinite(ours).all(), what
    error = (ours.double() - exact).norm().item()
    their_error = (theirs.double() - exact).norm().item()
    eps, norm = torch.finfo(theirs.dtype).eps, exact.norm().item()
    same = their_error <= 4 * eps**0.5 * norm  # half of the digits; unrelated runs differ by 1.4
    assert same, f"{what}: theirs differs from fp64 by {their_error / norm:.2g} of the norm"
    rounding = eps * norm
    assert error <= max(2 * their_error, rounding), (
        f"{what}: error {error:.3g} against fp64, theirs {their_error:.3g}, rounding {rounding:.3g}"
    )
