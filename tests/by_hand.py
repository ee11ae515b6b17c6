"""What data says about channels, computed from explicit masks and materialised inputs: slow, short, and independent."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

import graphprune as gp
from tests.nets import randomised


def coupled(model, *inputs, **options):
    """The model in float64 with no value left at zero, and its coupling; a mapping stands for keyword arguments."""
    model = randomised(model).double()
    example = gp.Inputs.of(inputs[0] if isinstance(inputs[0], dict) else inputs)
    return model, gp.couple(
        gp.trace(model, example.map(lambda t: t.double() if t.is_floating_point() else t)), **options
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, size=8, channels=3, seed=0):
    return torch.randn(count, channels, size, size, generator=generator(seed)).double()


def labels(count, classes=5):
    return torch.arange(count) * 3 % classes


def everywhere(mask):
    return mask


def along(dim, spread=everywhere):
    """Which dim of a weight the mask multiplies, and how its positions follow from those of the channels."""
    return dim, spread


def brute_force(model, masked, size, samples, loss):
    """Derivatives of each sample's loss by a mask on all inputs of all consumers of a group, (samples, channels).

    `masked` says by hand which dims of which weights the mask multiplies: W (m x) is (W m) x.
    """
    state = dict(model.named_parameters())

    def masked_loss(mask, sample):
        weights = {}
        for name, (dim, spread) in masked.items():
            shape = [-1 if d == dim else 1 for d in range(state[name].dim())]
            weights[name] = state[name].detach() * spread(mask).reshape(shape)
        return loss(torch.func.functional_call(model, weights, sample[:-1]), sample[-1])

    rows = []
    for sample in samples:
        mask = torch.ones(size, dtype=torch.float64, requires_grad=True)
        rows.append(torch.autograd.grad(masked_loss(mask, sample), mask)[0])
    return torch.stack(rows)


def singly(batches, sample_dim=0):
    """Every sample of every batch as a batch of one."""
    return [
        tuple(t.narrow(sample_dim if t.is_floating_point() else 0, n, 1) for t in batch)
        for batch in batches
        for n in range(batch[-1].shape[0])
    ]


def part(start, size, total):
    """Channels that are one run of a dim."""
    return lambda mask: torch.cat([mask.new_ones(start), mask, mask.new_ones(total - start - size)])


def rows_of(x, conv):
    """The unfolded input of a convolution, one row per output position and per group: (groups, rows, columns)."""
    columns = conv.in_channels // conv.groups
    kernel = conv.weight.shape[2:]
    rank = len(kernel)
    if conv.padding == "same":
        pads = [d * (k - 1) for d, k in zip(conv.dilation, kernel, strict=True)]
        x = F.pad(x, [n for p in reversed(pads) for n in (p // 2, p - p // 2)])
    elif conv.padding != "valid":
        x = F.pad(x, [p for p in reversed(conv.padding) for _ in range(2)])
    taps = torch.cartesian_prod(*(torch.arange(k) for k in kernel)).view(-1, rank)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], conv.dilation, kernel, conv.stride, strict=True)
    ]
    read = []
    for tap in taps.tolist():
        cut = x
        for d in range(rank):
            start = tap[d] * conv.dilation[d]
            cut = cut.narrow(2 + d, start, (sizes[d] - 1) * conv.stride[d] + 1)
            cut = cut.index_select(2 + d, torch.arange(sizes[d]) * conv.stride[d])
        read.append(cut)
    stacked = torch.stack(read, 2)  # (samples, channels, taps, positions...)
    split = stacked.reshape(len(x), conv.groups, columns * len(taps), math.prod(sizes))
    return split.permute(1, 0, 3, 2).flatten(1, 2)
