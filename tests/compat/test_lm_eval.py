"""EleutherAI's lm-evaluation-harness measures our model through its Hugging Face interface, on a
task that lies in a local folder."""

import json

import pytest
import torch

WORDS = ["state", "gate", "delta", "rule", "decay", "write"]
TASK = """
task: local_continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(name="tokenizer")
def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )


def test_local_task(tokenizer, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from gated_deltanet.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = GatedDeltaNetConfig(
        hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=16, vocab_size=8,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = GatedDeltaNetForCausalLM(config).eval()

    # Of six words the one that the model finds likeliest is the right answer to every other
    # question, and the unlikeliest to the rest: accuracy 1/2. Prompts of several lengths.
    documents = []
    for number in range(8):
        prompt = " ".join(WORDS[(number + i) % 6] for i in range(1 + number % 3))
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        order = logits[2:].argsort(descending=True).tolist()
        documents.append(
            {"prompt": prompt, "choices": WORDS, "label": order[0] if number % 2 else order[-1]}
        )
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.format(data=data))

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu"),
        tasks=["local_continuations"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["local_continuations"]["acc,none"] == 0.5
