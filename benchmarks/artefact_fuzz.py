"""Artefacts broken in thousands of ways: each must load or be refused with graphprune's own error, and do nothing else.

    python benchmarks/artefact_fuzz.py                         # 10 000 of them, to results/artefact_fuzz.json
    python benchmarks/artefact_fuzz.py --count 500 --seed 7

Three artefacts are the start: a convolutional net, one whose attention is grafted, and a language model with tied
weights. Number k is broken in a way that follows from the seed and k:

  cut       a file ends early, or goes on
  flip      bits of a file are flipped, or a stretch of it is overwritten; the place runs through all files evenly
  resealed  the same, and the hashes are made to fit again, so that the damage is met behind them
  json      a value somewhere in the structure, the graph or the manifest is replaced by another, taken away, or
            exchanged, and the hashes are made to fit
  header    the same to the header of the weights

Each is loaded into the class, as a graph module, and with the weights of the model. Counted are those that loaded in
all ways, those that were refused, and anything else: another exception, code that ran from elsewhere than what
graphprune writes for checked calls, a file opened for writing, a process, a class looked up for a pickle. The process
stays below a limit of memory, and the most that it held is recorded.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune as gp
from graphprune.artefact import store

RESULTS = Path(__file__).parent / "results"
Files = dict[str, bytes]
"""Content by kind: "manifest", "structure", "graph" and "weights"."""
LIMIT = 6 << 30
"""Bytes of address space that the process may use."""


# -- where it starts ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """States its width, so that it is grafted; makes a table."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 4, nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).softmax(-1) * torch.tensor([1.0, 0.5, 2.0, 1.5]).view(4, 1, 1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, c))


class Language(nn.Module):
    """Tied embeddings, a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(1, 2, 10), persistent=False)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        return {"logits": self.head(self.norm(x + self.down(self.up(x).relu() * self.scale)))}


def convolutional() -> nn.Module:
    """Convolutions and a batch norm."""
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(7, 5)).eval()


def attentive() -> nn.Module:
    """One grafted block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), Attention(), nn.Linear(12, 5)).eval()


def language() -> nn.Module:
    """A language model."""
    torch.manual_seed(0)
    return Language().eval()


STARTS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "convolutional": (convolutional, torch.rand(2, 3, 9, 9)),
    "attentive": (attentive, torch.rand(2, 3, 5)),
    "language": (language, torch.tensor([[1, 2, 3], [4, 5, 6]])),
}


def files_of(directory: Path) -> Files:
    """The files of an artefact."""
    entries = store.manifest(directory).entries
    return {"manifest": (directory / store.MANIFEST).read_bytes()} | {
        kind: (directory / entry.name).read_bytes() for kind, entry in entries.items()
    }


def saved(name: str) -> Files:
    """An artefact of one of the networks that it starts from."""
    make, inputs = STARTS[name]
    with tempfile.TemporaryDirectory() as directory:
        gp.save(gp.prune(make(), inputs, target=gp.Target(channels=0.5)), directory)
        return files_of(Path(directory))


def write(files: Files, directory: Path, *, reseal: bool) -> None:
    """Write files as an artefact; `reseal` makes names and hashes fit what is in them."""
    text = files["manifest"]
    manifest: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        manifest = json.loads(text)
    stated = manifest.get("files") if isinstance(manifest, dict) else None
    for kind, suffix in store.SUFFIXES.items():
        if kind in files:
            sha256 = hashlib.sha256(files[kind]).hexdigest()
            said = stated.get(kind) if isinstance(stated, dict) else None
            if reseal and isinstance(said, dict):
                said.update(sha256=sha256, bytes=len(files[kind]))
            name = said.get("sha256") if isinstance(said, dict) else None
            start = name[:16] if isinstance(name, str) else sha256[:16]
            (directory / f"{kind}-{start if start.isalnum() else sha256[:16]}{suffix}").write_bytes(files[kind])
    if reseal and isinstance(manifest, dict):
        manifest.pop("sha256", None)
        text = json.dumps({**manifest, "sha256": store.digest(manifest)}).encode()
    (directory / store.MANIFEST).write_bytes(text)


# -- ways to break it --------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**63 - 1, 2**64, -(2**63), 10**30, 0.5, -1.5, 1e308),
    *("", "x", "self", "..", "../../etc/passwd", "/", "\x00", "\ud800", "__class__", "__import__('os').system('id')"),
    *(
        "forward",
        "training",
        "weight",
        "a.b.c",
        "0",
        "x" * 5000,
        "(lambda: 1)()",
        'a"]\nimport os',
        "float32",
        "aten.add.Tensor",
    ),
    *("aten.from_file.default", "os.system.default", "aten.set_.source_Storage", "higher_order.cond", "assert"),
    *([], {}, [[]], [1, 2, 3], {"name": "x"}, {"self": "training"}, {"call": "aten.relu.default", "args": []}),
    *({"call": "item", "args": [{"name": "x"}, 0]}, {"float": "nan"}, {"device": "cuda:0"}, {"graph": ""}),
)
NESTED = b"[" * 100_000
"""JSON that a parser which recurses runs out of stack on."""


