"""The model as a citizen of transformers: files, Auto classes, losses, packing, errors."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from gated_deltanet import GatedDeltaNetCache, GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from gated_deltanet.models import GatedDeltaNetModel

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # fp32, the same sums in another order


def tokens(*shape):
    return torch.randint(61, shape)


def test_defaults_are_those_of_the_design():
    config = GatedDeltaNetConfig()
    assert (config.hidden_size, config.head_dim, config.num_heads) == (2048, 256, 6)
    assert config.mlp_size == 5632 and config.value_heads == 6 and config.attn is None
    assert GatedDeltaNetConfig(hidden_size=768, hidden_ratio=None).mlp_size == 2048


def test_state_dict_keys(tiny_model):
    keys = set(tiny_model(attn={"layers": [1], "num_heads": 4}).state_dict())
    block = ("attn_norm.weight", "mlp_norm.weight", *(f"mlp.{x}_proj.weight" for x in
             ("gate", "up", "down")))  # fmt: skip
    projections = [f"{x}_proj.weight" for x in ("q", "k", "v", "o")]
    mixer = [*projections, "a_proj.weight", "b_proj.weight", "g_proj.weight", "A_log", "dt_bias",
             "o_norm.weight", *(f"{x}_conv1d.weight" for x in "qkv")]  # fmt: skip
    assert keys == {
        "model.embeddings.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{name}" for i in (0, 1) for name in block),
        *(f"model.layers.0.attn.{name}" for name in mixer),
        *(f"model.layers.1.attn.{name}" for name in projections),
    }


def test_initialisation(tiny_config):
    model = GatedDeltaNetForCausalLM(tiny_config(hidden_size=256, initializer_range=0.05))
    attn = model.model.layers[0].attn
    for weight in (model.lm_head.weight, attn.q_proj.weight, attn.q_conv1d.weight):
        assert abs(weight.std() / 0.05 - 1) < 0.2
    assert torch.equal(attn.o_norm.weight, torch.ones_like(attn.o_norm.weight))
    assert attn.A_log.exp().min() >= 0 and attn.A_log.exp().max() <= 16


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(tiny_model, kind, tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied, **kind), tokens(2, 20)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 1
    for folder in ("one", "shards"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is GatedDeltaNetForCausalLM and not loaded.training
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
        assert torch.equal(loaded(ids).logits, expected)
        weights = (loaded.lm_head.weight, loaded.model.embeddings.weight)
        assert (weights[0] is weights[1]) == tied
    body = AutoModel.from_pretrained(tmp_path / "one")
    assert type(body) is GatedDeltaNetModel
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path / "one")) is GatedDeltaNetConfig


def test_dtype_and_device_map(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = GatedDeltaNetForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, device_map={"": "cpu"}
        )
        attn = loaded.model.layers[0].attn
        assert attn.q_proj.weight.dtype == loaded.lm_head.weight.dtype == dtype
        assert torch.equal(attn.A_log, model.model.layers[0].attn.A_log)
        assert torch.equal(attn.dt_bias, model.model.layers[0].attn.dt_bias)
        assert torch.isfinite(loaded(tokens(1, 70)).logits).all()
        # Again from the narrow checkpoint, whose gates are as wide as before.
        loaded.save_pretrained(tmp_path / str(dtype))
        again = GatedDeltaNetForCausalLM.from_pretrained(tmp_path / str(dtype))
        assert again.dtype == dtype
        assert torch.equal(again.model.layers[0].attn.A_log, attn.A_log)


def test_flash_linear_attention_configuration():
    written_by_fla = {
        "attn_mode": "chunk",
        "hidden_ratio": None,
        "fuse_norm": True,
        "use_l2warp": False,
        "norm_first": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "architectures": ["GatedDeltaNetForCausalLM"],
        "model_type": "gated_deltanet",
        "use_bfloat16": False,
        "top_k": 50,
    }
    config = GatedDeltaNetConfig(**written_by_fla)
    assert config.hidden_ratio == 4 and config.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="use_l2warp must be False, got True"):
        GatedDeltaNetConfig(use_l2warp=True)


@pytest.mark.parametrize("fused", [True, False])
def test_loss(tiny_model, kind, fused):
    model = tiny_model(fuse_cross_entropy=fused, fuse_norm=fused, fuse_swiglu=fused, **kind)
    ids = tokens(2, 30)
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(ids, labels=labels)
    shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(*shifted)
    torch.testing.assert_close(output.loss, expected)
    total = torch.nn.functional.cross_entropy(*shifted, reduction="sum")
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(summed, total / 100)
    kept = model(ids, labels=labels, logits_to_keep=3)
    assert torch.equal(kept.logits, output.logits[:, -3:]) and torch.equal(kept.loss, output.loss)
    some = model(ids, logits_to_keep=torch.tensor([0, 5])).logits
    torch.testing.assert_close(some, output.logits[:, [0, 5]], **EXACT)


def test_fused_options_agree(tiny_model):
    model, ids = tiny_model(), tokens(2, 30)
    expected = model(ids, labels=ids)
    for block in model.model.layers:
        block.mlp.fuse_swiglu = block.attn_norm.fused = block.mlp_norm.fused = False
    model.config.fuse_cross_entropy = False
    plain = model(ids, labels=ids)
    torch.testing.assert_close(plain.logits, expected.logits, **EXACT)
    torch.testing.assert_close(plain.loss, expected.loss, **EXACT)
    model.config.fuse_linear_cross_entropy = True
    linear = model(ids, labels=ids)
    torch.testing.assert_close(linear.loss, expected.loss, **EXACT)
    assert linear.logits is None and model(ids).logits is not None


def test_fused_options_use_our_operators(tiny_model):
    """fuse_* decide which operators run, as the profiler sees them."""
    used = {}
    for fused in (True, False):
        options = {f"fuse_{x}": fused for x in ("norm", "swiglu", "cross_entropy")}
        model, ids = tiny_model(**options, use_gate=False), tokens(1, 9)
        with torch.profiler.profile() as profile:
            model(ids, labels=ids)
        used[fused] = {event.name for event in profile.events() if event.name.startswith("gdn::")}
    assert {"gdn::swiglu", "gdn::cross_entropy_rows", "gdn::norm"} <= used[True]
    assert not {"gdn::swiglu", "gdn::cross_entropy_rows"} & used[False]


def test_padded_packed_and_single_agree(tiny_model, kind):
    model, lengths, T = tiny_model(**kind), (4, 13, 7), 13
    rows = [tokens(1, length) for length in lengths]
    single = [model(row, labels=row) for row in rows]
    padded, mask = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, T - lengths[i] :], mask[i, T - lengths[i] :] = row, 1
    batch = model(padded, attention_mask=mask, labels=padded)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(batch.logits[i, T - length :], single[i].logits[0], **EXACT)
    counted = torch.tensor([length - 1.0 for length in lengths])
    mean = (torch.stack([row.loss for row in single]) * counted).sum() / counted.sum()
    torch.testing.assert_close(batch.loss, mean)

    line = torch.cat(rows, 1)
    ends = torch.tensor([0, 4, 17, 24])
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    for boundaries in (
        {"cu_seqlens": ends},
        {"cu_seq_lens_q": ends.int(), "max_length_q": 13, "position_ids": positions},
        {"position_ids": positions},
    ):
        packed = model(line, labels=line, **boundaries)
        logits = torch.cat([row.logits for row in single], 1)
        torch.testing.assert_close(packed.logits, logits, **EXACT)
        torch.testing.assert_close(packed.loss, mean)


def test_hidden_states_and_tuples(tiny_model):
    model, ids = tiny_model(), tokens(2, 6)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    by_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(by_tuple, tuple) and torch.equal(by_tuple[0], output.logits)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, output.logits)


def test_gradient_checkpointing(tiny_model, kind):
    model, ids = tiny_model(**kind).train(), tokens(2, 20)
    gradients, runs = [], []
    model.model.layers[0].attn_norm.register_forward_pre_hook(lambda *_: runs.append(None))
    for reentrant in (None, False, True):
        if reentrant is not None:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.zero_grad()
        runs.clear()
        model(ids, labels=ids).loss.backward()
        assert len(runs) == (1 if reentrant is None else 2)  # once more in the backward
        gradients.append([p.grad.clone() for p in model.parameters()])
    for again in gradients[1:]:
        torch.testing.assert_close(again, gradients[0], rtol=0, atol=0)


def test_resized_embeddings(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(70)
    assert model(tokens(1, 4)).logits.shape == (1, 4, 70) and model.config.vocab_size == 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads"),
        ({"expand_v": 1.3}, r"expand_v must be such that head_dim \* expand_v is a whole number"),
        ({"attn_mode": "parallel"}, 'attn_mode must be "chunk" or "fused_recurrent"'),
        ({"hidden_act": "gelu"}, 'hidden_act must be "swish" or "silu"'),
        ({"conv_size": 1}, "conv_size must be from 2 to 8, got 1"),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1"),
        ({"eos_token_id": 61}, "eos_token_id must be None or from 0 to vocab_size - 1 = 60"),
        ({"fuse_linear_cross_entropy": True}, "fuse_linear_cross_entropy must be False"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite"),
        ({"attn": {"layers": [2], "num_heads": 4}}, "attn.layers must be different, from 0 to 1"),
        ({"attn": {"layers": [0], "num_heads": 5}}, "attn.num_heads must be a divisor"),
        ({"attn": {"layers": [0]}}, "attn.num_heads must be given"),
    ],
)
def test_bad_configurations(tiny_config, options, message):
    with pytest.raises(ValueError, match=f"GatedDeltaNetConfig: {message}"):
        tiny_config(**options)


def test_unknown_fields(tiny_config, tmp_path):
    with pytest.raises(TypeError, match="unknown field 'head_first'"):
        tiny_config(head_first=True)
    with pytest.raises(TypeError, match=r"unknown field 'attn.heads'"):
        tiny_config(attn={"layers": [0], "num_heads": 4, "heads": 4})
    tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "rope": 1}))
    with pytest.raises(TypeError, match="unknown field 'rope'"):
        GatedDeltaNetConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (TypeError, {"seq_len": 3}, "unknown keyword argument 'seq_len'"),
        (ValueError, {"attention_mask": torch.ones(2, 6, 6)}, "attention_mask must be of shape"),
        (ValueError, {"output_attentions": True}, "output_attentions must be False"),
        (ValueError, {"labels": torch.zeros(2, 5, dtype=torch.int64)}, "labels must be of shape"),
        (ValueError, {"labels": torch.full((2, 6), 61)}, "labels must be from 0 to .* got 61"),
        (ValueError, {"past_key_values": DynamicCache()}, "past_key_values must be a Gated"),
        (ValueError, {"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must be None for a batch"),
        (ValueError, {"inputs_embeds": torch.zeros(2, 6, 32)}, "input_ids must be given, or else"),
        (
            ValueError,
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
            "position_ids must be consecutive in each row where B > 1",
        ),
    ],
)
def test_bad_calls(tiny_model, error, options, message):
    with pytest.raises(error, match=f"GatedDeltaNet(Model|ForCausalLM): {message}"):
        tiny_model()(tokens(2, 6), **options)


def test_bad_ids_and_caches(tiny_model):
    model = tiny_model()
    for ids in (torch.tensor([[61]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match="input_ids must be from 0 to vocab_size - 1 = 60"):
            model(ids)
    with pytest.raises(ValueError, match="input_ids must be int64"):
        model(torch.zeros(1, 4))
    cache = GatedDeltaNetCache()
    tiny_model(num_hidden_layers=3)(tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must be empty or of 2 layers, got 3"):
        model(tokens(1, 1), past_key_values=cache)
    cache = GatedDeltaNetCache()
    tiny_model(head_dim=16)(tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must be that of this layer and batch"):
        model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache must be False with packed sequences"):
        model(tokens(1, 6), cu_seqlens=torch.tensor([0, 2, 6]), use_cache=True)
