"""Networks used by several tests, written here."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every scale, shift and statistic a value: zero-initialised ones would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.uniform_(0.3, 1.0, generator=generator)
            elif parameter.std(correction=0) < 1e-3:
                parameter.normal_(0, 0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


class PaddedBlock(nn.Module):
    """Two convolutions; a wider block subsamples its shortcut and pads it with zero channels (option A)."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.added = (planes - channels) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32 x 32 images."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for k, (channels, planes, stride) in enumerate(widths, start=1):
            first = PaddedBlock(channels, planes, stride)
            rest = [PaddedBlock(planes, planes, 1) for _ in range(n - 1)]
            setattr(self, f"layer{k}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class UNet(nn.Module):
    """Down, up by transposed convolution, skips by concatenation."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down1, self.down2 = self._double(3, width), self._double(width, 2 * width)
        self.middle = self._double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.back2 = self._double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.back1 = self._double(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _double(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)),
            *(nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)),
        )

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.middle(F.max_pool2d(b, 2)))
        y = self.up1(self.back2(torch.cat([y, b], dim=1)))
        return self.head(self.back1(torch.cat([y, a], dim=1)))


class DenseBlock(nn.Module):
    """Layers that each see everything before them, concatenated."""

    def __init__(self, depth: int, growth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        layers = [nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, growth, 3, padding=1, bias=False))
                  for c in range(width, width + depth * growth, growth)]  # fmt: skip
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width + depth * growth, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return self.head(torch.cat(features, dim=1).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with fused q, k and v, sizes kept as attributes."""

    def __init__(self, width: int = 30, heads: int = 5, head_dim: int = 6) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)
        self.scale = head_dim**-0.5

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.head_dim))
