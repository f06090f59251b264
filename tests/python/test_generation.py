"""Generation in every common mode, against forwards without a cache."""

import copy

import pytest
import torch
from transformers import TextStreamer

from gated_deltanet import GatedDeltaNetCache

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [0]}
EXACT = {"rtol": 1e-4, "atol": 1e-4}  # fp32 through the whole model, logits of size 1


def tokens(*shape):
    return torch.randint(1, 61, shape)


def greedy_by_full_forwards(model, ids, steps):
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        following = logits[:, 1:].argmax(-1, keepdim=True) + 1  # 0 is padding
        ids = torch.cat([ids, following], 1)
    return ids


def test_greedy_equals_full_forwards(tiny_model, kind):
    model, ids = tiny_model(**kind), tokens(2, 5)
    with torch.no_grad():
        expected = greedy_by_full_forwards(model, ids, 12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, **GREEDY), expected)
    uncached = model.generate(ids, max_new_tokens=12, use_cache=False, **GREEDY)
    assert torch.equal(uncached, expected)


def test_padded_batch_equals_single_rows(tiny_model, kind):
    model, lengths = tiny_model(**kind), (3, 9, 1)
    rows = [tokens(1, length) for length in lengths]
    padded, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, 9 - lengths[i] :], mask[i, 9 - lengths[i] :] = row, 1
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=8, **GREEDY)
        assert torch.equal(together[i, 9:], alone[0, lengths[i] :])


def test_beams(tiny_model, kind):
    """Beam search that forgets to reorder states would score its own texts wrongly."""
    model, ids = tiny_model(**kind), tokens(2, 4)
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, **GREEDY}
    output = model.generate(
        ids, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **beams
    )
    logits = model(output.sequences, use_cache=False).logits[:, 3:-1].log_softmax(-1)
    scores = logits.gather(2, output.sequences[:, 4:, None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores, scores, **EXACT)
    assert torch.equal(output.sequences, model.generate(ids, use_cache=False, **beams))


def test_sampling(tiny_model):
    model, ids = tiny_model(), tokens(2, 5)
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8,
               "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 10}  # fmt: skip
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, **options))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, use_cache=False, **options), texts[0])
    several = model.generate(ids, num_return_sequences=3, **options)
    assert several.shape == (6, 15)


def test_streaming(tiny_model):
    class Tokenizer:  # what a TextStreamer asks for
        def decode(self, ids, **_):
            return " ".join(str(int(token)) for token in ids) + "\n"

    class Collected(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    model, ids, streamer = tiny_model(), tokens(1, 5), Collected(Tokenizer(), skip_prompt=True)
    output = model.generate(ids, max_new_tokens=7, streamer=streamer, **GREEDY)
    assert [int(token) for token in streamer.text.split()] == output[0, 5:].tolist()


def test_end_of_text_stops_rows(tiny_model):
    model, ids = tiny_model(), tokens(2, 5)
    free = model.generate(ids, max_new_tokens=12, **GREEDY)
    end = int(free[0, 8])
    ended = model.generate(ids, max_new_tokens=12, **{**GREEDY, "eos_token_id": end})
    for row, whole in zip(ended, free, strict=True):
        stop = (whole[5:] == end).nonzero()
        length = 5 + int(stop[0]) + 1 if len(stop) else len(whole)
        assert torch.equal(row[:length], whole[:length]) and not row[length:].any()


def test_cache_continues_in_a_later_call(tiny_model, kind):
    model, ids = tiny_model(**kind), tokens(2, 5)
    whole = model.generate(ids, max_new_tokens=16, **GREEDY)
    assert (whole != GREEDY["pad_token_id"]).all()  # or generate would take it for padding
    first = model.generate(ids, max_new_tokens=7, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert isinstance(cache, GatedDeltaNetCache) and cache.get_seq_length() == 11
    snapshot = copy.deepcopy(cache)
    more = model.generate(first.sequences, past_key_values=cache, max_new_tokens=9, **GREEDY)
    assert torch.equal(more, whole)
    # And a second turn: other tokens after the same beginning.
    turn = torch.cat([first.sequences, tokens(2, 70)], 1)
    options = {"attention_mask": torch.ones_like(turn), "max_new_tokens": 9, **GREEDY}
    again = model.generate(turn, past_key_values=snapshot, **options)
    assert torch.equal(again, model.generate(turn, **options))


def test_a_thousand_cached_tokens_equal_the_full_forward(tiny_model):
    model = tiny_model(num_hidden_layers=1, attn=None)
    output = model.generate(
        tokens(1, 3), max_new_tokens=1000, output_logits=True, return_dict_in_generate=True,
        **GREEDY,
    )  # fmt: skip
    full = model(output.sequences).logits[0, 2:-1]
    assert output.sequences.shape == (1, 1003)
    torch.testing.assert_close(torch.cat(output.logits), full, **EXACT)
    sizes = {state.nbytes for state in output.past_key_values.layers[0].tensors().values()}
    assert output.past_key_values.nbytes() < 10_000, sizes  # it has not grown


def test_long_prompts_in_pieces(tiny_model, kind):
    model, ids = tiny_model(**kind), tokens(2, 150)
    expected = model.generate(ids, max_new_tokens=5, **GREEDY)
    pieces = model.generate(ids, max_new_tokens=5, prefill_chunk_size=64, **GREEDY)
    assert torch.equal(pieces, expected)


def test_other_decoders(tiny_model):
    model, ids = tiny_model(), tokens(2, 6)
    options = {"max_new_tokens": 6, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, **GREEDY}
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation must be None"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful"),
        ({"head_first": True}, "head_first"),
    ],
)
def test_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(tokens(1, 5), max_new_tokens=3, **options, **GREEDY)


def test_other_caches_are_refused(tiny_model):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="past_key_values must be a GatedDeltaNetCache"):
        tiny_model().generate(tokens(1, 5), past_key_values=DynamicCache(), **GREEDY)
