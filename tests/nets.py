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


class TinyViT(nn.Module):
    """Patches, one attention block with 3 heads of 4 dims, one MLP."""

    def __init__(self, attention=None):
        super().__init__()
        self.patch = nn.Conv2d(3, 10, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, 10))
        self.norm1, self.norm2 = nn.LayerNorm(10), nn.LayerNorm(10)
        self.attention = attention or Attention(10, 3, 4)
        self.mlp = nn.Sequential(nn.Linear(10, 7), nn.GELU(), nn.Linear(7, 10))
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        x = self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Apart(nn.Module):
    """Attention with q, k and v apart and heads merged into the batch for `bmm`; v has dims of its own."""

    def __init__(self, width=10, heads=3, dim=4, vdim=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (
            nn.Linear(width, heads * dim),
            nn.Linear(width, heads * dim),
            nn.Linear(width, heads * vdim),
        )
        self.proj = nn.Linear(heads * vdim, width)

    def split(self, x):
        b, n, c = x.shape
        return x.reshape(b, n, self.heads, c // self.heads).transpose(1, 2).reshape(b * self.heads, n, c // self.heads)

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        b, n, _ = x.shape
        return x + self.proj(y.reshape(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, -1))


class ConvUnit(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, i: int, o: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions and the input."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = ConvUnit(channels, channels, 3), ConvUnit(channels, channels, 3), shortcut

    def forward(self, x):
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """Two halves; a chain of bottlenecks starts from the second; all of them concatenated."""

    def __init__(self, i: int, o: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvUnit(i, o), ConvUnit((2 + depth) * (o // 2), o)
        self.m = nn.ModuleList(Bottleneck(o // 2, shortcut) for _ in range(depth))

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(m(parts[-1]) for m in self.m)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three poolings in a row, concatenated with what they pool."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvUnit(i, i // 2), ConvUnit(2 * i, o)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.cv1(x)
        a = self.pool(x)
        b = self.pool(a)
        return self.cv2(torch.cat([x, a, b, self.pool(b)], 1))


class DecoupledHead(nn.Module):
    """Per scale one branch for boxes and one for classes; each side of a box is the mean of a distribution over bins."""

    def __init__(self, widths: tuple[int, ...], classes: int = 5, bins: int = 16, inner: int = 12) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.cv2 = nn.ModuleList(self._branch(w, inner, 4 * bins) for w in widths)
        self.cv3 = nn.ModuleList(self._branch(w, inner + 2, classes) for w in widths)
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    @staticmethod
    def _branch(i: int, inner: int, o: int) -> nn.Sequential:
        return nn.Sequential(ConvUnit(i, inner, 3), ConvUnit(inner, inner, 3), nn.Conv2d(inner, o, 1))

    def forward(self, maps):
        b, outputs = maps[0].shape[0], 4 * self.bins + self.classes
        found = [torch.cat([box(x), kind(x)], 1) for x, box, kind in zip(maps, self.cv2, self.cv3, strict=True)]
        found = torch.cat([x.view(b, outputs, -1) for x in found], 2)
        sides, scores = found.split([4 * self.bins, self.classes], 1)
        sides = sides.view(b, 4, self.bins, -1).transpose(2, 1).softmax(1)
        return torch.cat([self.dfl(sides).view(b, 4, -1), scores.sigmoid()], 1)


class Yolo(nn.Module):
    """Backbone, pyramid up and down again, and a decoupled head on three scales."""

    def __init__(self, w: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvUnit(3, w, 3, 2), ConvUnit(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, 1, True))
        self.p3 = nn.Sequential(ConvUnit(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, depth, True))
        self.p4 = nn.Sequential(ConvUnit(4 * w, 6 * w, 3, 2), C2f(6 * w, 6 * w, depth, True))
        self.p5 = nn.Sequential(ConvUnit(6 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 1, True), SPPF(8 * w, 8 * w))
        self.up = nn.Upsample(scale_factor=2)
        self.up4, self.up3 = C2f(14 * w, 6 * w, 1, False), C2f(10 * w, 4 * w, 1, False)
        self.to4, self.to5 = ConvUnit(4 * w, 4 * w, 3, 2), ConvUnit(6 * w, 6 * w, 3, 2)
        self.down4, self.down5 = C2f(10 * w, 6 * w, 1, False), C2f(14 * w, 8 * w, 1, False)
        self.head = DecoupledHead((4 * w, 6 * w, 8 * w))

    def forward(self, x):
        c3 = self.p3(self.stem(x))
        c4 = self.p4(c3)
        c5 = self.p5(c4)
        n4 = self.up4(torch.cat([self.up(c5), c4], 1))
        n3 = self.up3(torch.cat([self.up(n4), c3], 1))
        m4 = self.down4(torch.cat([self.to4(n3), n4], 1))
        m5 = self.down5(torch.cat([self.to5(m4), c5], 1))
        return self.head([n3, m4, m5])
