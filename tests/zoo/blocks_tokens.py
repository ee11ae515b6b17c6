"""Blocks over the map as 16 tokens: attention of all kinds, recurrent layers, experts, scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.blocks_map import SIDE, Block

TOKENS_IN_MAP = SIDE * SIDE


class Tokens(Block):
    """Something over tokens, run on a map."""

    def __init__(self, inner: Block, add: bool = False) -> None:
        super().__init__(inner.out)
        self.inner, self.add = inner, add

    def forward(self, x):
        b, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        y = self.inner(tokens)
        if self.add:
            y = tokens + y
        return y.transpose(1, 2).reshape(b, -1, h, w)


class FusedAttention(Block):
    """Queries, keys and values from one layer."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.heads = 2
        self.qkv, self.proj = nn.Linear(width, 3 * 2 * factor), nn.Linear(2 * factor, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Attention(Block):
    """Queries, keys and values from layers of their own; what varies is how they meet.

    Args:
        width: in and out.
        factor: half the size of a head.
        kv_heads: heads of the keys and values; there are four of the queries.
        causal: each token sees those before it.
    """

    def __init__(self, width: int, factor: int, kv_heads: int = 4, causal: bool = False) -> None:
        super().__init__(width)
        self.heads, self.kv_heads, self.head_dim, self.causal = 4, kv_heads, 2 * factor, causal
        self.q = nn.Linear(width, self.heads * self.head_dim)
        self.k, self.v = (nn.Linear(width, kv_heads * self.head_dim) for _ in range(2))
        self.proj = nn.Linear(self.heads * self.head_dim, width, bias=False)

    def meet(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.kv_heads != self.heads)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        return self.proj(self.meet(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Repeated(Attention):
    """Grouped queries, with keys and values repeated as in Llama."""

    def meet(self, q, k, v):
        b, h, n, d = k.shape
        times = self.heads // self.kv_heads
        k, v = (t[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d) for t in (k, v))
        return (q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1) @ v


class Rotary(Attention):
    """Positions turn pairs of channels: halves of a head, or neighbours."""

    def __init__(self, width: int, factor: int, interleaved: bool) -> None:
        super().__init__(width, factor)
        self.interleaved = interleaved
        angles = torch.outer(torch.arange(TOKENS_IN_MAP), 10.0 ** -torch.arange(factor))
        angles = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat([angles, angles], dim=1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turned(self, x):
        if self.interleaved:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        else:
            a, b = x.chunk(2, dim=-1)
            other = torch.cat([-b, a], dim=-1)
        return x * self.cos + other * self.sin

    def meet(self, q, k, v):
        return super().meet(self.turned(q), self.turned(k), v)


class Relative(Attention):
    """A learned bias for every head and distance on the map."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width, factor)
        self.table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, self.heads))
        place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + SIDE - 1
        self.register_buffer("index", apart[0] * (2 * SIDE - 1) + apart[1])

    def meet(self, q, k, v):
        n = q.shape[2]
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        weights = q * self.head_dim**-0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return weights.softmax(-1) @ v


class Cosine(Attention):
    """Swin v2: unit queries and keys, a learned temperature for every head."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width, factor)
        self.temperature = nn.Parameter(torch.log(10 * torch.ones(self.heads, 1, 1)))

    def meet(self, q, k, v):
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (weights * torch.clamp(self.temperature, max=4.6).exp()).softmax(-1) @ v


class LinearAttention(Attention):
    """Features of queries and keys; nothing of the size tokens x tokens."""

    def meet(self, q, k, v):
        q, k = (F.elu(t) + 1 for t in (q, k)) if self.causal else (F.relu(q), F.relu(k))
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-3
        return torch.einsum("bhnd,bhde->bhne", q, context) / total.unsqueeze(-1)


class Window(Block):
    """Attention in windows of 2 x 2, over a map that is rolled by one."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.size, self.inner = 2, FusedAttention(width, factor)

    def forward(self, x):
        b, n, c = x.shape
        s, k = self.size, SIDE // self.size
        x = torch.roll(x.view(b, SIDE, SIDE, c), shifts=(-1, -1), dims=(1, 2))
        windows = x.view(b, k, s, k, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b * k * k, s * s, c)
        y = self.inner(windows).view(b, k, k, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, SIDE, SIDE, c)
        return torch.roll(y, shifts=(1, 1), dims=(1, 2)).reshape(b, n, c)


class Multihead(Block):
    """nn.MultiheadAttention over itself, or with keys and values of another width."""

    def __init__(self, width: int, factor: int, across: bool = False) -> None:
        super().__init__(2 * (factor + 1))
        sizes = {"kdim": width, "vdim": width} if across else {}
        self.across, self.enter = across, nn.Linear(width, self.out)
        self.attention = nn.MultiheadAttention(self.out, 2, batch_first=True, **sizes)

    def forward(self, x):
        q = self.enter(x)
        return q + self.attention(q, x if self.across else q, x if self.across else q, need_weights=self.across)[0]


class Encoder(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * (factor + 1))
        self.enter = nn.Linear(width, self.out)
        first = factor % 2 == 0
        self.layer = nn.TransformerEncoderLayer(self.out, 2, factor + 3, batch_first=True, norm_first=first)

    def forward(self, x):
        return self.layer(self.enter(x))


class Queries(Block):
    """Three learned queries read the tokens; what they found gates every token."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.queries = nn.Parameter(torch.randn(1, 3, factor + 1))
        self.k, self.v = nn.Linear(width, factor + 1), nn.Linear(width, factor + 2)
        self.leave = nn.Linear(factor + 2, width)

    def forward(self, x):
        found = F.scaled_dot_product_attention(self.queries.expand(x.shape[0], -1, -1), self.k(x), self.v(x))
        return x * torch.sigmoid(self.leave(found).mean(1, keepdim=True))


class Recurrent(Block):
    def __init__(self, kind: type[nn.RNNBase], width: int, factor: int, **options) -> None:
        projected = options.get("proj_size", 0)
        hidden = factor + 2 + 2 * projected
        super().__init__((projected or hidden) * (1 + options.get("bidirectional", False)))
        self.rnn = kind(width, hidden, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x)[0]


class Gated(Block):
    """A gated perceptron, as in Llama."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.gate, self.up = (nn.Linear(width, 3 * factor, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * factor, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(Block):
    """Experts mixed by softmax gates: all of them, or the best two of every token by index_add."""

    def __init__(self, width: int, factor: int, best: bool = False) -> None:
        super().__init__(width)
        self.best, self.gate = best, nn.Linear(width, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * factor), nn.GELU(), nn.Linear(2 * factor, width)) for _ in range(3)
        )

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        if not self.best:
            return torch.einsum("bne,ebnc->bnc", gates, torch.stack([expert(x) for expert in self.experts]))
        b, n, c = x.shape
        flat, rows = x.reshape(b * n, c), torch.arange(b * n)
        weights, chosen = gates.reshape(b * n, -1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            share = (weights * (chosen == e)).sum(-1, keepdim=True)
            y.index_add_(0, rows, expert(flat) * share)
        return y.view(b, n, c)


class PackedExperts(Block):
    """Experts in one tensor for each layer, as in Mixtral; the gates of all but the best two are zero."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.gate = nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(3, width, 2 * factor) / 2)
        self.down = nn.Parameter(torch.randn(3, 2 * factor, width) / 2)

    def forward(self, x):
        logits = self.gate(x)
        values, chosen = logits.topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1))
        inner = F.silu(torch.einsum("bnc,ech->ebnh", x, self.up))
        return torch.einsum("ebnh,ehc,bne->bnc", inner, self.down, gates)


class Mamba(Block):
    """A selective state space, its scan as a loop over the tokens."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.inner, self.state, self.rank = 2 * factor, 3, factor
        self.enter = nn.Linear(width, 2 * self.inner)
        self.conv = nn.Conv1d(self.inner, self.inner, 3, padding=2, groups=self.inner)
        self.select = nn.Linear(self.inner, self.rank + 2 * self.state)
        self.step = nn.Linear(self.rank, self.inner)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, self.state + 1)).repeat(self.inner, 1))
        self.skip, self.leave = nn.Parameter(torch.ones(self.inner)), nn.Linear(self.inner, width)

    def forward(self, x):
        x, z = self.enter(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.select(x).split([self.rank, self.state, self.state], dim=-1)
        step = F.softplus(self.step(step))
        fades = torch.exp(step.unsqueeze(-1) * -torch.exp(self.decay))
        given = (step * x).unsqueeze(-1) * b.unsqueeze(2)
        state, seen = torch.zeros_like(given[:, 0]), []
        for t in range(TOKENS_IN_MAP):
            state = fades[:, t] * state + given[:, t]
            seen.append((state * c[:, t].unsqueeze(1)).sum(-1))
        return self.leave((torch.stack(seen, dim=1) + self.skip * x) * F.silu(z))


class Cumulative(Block):
    """Sums over the tokens so far of keys times values, read by queries."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.qkv, self.leave = nn.Linear(width, 3 * (factor + 1)), nn.Linear(factor + 1, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = torch.exp(k.clamp(max=2.0))
        return self.leave(torch.sigmoid(q) * torch.cumsum(k * v, dim=1) / torch.cumsum(k, dim=1))


class Tied(Block):
    """Scores of seven words, and the mean of the words by them: one embedding read both ways."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(factor + 1)
        self.enter, self.words = nn.Linear(width, factor + 1), nn.Embedding(7, factor + 1)

    def forward(self, x):
        scores = F.linear(self.enter(x), self.words.weight)
        return scores.softmax(-1) @ self.words.weight + self.words(scores.argmax(-1))


class Bilinear(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.other, self.pair = nn.Linear(width, factor + 1), nn.Bilinear(width, factor + 1, 2 * factor)

    def forward(self, x):
        return self.pair(x, torch.tanh(self.other(x)))


def _recurrent(kind: type[nn.RNNBase], **options) -> Callable[[int, int], nn.Module]:
    return lambda w, f: Tokens(Recurrent(kind, w, f, **options))


TOKENS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "attention": lambda w, f: Tokens(FusedAttention(w, f), add=True),
    "sdpa": lambda w, f: Tokens(Attention(w, f, causal=True), add=True),
    "sdpa gqa": lambda w, f: Tokens(Attention(w, f, kv_heads=2), add=True),
    "repeated gqa": lambda w, f: Tokens(Repeated(w, f, kv_heads=2), add=True),
    "rope halves": lambda w, f: Tokens(Rotary(w, f, interleaved=False), add=True),
    "rope interleaved": lambda w, f: Tokens(Rotary(w, f, interleaved=True), add=True),
    "relative bias": lambda w, f: Tokens(Relative(w, f), add=True),
    "cosine attention": lambda w, f: Tokens(Cosine(w, f), add=True),
    "linear attention": lambda w, f: Tokens(LinearAttention(w, f), add=True),
    "elu attention": lambda w, f: Tokens(LinearAttention(w, f, causal=True), add=True),
    "window": lambda w, f: Tokens(Window(w, f), add=True),
    "multihead": lambda w, f: Tokens(Multihead(w, f)),
    "multihead across": lambda w, f: Tokens(Multihead(w, f, across=True)),
    "encoder layer": lambda w, f: Tokens(Encoder(w, f)),
    "learned queries": lambda w, f: Tokens(Queries(w, f)),
    "lstm": _recurrent(nn.LSTM),
    "lstm projected": _recurrent(nn.LSTM, proj_size=2, num_layers=2),
    "lstm both ways": _recurrent(nn.LSTM, bidirectional=True, num_layers=2),
    "gru": _recurrent(nn.GRU, num_layers=2),
    "gru both ways": _recurrent(nn.GRU, bidirectional=True),
    "rnn": _recurrent(nn.RNN, nonlinearity="relu", num_layers=2, bidirectional=True),
    "swiglu": lambda w, f: Tokens(Gated(w, f), add=True),
    "experts": lambda w, f: Tokens(Experts(w, f), add=True),
    "best experts": lambda w, f: Tokens(Experts(w, f, best=True), add=True),
    "packed experts": lambda w, f: Tokens(PackedExperts(w, f), add=True),
    "mamba": lambda w, f: Tokens(Mamba(w, f), add=True),
    "cumulative": lambda w, f: Tokens(Cumulative(w, f), add=True),
    "tied": lambda w, f: Tokens(Tied(w, f)),
    "bilinear": lambda w, f: Tokens(Bilinear(w, f)),
}
"""(width, factor) to a module with the width `out`; the factor sets the inner widths."""
