"""Training with what people train with: Trainer, PEFT, DDP, FSDP2."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from gated_deltanet import GatedDeltaNetForCausalLM

PERIOD = 7  # of a text that is easy to learn


def dataset(rows=16, length=24):
    return [
        {"input_ids": [(i + t) % PERIOD for t in range(length)],
         "labels": [(i + t) % PERIOD for t in range(length)]}
        for i in range(rows)
    ]  # fmt: skip


def trainer(model, folder, **options):
    collator = options.pop("data_collator", None)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2,
        use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=dataset(), data_collator=collator)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True, "gradient_checkpointing": True},
        {"data_collator": DataCollatorWithFlattening(), "remove_unused_columns": False},
    ],
    ids=["plain", "bf16 and checkpointing", "packed"],
)
def test_trainer_learns(tiny_config, tmp_path, options):
    run = trainer(GatedDeltaNetForCausalLM(tiny_config()), tmp_path, **options)
    run.train()
    assert losses(run)[-1] < 0.75 * losses(run)[0]
    assert run.evaluate(dataset()[:3])["eval_loss"] < losses(run)[0]


def test_trainer_resumes(tiny_config, tmp_path):
    torch.manual_seed(1)
    whole = GatedDeltaNetForCausalLM(tiny_config())
    trainer(whole, tmp_path, save_strategy="steps", save_steps=5).train()
    resumed = GatedDeltaNetForCausalLM(tiny_config())
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_accumulated_steps_equal_one_large_step(tiny_config, tmp_path):
    """num_items_in_batch: the mean is over all tokens of the step, not over means."""
    steps = []
    for batch, accumulated in ((8, 1), (2, 4)):
        torch.manual_seed(2)
        model = GatedDeltaNetForCausalLM(tiny_config())
        options = {"per_device_train_batch_size": batch, "max_steps": 1, "optim": "sgd"}
        arguments = TrainingArguments(
            output_dir=str(tmp_path), gradient_accumulation_steps=accumulated, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
            learning_rate=0.5, lr_scheduler_type="constant", **options,
        )  # fmt: skip
        data = dataset()
        for i, row in enumerate(data):  # rows with different numbers of labels
            row["labels"] = [-100] * i + row["labels"][i:]
        Trainer(model, arguments, train_dataset=data).train()
        steps.append({name: p.detach().clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)


def test_lora(tiny_model, tmp_path):
    base, ids = tiny_model(), torch.randint(61, (2, 20))
    before, exact = base(ids).logits.detach(), copy.deepcopy(base).double()(ids).logits.detach()
    targets = ["q_proj", "k_proj", "v_proj", "a_proj", "g_proj", "o_proj", "gate_proj"]
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == set(targets)

    model.eval()
    adapted = model(input_ids=ids).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        after = model(input_ids=ids).logits
    # The layers by themselves round otherwise than together, and no worse.
    assert (after - exact).norm() <= 2 * (before - exact).norm()
    text = model.generate(ids[:, :4], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert text.shape == (2, 9)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)  # the same base again
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, adapted)


def test_two_processes(tiny_config, tmp_path):
    model = GatedDeltaNetForCausalLM(tiny_config(attn={"layers": [1], "num_heads": 4})).train()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(61, (2, 20))
    torch.save(ids, tmp_path / "ids.pt")
    worker = Path(__file__).with_name("distributed_worker.py")
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), tmp_path], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()

    model(ids, labels=ids).loss.backward()  # both rows have as many labels: the mean of two means
    narrow = copy.deepcopy(model).bfloat16()
    narrow.zero_grad()
    narrow(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():

        def error_of(gradient, exact=parameter.grad):
            return float((gradient.float() - exact).norm() / exact.norm())

        for kind in ("ddp", "fsdp"):
            assert error_of(torch.load(tmp_path / f"{kind}.pt")[name]) < 1e-5, (kind, name)
        # Like one process in bf16; it keeps the gates' parameters in fp32, which FSDP casts too.
        bound = 2 * error_of(narrow.get_parameter(name).grad) + 2 * torch.finfo(torch.bfloat16).eps
        assert error_of(torch.load(tmp_path / "fsdp_bf16.pt")[name]) < bound, name
