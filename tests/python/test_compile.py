"""torch.compile and export: one graph, no breaks, the same numbers."""

import pytest
import torch

from gated_deltanet.layers import GatedDeltaNet, LayerCache
from gated_deltanet.ops import chunk_gated_delta_rule

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def whole(function, **options):
    """Without code generation, which needs seconds and a C++ compiler; raises on a graph break."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def losses_and_gradients(run, model, batches):
    results = []
    for ids in batches:
        model.zero_grad()
        loss = run(ids, labels=ids).loss
        loss.backward()
        results += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return results


def test_training_step(tiny_model, kind):
    model, ids = tiny_model(**kind).train(), torch.randint(61, (2, 20))
    expected = losses_and_gradients(model, model, [ids])
    compiled = losses_and_gradients(whole(model), model, [ids])
    torch.testing.assert_close(compiled, expected, **EXACT)


def test_other_lengths_without_compiling_again(tiny_model):
    model = tiny_model(num_hidden_layers=1).train()
    batches = [torch.randint(61, (2, 20)), torch.randint(61, (3, 133))]
    expected = losses_and_gradients(model, model, batches)
    step = whole(model, dynamic=True)
    with torch.compiler.set_stance("default"):
        compiled = losses_and_gradients(step, model, batches[:1])
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled += losses_and_gradients(step, model, batches[1:])
    torch.testing.assert_close(compiled, expected, **EXACT)


def test_autocast(tiny_model):
    model, ids = tiny_model().train(), torch.randint(61, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        expected = losses_and_gradients(model, model, [ids])
        compiled = losses_and_gradients(whole(model), model, [ids])
    torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=2e-2)  # bf16


def test_packed_layer():
    layer, x = GatedDeltaNet(32, 1.0, 8, 2).train(), torch.randn(1, 12, 32)
    for ends in ([0, 5, 12], [0, 9, 12]):
        cu_seqlens = torch.tensor(ends)
        compiled = whole(lambda x, ends: layer(x, cu_seqlens=ends)[0])(x, cu_seqlens)
        torch.testing.assert_close(compiled, layer(x, cu_seqlens=cu_seqlens)[0], **EXACT)


@torch.no_grad()
def test_decoding_in_place():
    layer, x = GatedDeltaNet(32, 1.0, 8, 2).eval(), torch.randn(2, 12, 32)
    caches = [LayerCache(), LayerCache()]
    step = whole(lambda x, cache: layer(x, past_key_values=cache)[0])
    for cache in caches:
        layer(x[:, :8], past_key_values=cache)
    for t in range(8, 12):
        token = x[:, t : t + 1]
        torch.testing.assert_close(
            step(token, caches[0]), layer(token, past_key_values=caches[1])[0], **EXACT
        )
    for name, tensor in caches[0].tensors().items():
        torch.testing.assert_close(tensor, caches[1].tensors()[name], **EXACT)


def test_bad_boundaries_in_a_graph():
    layer, x = GatedDeltaNet(32, 1.0, 8, 2).train(), torch.randn(1, 12, 32)
    compiled = whole(lambda x, ends: layer(x, cu_seqlens=ends)[0])
    compiled(x, torch.tensor([0, 5, 12]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(x, torch.tensor([0, 5, 13]))


def test_export():
    class Rule(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)

    q, k, v = torch.randn(3, 1, 20, 2, 8).unbind()
    inputs = (q, k, v, -torch.rand(1, 20, 2), torch.rand(1, 20, 2))
    program = torch.export.export(Rule(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Rule()(*inputs), **EXACT)
