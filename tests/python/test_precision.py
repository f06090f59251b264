"""Every operator x precision x use: within twice plain PyTorch's error against fp64.

`benchmarks/operator_precision.py` measures, and prints the table.
"""

import sys

import pytest
import torch
from conftest import ROOT

import gated_deltanet  # noqa: F401 (registers the operators)

sys.path.insert(0, str(ROOT / "benchmarks"))
import operator_precision as precision

CASES = [
    pytest.param(operator, dtype, column, id=f"{operator.name}-{dtype}-{column}")
    for operator in precision.operators()
    for dtype in precision.DTYPES
    for column in operator.columns
]


@pytest.mark.parametrize(("operator", "dtype", "column"), CASES)
def test_error(operator, dtype, column):
    ours, plain = precision.measure(operator, dtype, column)
    # One rounding of the result; in fp32 also sums over all 200 tokens in another order, which are
    # random walks of sqrt(200) roundings of eps / 4.
    roundings = 3.5 if dtype == torch.float32 else 1
    assert ours <= 2 * plain + roundings * torch.finfo(dtype).eps
