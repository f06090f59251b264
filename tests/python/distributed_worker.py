"""One of two gloo processes of test_training.py: the gradients of DDP and FSDP2.

Usage: distributed_worker.py RANK FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gated_deltanet import GatedDeltaNetForCausalLM

WORLD = 2


def gradients(model):
    return {
        name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda g=p.grad: g)()
        for name, p in model.named_parameters()
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    ids = torch.load(folder / "ids.pt")[rank : rank + 1]  # a row each

    def load():
        return GatedDeltaNetForCausalLM.from_pretrained(folder / "model").train()

    def shard(model, **options):
        for block in model.model.layers:
            fully_shard(block, **options)
        return fully_shard(model, **options)

    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, model in {
        "ddp": DistributedDataParallel(load()),
        "fsdp": shard(load()),
        "fsdp_bf16": shard(load(), mp_policy=narrow),
    }.items():
        model(input_ids=ids, labels=ids).loss.backward()
        found = gradients(model)
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
