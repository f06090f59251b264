"""The output norm of transformers' own Gated DeltaNet layers on our operator.

transformers finds the other operators of these layers under import names (see compat/fla). Their
gated RMSNorm is a module, which it replaces only through its kernels hub and only on GPUs.
"""

from types import MethodType

from torch import Tensor, nn

from gated_deltanet.ops import rms_norm_gated


def fuse_gated_norms(model: nn.Module) -> int:
    """Makes the gated RMSNorms of a transformers model run as one operator, in place.

    Args:
        model: a model of transformers with Gated DeltaNet layers: Qwen3-Next, Qwen3.5, OLMo-Hybrid.
            Its parameters and their names stay as they are.

    Returns:
        How many norms there are: one a Gated DeltaNet layer.

    Raises:
        ValueError: `model` has none.
    """
    norms = [module for module in model.modules() if _is_gated_norm(module)]
    if not norms:
        raise ValueError(
            "fuse_gated_norms: model must be one of transformers' with Gated DeltaNet layers, got a"
            f" {type(model).__name__} without any gated RMSNorm"
        )
    for norm in norms:
        norm.forward = MethodType(_forward, norm)
    return len(norms)


def _is_gated_norm(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNormGated")


def _forward(norm: nn.Module, hidden_states: Tensor, gate: Tensor) -> Tensor:
    gate = gate.to(hidden_states.dtype)
    return rms_norm_gated(hidden_states, gate, norm.weight, norm.variance_epsilon)
