"""The quick results of frequent ops against their kernels for the meta device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.trace import shapes

aten = torch.ops.aten


def operand(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def last(*shape: int) -> torch.Tensor:
    """An operand whose channels vary fastest."""
    return operand(*shape).to(memory_format=torch.channels_last)


IMAGE = operand(2, 3, 5, 7)
HEADS = operand(2, 7, 3, 5).transpose(1, 2), operand(2, 3, 6, 5), operand(2, 3, 6, 4)
BINARY = [op for op, shape in shapes._SHAPES.items() if shape is shapes._broadcast]
OUT_OF_PLACE = [op for op in BINARY if not op._schema.is_mutable]
POINTWISE = [op for op, shape in shapes._SHAPES.items() if shape is shapes._same]
QUICK = [
    (aten.batch_norm.default, (operand(2, 3, 5), *[operand(3)] * 4, False, 0.1, 1e-5, True)),
    (aten.batch_norm.default, (operand(2, 3), None, None, operand(3), operand(3), False, 0.1, 1e-5, True)),
    (aten.layer_norm.default, (operand(2, 3, 5), [3, 5], operand(3, 5), None)),
    (aten.layer_norm.default, (operand(2, 7, 3, 5).permute(0, 2, 3, 1), [7], operand(7), operand(7))),
    (aten.group_norm.default, (operand(2, 6, 5), 3, operand(6), operand(6))),
    (aten.linear.default, (operand(2, 7, 3), operand(5, 3), operand(5))),
    (aten.linear.default, (operand(2, 3).double(), operand(5, 3).double())),
    (aten.mean.dim, (operand(2, 3, 5), [-1, 1])),
    (aten.mean.dim, (operand(2, 3, 5), [1, 2], True)),
    (aten.conv1d.default, (operand(2, 3, 7), operand(4, 3, 2))),
    (aten.conv2d.default, (IMAGE, operand(4, 3, 3, 2), None, [2, 1])),
    (aten.conv2d.default, (last(2, 3, 5, 7), operand(4, 3, 3, 2), operand(4))),
    (aten.conv3d.default, (operand(2, 3, 5, 7, 4), operand(4, 3, 3, 2, 1))),
    (aten.adaptive_avg_pool2d.default, (IMAGE, [1, 1])),
    (aten.adaptive_avg_pool2d.default, (IMAGE, [2, 3])),
    (aten.cat.default, ([operand(2, 3, 5), operand(2, 4, 5)], 1)),
    (aten.cat.default, ([operand(2, 3, 5), operand(2, 3, 7)], -1)),
    (aten.cat.default, ([operand(2, 3)],)),
    (aten.scaled_dot_product_attention.default, HEADS),
    *((op, (operand(2, 3, 5), operand(2, 3, 5))) for op in BINARY),
    *((op, (operand(2, 3, 5), 2)) for op in BINARY),
    *((op, (operand(2, 3, 5), operand(2, 1, 5))) for op in BINARY),
    *((op, (operand(2, 3, 5), operand(3, 1))) for op in BINARY),
    *((op, (operand(2, 3, 1), operand(2, 1, 5))) for op in OUT_OF_PLACE),
    *((op, (last(2, 3, 5, 7), last(2, 3, 5, 7))) for op in BINARY),
    *((op, (last(1, 3, 5, 7), operand(1, 3, 1, 1))) for op in BINARY),
    *((op, (last(2, 3, 5, 7), operand(3, 1, 1))) for op in BINARY),
    *((op, (last(2, 3, 5, 7), 2.0)) for op in BINARY),
    *((op, (x,)) for op in POINTWISE for x in (operand(2, 3, 5), last(2, 3, 5, 7), last(1, 3, 5, 7))),
]


def check(op, args, **kwargs):
    """`quick` knows the op, and says what the kernel says."""
    got, want = shapes.quick(op, args, kwargs), op(*args, **kwargs)
    assert (got.shape, got.stride(), got.dtype, got.device) == (want.shape, want.stride(), want.dtype, want.device)
    assert (got is args[0]) == op._schema.is_mutable


@pytest.mark.parametrize(("op", "args"), QUICK, ids=[str(op) for op, _ in QUICK])
def test_what_is_not_run_looks_as_if_it_had_been(op, args):
    check(op, args)


def test_every_op_that_is_not_run_is_tested():
    assert {op for op, _ in QUICK} == set(shapes._SHAPES)


def test_some_keywords_change_nothing():
    check(aten.add.Tensor, (IMAGE, IMAGE), alpha=2)
    check(aten.gelu.default, (IMAGE,), approximate="tanh")
    check(aten.scaled_dot_product_attention.default, HEADS, scale=0.5)


@given(
    rank=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    pad=st.integers(0, 2),
    gap=st.integers(1, 3),
    size=st.integers(1, 9),
)
def test_convolutions_have_the_sizes_of_their_kernel(rank, groups, kernel, stride, pad, gap, size):
    op = (aten.conv1d, aten.conv2d, aten.conv3d)[rank - 1].default
    operands = operand(2, 2 * groups, *range(size, size + rank)), operand(5 * groups, 2, *[kernel] * rank)
    args = (*operands, operand(5 * groups), [stride] * rank, [pad] * rank, [gap] * rank, groups)
    if size + 2 * pad < gap * (kernel - 1) + 1:
        assert shapes.quick(op, args, {}) is None
    else:
        check(op, args)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.linear.default, (operand(2, 4), operand(5, 3))),
        (aten.linear.default, (operand(2, 3), operand(5, 3), operand(4))),
        (aten.linear.default, (operand(2, 3).half(), operand(5, 3))),
        (aten.batch_norm.default, (operand(2, 3, 5), operand(4), *[operand(3)] * 3, False, 0.1, 1e-5, True)),
        (aten.layer_norm.default, (operand(2, 3), [4])),
        (aten.group_norm.default, (operand(2, 5, 3), 3)),
        (aten.gelu.default, (operand(2, 3).int(),)),
        (aten.add.Tensor, (operand(2, 3), operand(2, 3).double())),
        (aten.add.Tensor, (operand(2, 3), operand(2, 4))),
        (aten.add.Tensor, (operand(2, 3), operand(3, 2).t())),
        (aten.add.Tensor, (last(2, 3, 5, 7), IMAGE)),
        (aten.add_.Tensor, (operand(2, 1), operand(2, 3))),
        (aten.mean.dim, (operand(2, 3), None)),
        (aten.gelu.default, (operand(2, 3).t(),)),
        (aten.relu.default, (last(2, 1, 5, 7).transpose(2, 3),)),
        (aten.conv2d.default, (IMAGE, operand(4, 2, 3, 3))),
        (aten.conv2d.default, (IMAGE, operand(4, 3, 3, 3), operand(5))),
        (aten.conv2d.default, (IMAGE, operand(4, 3, 3, 3).double())),
        (aten.conv2d.default, (operand(3, 5, 7), operand(4, 3, 3, 3))),
        (aten.cat.default, ([operand(2, 3), operand(2, 3, 5)], 1)),
        (aten.cat.default, ([operand(2, 3), operand(4, 5)], 1)),
        (aten.cat.default, ([operand(2, 3), operand(2, 3).double()], 1)),
        (aten.cat.default, ([operand(2, 3)], 2)),
        (aten.scaled_dot_product_attention.default, (IMAGE, operand(2, 1, 6, 7), operand(2, 1, 6, 4))),
        (aten.scaled_dot_product_attention.default, (IMAGE, operand(2, 3, 6, 4), operand(2, 3, 6, 4))),
        (aten.scaled_dot_product_attention.default, (*HEADS, operand(7, 6))),
    ],
)
def test_what_does_not_fit_is_left_to_the_kernel(op, args):
    assert shapes.quick(op, args, {}) is None


def test_a_keyword_that_changes_the_type_is_left_to_the_kernel():
    assert shapes.quick(aten.mean.dim, (IMAGE, [1]), {"dtype": torch.float64}) is None