def broken_bytes(content: bytes, chance: random.Random, place: float) -> bytes:
    """Bits flipped or a stretch overwritten near a place in [0, 1)."""
    data = bytearray(content)
    at = int(place * len(data))
    kind = chance.randrange(4)
    if kind == 0:
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[min(len(data) - 1, at + chance.randrange(16))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        data[at : at + chance.choice((1, 4, 8, 64))] = chance.randbytes(chance.choice((1, 4, 8, 64)))
    elif kind == 2:
        data[at : at + 8] = struct.pack("<Q", chance.choice((0, 1, len(data), 2**32, 2**63, 2**64 - 1)))
    else:
        del data[at : at + chance.choice((1, 8, 100))]
    return bytes(data)


def cut(content: bytes, chance: random.Random) -> bytes:
    """Shorter at any place, or longer."""
    if chance.random() < 0.2:
        return content + chance.randbytes(chance.choice((1, 8, 1000)))
    return content[: chance.randrange(len(content))]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in the data, and a key or an index of it."""
    rest = [data]
    while rest:
        held = rest.pop()
        items = list(held.items() if isinstance(held, dict) else enumerate(held))
        for key, value in items:
            yield held, key
            if isinstance(value, (dict, list)):
                rest.append(value)


def broken_json(content: bytes, chance: random.Random) -> bytes:
    """One or a few values replaced, taken away, doubled or exchanged."""
    if chance.random() < 0.01:
        return NESTED
    data = json.loads(content)
    for _ in range(chance.choice((1, 1, 1, 3))):
        every = list(places(data))
        held, key = chance.choice(every)
        other, other_key = chance.choice(every)
        kind = chance.randrange(5)
        if kind == 0 and isinstance(held, dict):
            del held[key]
        elif kind == 1 and isinstance(held, list):
            held.insert(chance.randrange(len(held) + 1), copy.deepcopy(held[key]))
        elif kind == 2 and isinstance(held, dict):
            held[str(chance.choice(ODD))] = held.pop(key)
        elif kind == 3:
            held[key] = copy.deepcopy(other[other_key])
        else:
            held[key] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(data).encode("utf-8", "surrogatepass")


def broken_header(content: bytes, chance: random.Random) -> bytes:
    """The weights with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = broken_json(content[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


WAYS = ("cut", "flip", "resealed", "json", "json", "json", "json", "header")


def broken(files: Files, number: int, seed: int) -> tuple[str, Files, bool]:
    """The way in which artefact `number` is broken, its files, and whether its hashes fit."""
    chance = random.Random(f"{seed} {number}")
    way = WAYS[number % len(WAYS)]
    kinds = sorted(files)
    kind = kinds[number // len(WAYS) % len(kinds)]
    if way == "cut":
        return way, files | {kind: cut(files[kind], chance)}, False
    if way in ("flip", "resealed"):
        place = number * 0.6180339887 % 1  # evenly over the file
        return way, files | {kind: broken_bytes(files[kind], chance, place)}, way == "resealed"
    if way == "header":
        return way, files | {"weights": broken_header(files["weights"], chance)}, True
    kind = chance.choice(("structure", "structure", "graph", "graph", "manifest"))
    return way, files | {kind: broken_json(files[kind], chance)}, True


# -- what comes of it --------------------------------------------------------------------------------------------


class Watch:
    """Notes what Python does that loading has no business doing; audit hooks stay, so there is one per process."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and (said := _forbidden(event, args)):
            self.seen.append(said)


def _forbidden(event: str, args: tuple[Any, ...]) -> str:
    if event == "exec" and not args[0].co_filename.startswith(("<graft of", "<eval_with_key>", "<string>", "<frozen")):
        return f"exec {args[0].co_filename}" if "site-packages" not in args[0].co_filename else ""
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        return f"open {args[0]} {args[1]}"
    risky = ("os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.fork", "socket.", "os.remove", "os.rename")
    return event if event.startswith((*risky, "shutil.", "pickle.find_class", "ctypes.dlopen")) else ""


def outcome(name: str, directory: Path, watch: Watch) -> str:
    """What comes of loading: "loaded", "refused", or what went wrong."""
    make, _ = STARTS[name]
    model = make()
    refused = False
    watch.seen, watch.on = [], True
    try:
        for how in ({"model": model}, {}, {"model": model, "weights": "model"}):
            try:
                gp.load(directory, **how)  # type: ignore[arg-type]
            except gp.ArtefactError:
                refused = True
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        watch.on = False
    if watch.seen:
        return f"did {watch.seen[0]}"
    return "refused" if refused else "loaded"


def main() -> None:
    """Break and load; the exit status is 1 if anything else happened than loading and refusing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    starts = {name: saved(name) for name in STARTS}
    watch, names = Watch(), list(STARTS)
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    before, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for number in range(args.count):
        name = names[number % len(names)]
        way, files, reseal = broken(starts[name], number // len(names), args.seed)
        with tempfile.TemporaryDirectory() as directory:
            write(files, Path(directory), reseal=reseal)
            start = time.perf_counter()
            found = outcome(name, Path(directory), watch)
            longest = max(longest, time.perf_counter() - start)
        if found not in ("loaded", "refused"):
            wrong.append(f"{number}, {name}, {way}: {found}")
            print(wrong[-1], flush=True)
        counts[f"{way}: {found if found in ('loaded', 'refused') else 'wrong'}"] += 1
    result = {
        "versions": {"graphprune": gp.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "count": args.count,
        "seed": args.seed,
        "counts": dict(sorted(counts.items())),
        "wrong": wrong,
        "longest_s": longest,
        "peak_growth_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "address_space_limit_bytes": LIMIT,
    }
    (args.out / "artefact_fuzz.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
