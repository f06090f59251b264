"""transformers' generate() on one GPU: our 1,567 M model or flash-linear-attention's.

    python benchmarks/cuda/generate.py ours
    python benchmarks/cuda/generate.py fla

bf16 random weights, greedy, from 8 tokens a row. Prints the tokens/s of the whole call, prompt
included, after one call to warm up.
"""

import argparse
import time

import torch
from train import make_model

OPTIONS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2.0,
    "vocab_size": 32000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementation", choices=["ours", "fla"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(args.implementation, OPTIONS).eval()
    prompts = torch.randint(1, OPTIONS["vocab_size"], (args.batch_size, 8), device="cuda")
    for calls in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=args.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        assert ids.shape == (args.batch_size, 8 + args.tokens)
        if calls == 0:
            continue  # compiles, captures
        print(
            f"{args.implementation}, {torch.cuda.get_device_name()}: batch {args.batch_size}, "
            f"{args.tokens} tokens in {seconds:.2f} s, "
            f"{args.batch_size * args.tokens / seconds:,.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
