"""Operators and models on a GPU: right within what their products round by, clear if refused.

An error against fp64 on the CPU may be twice that of plain PyTorch on the CPU at the same
precision, plus roundings of the result's size, as in
`tests/cuda/test_gated_delta_rule_operators.cpp`: one of the result; of the gated delta rule in fp32
sums of C + K terms, in 16 bits eight operands of 2^-12 and, where Hopper's kernels serve, 10
operands of the dtype on the way forward and 18 there and back.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import KINDS
from test_precision import CASES, precision

from gated_deltanet.layers import GatedDeltaNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def products(dtype):
    """What the products of the gated delta rule may round by, forward and back."""
    if dtype == torch.float32:
        return 12 * 2**-24  # sqrt(64 + 32) and a little
    return 8 * 2**-12 + 18 * torch.finfo(dtype).eps / 4


@pytest.mark.parametrize(("operator", "dtype", "column"), CASES)
def test_operators(operator, dtype, column):
    ours, plain = precision.measure(operator, dtype, column, "cuda")
    # As on the CPU, sums over all tokens in another order.
    roundings = (3.5 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
    rule = products(dtype) if operator.name.endswith("gated_delta_rule") else 0.0
    assert ours <= 2 * plain + roundings + rule


def loss_logits_and_gradients(model, ids):
    """On the CPU, whatever the model's device."""
    ids = ids.to(model.device)
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    results = {"loss": output.loss, "logits": output.logits, **gradients}
    return {name: tensor.detach().cpu().double() for name, tensor in results.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_models(tiny_model, kind, dtype):
    model = tiny_model(**KINDS[kind]).to(dtype)
    ids = torch.randint(61, (2, 70))
    on_cpu = loss_logits_and_gradients(model, ids)
    on_gpu = loss_logits_and_gradients(model.cuda(), ids)
    exact = loss_logits_and_gradients(model.cpu().double(), ids)
    for name, want in exact.items():
        error, plain = ((x[name] - want).norm() / want.norm() for x in (on_gpu, on_cpu))
        # Two layers, each with a rule and products in another order.
        assert error <= 2 * plain + 2 * products(dtype) + torch.finfo(dtype).eps, name


def test_steps_of_training_on_a_gpu_are_those_on_the_cpu(tiny_model):
    ids = torch.randint(61, (4, 40))

    def losses(device):
        torch.manual_seed(1)
        model = tiny_model().train().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        result = []
        for _ in range(8):
            loss = model(ids.to(device), labels=ids.to(device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return result

    on_gpu = losses("cuda")
    assert on_gpu[-1] < on_gpu[0] - 0.5
    torch.testing.assert_close(on_gpu, losses("cpu"), rtol=1e-3, atol=1e-3)


def test_a_target_out_of_range_is_not_a_number_and_harms_nothing_else():
    logits = torch.randn(4, 10, device="cuda", requires_grad=True)
    target = torch.tensor([3, 10, -1, -100], device="cuda")
    loss = torch.ops.gdn.cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    bad = torch.tensor([False, True, True, False])
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(logits.grad.isnan().any(1).cpu(), bad)
    hidden, head = torch.randn(4, 8, device="cuda"), torch.randn(10, 8, device="cuda")
    loss = torch.ops.gdn.linear_cross_entropy(hidden, head, target, reduction="none")
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.ops.gdn.cross_entropy(logits.detach(), target).isnan()
    torch.cuda.synchronize()  # no error is left behind


def rule(K=16, dtype=torch.float32, device="cuda", **others):
    x = {name: torch.randn(1, 4, 1, K, dtype=dtype, device=device) for name in "qkv"}
    x |= {name: torch.rand(1, 4, 1, device=device) for name in ("g", "beta")}
    return torch.ops.gdn.chunk_gated_delta_rule(**{**x, **others})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rule(K=513), "gated_delta_rule: no CUDA kernel .* K = 513 is beyond 512"),
        (lambda: rule(dtype=torch.float64), "must be Float, BFloat16 or Half, got Double"),
        (lambda: rule(g=torch.zeros(1, 4, 1)), "g must be .*cuda:0.* got .* on cpu"),
        (lambda: torch.ops.gdn.swiglu(torch.ones(2).cuda(), torch.ones(2)), "up must be .*on cpu"),
    ],
)
def test_what_no_kernel_serves(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gpu_without_enough_memory():
    layer = GatedDeltaNet(hidden_size=64, num_heads=2, head_dim=32).cuda().bfloat16()
    x = torch.randn(1, 4096, 64, device="cuda", dtype=torch.bfloat16)
    free = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**24 / free)  # 16 MiB
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            layer(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert layer(x)[0].isfinite().all()  # and it goes on


def test_without_a_visible_gpu(command):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([command, "info"], env=hidden, capture_output=True, text=True, check=True)
    assert "no GPU can be used: no CUDA-capable device is detected" in run.stdout
    code = (
        "import gated_deltanet, torch; torch.ops.gdn.l2_norm(torch.ones(8)); torch.ones(1).cuda()"
    )
    run = subprocess.run([sys.executable, "-c", code], env=hidden, capture_output=True, text=True)
    assert "No CUDA GPUs are available" in run.stderr
