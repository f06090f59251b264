"""Other implementations of the gated delta rule's forward on a CPU that install from PyPI.

`pip install onnxruntime onnx` and `pip install mlx-lm mlx-cpu` add them to
benchmarks/cpu_gated_delta_rule.py; neither has a backward. Both take one token after another,
and q and k already L2-normalised.
"""

import importlib.util


def installed(*modules):
    return all(importlib.util.find_spec(module) is not None for module in modules)


def onnxruntime_forward(inputs, state, threads):
    """The CPU kernel of onnxruntime's operator LinearAttention, fp32."""
    import onnxruntime
    import torch
    from onnx import TensorProto, helper

    q, k, v, g, beta = inputs
    _, tokens, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    packed = {
        "q": q.flatten(2),
        "k": k.flatten(2),
        "v": v.flatten(2),
        "state": state,
        "g": g,
        "beta": beta,
    }

    def info(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    node = helper.make_node(
        "LinearAttention",
        list(packed),
        ["o", "final_state"],
        domain="com.microsoft",
        update_rule="gated_delta",
        q_num_heads=key_heads,
        kv_num_heads=value_heads,
        scale=key_dim**-0.5,
    )
    graph = helper.make_graph(
        [node],
        "gated_delta_rule",
        [info(name, list(x.shape)) for name, x in packed.items()],
        [info("o", list(packed["v"].shape)), info("final_state", list(state.shape))],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between its calls would take the cores from whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {name: x.contiguous().numpy() for name, x in packed.items()}

    def run():
        o, final_state = session.run(None, feed)
        o = torch.from_numpy(o).view(1, tokens, value_heads, value_dim)
        return o, torch.from_numpy(final_state)

    return run


def mlx_forward(inputs, state, _threads):
    """mlx-lm's operations on the CPU, fp32; its kernels are for Apple's GPUs."""
    import mlx.core as mx
    import torch
    from mlx_lm.models.gated_delta import gated_delta_ops

    mx.set_default_device(mx.cpu)
    q, k, v, g, beta = inputs
    arrays = [mx.array(x.numpy()) for x in (q * q.shape[-1] ** -0.5, k, v, g.exp(), beta)]
    first = mx.array(state.transpose(2, 3).contiguous().numpy())  # [B, HV, V, K]

    def run():
        results = gated_delta_ops(*arrays, first)
        mx.eval(*results)
        o, final_state = (torch.from_dlpack(x) for x in results)
        return o, final_state.transpose(2, 3)

    return run


def forwards(inputs, state, threads):
    """name -> a function that returns (o, final state), of what is installed."""
    found = {}
    if installed("onnxruntime", "onnx"):
        found["onnxruntime"] = onnxruntime_forward(inputs, state, threads)
    if installed("mlx", "mlx_lm"):
        found["mlx-lm"] = mlx_forward(inputs, state, threads)
    return found
