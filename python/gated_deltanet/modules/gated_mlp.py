"""The feed-forward block: SwiGLU (arXiv 2002.05202)."""

from torch import Tensor, nn

from gated_deltanet.modules.autocast import cast_for_autocast
from gated_deltanet.modules.projections import is_plain, project
from gated_deltanet.ops.common import swiglu, swiglu_linear


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)).

    Args:
        hidden_size: of input and output.
        intermediate_size: of the gated activation.
        fuse_swiglu: our operator; otherwise torch's silu and a product.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, fuse_swiglu: bool = True) -> None:
        super().__init__()
        self.fuse_swiglu = fuse_swiglu
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> [..., hidden_size]."""
        x = cast_for_autocast(x)
        gate, up = project(x, [self.gate_proj, self.up_proj])
        if not self.fuse_swiglu:
            return self.down_proj(nn.functional.silu(gate) * up)
        if is_plain(self.down_proj):
            return swiglu_linear(gate, up, self.down_proj.weight)
        return self.down_proj(swiglu(gate, up))
