"""What these tests share: no network, one thread, and the README's examples."""

import os
import re
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
torch.set_num_threads(1)  # shapes are too small to share


@pytest.fixture(scope="session")
def readme_blocks() -> list[str]:
    """The Python in the README's section on transformers' models."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    section = readme.split("\n## Qwen3-Next, Qwen3.5 and OLMo-Hybrid")[1].split("\n## ")[0]
    return re.findall(r"(?s)```python\n(.*?)```", section)
