"""What a layer multiplies with its weight, all of it or at a few positions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphprune.calibrate import columns

CASES = {
    "square": ((5, 6, 9, 11), (3, 3), {"stride": [1], "padding": [1], "dilation": [1]}, 1),
    "uneven": ((5, 6, 9, 11), (3, 2), {"stride": [2, 1], "padding": [1, 0], "dilation": [2, 1]}, 2),
    "same": ((5, 6, 9, 11), (3, 3), {"stride": [1], "padding": "same", "dilation": [1]}, 1),
    "line": ((4, 6, 13), (5,), {"stride": [2], "padding": [2], "dilation": [1]}, 2),
    "one tap that skips": ((4, 6, 9, 7), (1, 1), {"stride": [2, 2], "padding": [0, 0], "dilation": [1, 1]}, 1),
    "one tap": ((4, 6, 9, 7), (1, 1), {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}, 3),
}


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
@pytest.mark.parametrize(("shape", "kernel", "given", "groups"), CASES.values(), ids=CASES)
def test_few_positions_are_those_of_all_evenly_spaced(shape: Any, kernel: Any, given: Any, groups: int, most: int):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    consumer: Any = SimpleNamespace(node=SimpleNamespace(op=f"conv{len(kernel)}d", arguments=given), groups=groups)
    taps = math.prod(kernel)
    whole = torch.cat(list(columns(consumer, x, kernel, taps, samples=1)), 1)
    each = whole.shape[1] // len(x)
    want = whole.unflatten(1, (len(x), each))[:, :, :: math.ceil(each / most)].flatten(1, 2)
    found = torch.cat(list(columns(consumer, x, kernel, taps, samples=2, most=most)), 1)
    assert len(x) * each >= want.shape[1] >= len(x)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
