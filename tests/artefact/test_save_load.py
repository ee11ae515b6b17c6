"""What is saved comes back: in the class, without it, with other weights, in another process."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import graphprune as gp
from graphprune.rewrite.graft import source_of
from graphprune.trace import held, run
from tests.nets import CifarResNet, TinyViT, UNet, randomised

HALF = gp.Target(channels=0.5)


class Stock(nn.Module):
    """States its width and its table of numbers in Python, so that it is grafted, and takes optional arguments."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.proj = 5, nn.Linear(15, 45), nn.Linear(15, 15)

    def forward(self, x, mask=None, *, scale=0.5):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * scale).softmax(-1) * torch.linspace(1, 2, 5).view(5, 1, 1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Tied(nn.Module):
    """One tensor under two names, a frozen one, a buffer that no state dict has, a tensor that is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head.weight = self.embed.weight
        self.up.bias.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(1, 2, 10), persistent=False)
        self.shift = torch.linspace(0, 1, 10)

    def forward(self, tokens):
        x = self.embed(tokens)
        return {"logits": self.head(x + self.down(F.relu(self.up(x) + self.shift) * self.scale)), "hidden": (x, None)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 10, 2, batch_first=True), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def stock():
    return nn.Sequential(nn.Linear(7, 15), Stock(), nn.Linear(15, 7))


NETS = {
    "convolutions": (lambda: CifarResNet(1), torch.rand(1, 3, 16, 16)),
    "unet": (UNet, torch.rand(1, 3, 16, 16)),
    "vit": (TinyViT, torch.rand(1, 3, 8, 8)),
    "graft": (stock, torch.rand(2, 3, 7)),
    "tied": (Tied, torch.tensor([[1, 2, 3], [4, 5, 6]])),
    "lstm": (Recurrent, torch.rand(2, 5, 3)),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 2)),
        torch.rand(2, 3),
    ),
}


def pruned(name, **options):
    make, inputs = NETS[name]
    torch.manual_seed(0)
    model = randomised(make()).eval()
    result = gp.prune(model, inputs, target=HALF, **options)
    assert result.plan.removed > 0
    return model, inputs, result


def fresh(name):
    torch.manual_seed(1)
    return NETS[name][0]()


def same(first, second, inputs):
    want, got = (run(m, gp.Inputs.of(inputs)) for m in (first, second))
    return len(want) == len(got) > 0 and all(map(torch.equal, want, got))


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_instance_of_the_class_gets_sizes_weights_and_modes(name, tmp_path):
    _, inputs, result = pruned(name)
    gp.save(result, tmp_path)
    instance = fresh(name)
    before = {k: v.clone() for k, v in held(instance)}
    small = gp.load(tmp_path, instance)
    assert type(small) is type(result.model) or source_of(result.model)
    assert same(result.model, small, inputs)
    assert not small.training
    assert [(k, v.shape, v.requires_grad) for k, v in held(small)] == [
        (k, v.shape, v.requires_grad) for k, v in held(result.model)
    ]
    assert list(small.state_dict()) == list(result.model.state_dict())
    assert instance.training
    assert all(torch.equal(v, before[k]) for k, v in held(instance))


@pytest.mark.parametrize("name", NETS)
def test_without_the_class_a_graph_module_gives_the_same(name, tmp_path):
    _, inputs, result = pruned(name)
    gp.save(result, tmp_path)
    small = gp.load(tmp_path)
    assert isinstance(small, torch.fx.GraphModule)
    assert same(result.model, small, inputs)
    assert small.state_dict().keys() >= {k for k, v in result.model.state_dict().items() if "tracked" not in k}
    assert same(small, pickle.loads(pickle.dumps(small)), inputs)
    assert same(small, copy.deepcopy(small), inputs)


@pytest.mark.parametrize("name", ["convolutions", "graft", "vit"])
def test_an_instance_on_the_meta_device_is_enough(name, tmp_path):
    _, inputs, result = pruned(name)
    gp.save(result, tmp_path)
    with torch.device("meta"):
        instance = fresh(name)
    assert same(result.model, gp.load(tmp_path, instance), inputs)
    assert all(p.is_meta for p in instance.parameters())


def test_a_factory_will_do(tmp_path):
    _, inputs, result = pruned("vit")
    gp.save(result, tmp_path)
    assert same(result.model, gp.load(tmp_path, TinyViT), inputs)
    assert same(result.model, gp.load(tmp_path, lambda: TinyViT()), inputs)


def test_objects_among_the_outputs_are_dicts_of_a_graph_module(tmp_path):
    _, inputs, result = pruned("tied")
    gp.save(result, tmp_path)
    out = gp.load(tmp_path)(inputs)
    assert list(out) == ["logits", "hidden"]
    assert out["hidden"][1] is None


class Layer:
    """Holds tensors beside what is none; pytree does not know it."""

    def __init__(self, keys, values):
        self.keys, self.filled, self.values = keys, True, values


class Nameless:
    """Known to pytree, with no names for what it holds; takes tensors that have a width only."""

    def __init__(self, *held):
        self.held = [tensor[..., :99] for tensor in held]


torch.utils._pytree.register_pytree_node(Nameless, lambda n: (n.held, None), lambda held, _: Nameless(*held))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Keeping(nn.Module):
    """Returns objects of all kinds, nested in each other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = F.relu(self.up(x))
        y = self.down(h)
        layers = {"layers": [Layer(y + 1, y + 2), Layer(y + 3, (y + 4, None))]}
        return {"y": y, "cache": layers, "pair": Pair(y + 5, Nameless(y + 6, y + 7)), "keys": {1: y + 8, "1": y + 9}}


def test_nothing_that_objects_among_the_outputs_hold_is_lost(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(2, 3)
    result = gp.prune(Keeping().eval(), x, target=HALF)
    gp.save(result, tmp_path)
    out = gp.load(tmp_path)(x)
    assert same(result.model, gp.load(tmp_path), x)
    first, second = out["cache"]["layers"]
    assert list(first) == ["keys", "values"]
    assert second["values"][1] is None
    assert list(out["pair"]) == ["first", "second"]
    assert isinstance(out["pair"]["second"], list)
    assert list(out["keys"]) == [1, "1"]
    leaves = [out["y"], *first.values(), second["keys"], second["values"][0], out["pair"]["first"]]
    leaves += [*out["pair"]["second"], *out["keys"].values()]
    assert all(torch.allclose(leaf, out["y"] + i) for i, leaf in enumerate(leaves))
    assert len(leaves) == 10


def pruned_llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 31, "head_dim": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3, use_cache=True)
    model = randomised(transformers.AutoModelForCausalLM.from_config(config)).eval()
    tokens = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    return gp.prune(model, tokens, target=HALF), tokens


def test_the_cache_of_a_language_model_is_there_without_its_class(tmp_path):
    result, tokens = pruned_llama()
    gp.save(result, tmp_path)
    want = result.model(**tokens).past_key_values.layers
    got = gp.load(tmp_path)(**tokens)["past_key_values"]["layers"]
    assert len(got) == len(want) == 2
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine["keys"], theirs.keys)
        assert torch.equal(mine["values"], theirs.values)
        assert mine["keys"].shape == (1, 2, 4, 2)  # 2 of 3 heads, 2 of 4 channels


def test_what_is_tied_stays_tied_and_what_is_frozen_frozen(tmp_path):
    _, _, result = pruned("tied")
    gp.save(result, tmp_path)
    for small in (gp.load(tmp_path, fresh("tied")), gp.load(tmp_path)):
        assert small.head.weight is small.embed.weight
        assert not small.up.bias.requires_grad
        assert small.up.weight.requires_grad
        assert "scale" not in small.state_dict()


def test_grafts_come_back_as_grafts_that_say_what_they_hold_for(tmp_path):
    _, inputs, result = pruned("graft")
    assert result.report.grafts == ("1",)
    gp.save(result, tmp_path)
    small = gp.load(tmp_path, fresh("graft"))
    assert isinstance(small[1], Stock)
    assert source_of(small[1])
    assert same(result.model, pickle.loads(pickle.dumps(small)), inputs)
    longer = torch.rand(4, 9, 7)
    assert same(result.model, small, longer)
    for model in (result.model, small):
        with pytest.raises(AssertionError, match="was traced for"):
            model[1](torch.rand(2, 3, 15), scale=0.25)


@pytest.mark.parametrize("name", NETS)
def test_a_plan_applies_to_another_checkpoint_without_a_trace(name, tmp_path):
    _, inputs, result = pruned(name)
    gp.save(result, tmp_path)
    torch.manual_seed(2)
    other = randomised(fresh(name), seed=3).eval()
    small = gp.load(tmp_path, other, weights="model")
    error = gp.verify(other, small, inputs, gp.couple(gp.trace(other, inputs)), gp.Artefact.read(tmp_path).plan).error
    assert error < 1e-9
    assert not same(result.model, small, inputs)


def test_weights_trained_after_pruning_are_saved(tmp_path):
    _, inputs, result = pruned("convolutions")
    gp.save(result, tmp_path)
    small = result.model.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.rand(4, 3, 16, 16)).square().mean().backward()
    optimizer.step()
    assert not same(small, gp.load(tmp_path, fresh("convolutions")), inputs)
    gp.save(result, tmp_path)
    for loaded in (gp.load(tmp_path, fresh("convolutions")), gp.load(tmp_path)):
        assert loaded.training
        assert same(small, loaded, inputs)
        x = torch.rand(4, 3, 16, 16)
        assert torch.equal(copy.deepcopy(small)(x), loaded(x))  # with the batch's statistics


def test_a_model_pruned_in_steps_is_saved_as_one_of_the_original(tmp_path):
    model, inputs, _ = pruned("vit")
    result = gp.prune_iteratively(model, inputs, target=HALF, steps=2)
    gp.save(result, tmp_path)
    assert same(result.model, gp.load(tmp_path, fresh("vit")), inputs)
    assert gp.Artefact.read(tmp_path).plan == result.plan


def test_a_graph_module_is_saved_as_it_is_and_fits_no_class(tmp_path):
    _, inputs, result = pruned("vit", emit="graph")
    gp.save(result, tmp_path)
    assert same(result.model, gp.load(tmp_path), inputs)
    with pytest.raises(gp.ArtefactError, match="load it without a model"):
        gp.load(tmp_path, fresh("vit"))


def test_a_loaded_model_can_be_pruned_and_saved_again(tmp_path):
    _, inputs, result = pruned("vit")
    gp.save(result, tmp_path / "first")
    for k, small in enumerate((gp.load(tmp_path / "first"), gp.load(tmp_path / "first", TinyViT))):
        again = gp.prune(small, inputs, target=HALF)
        gp.save(again, tmp_path / f"again{k}")
        assert same(again.model, gp.load(tmp_path / f"again{k}"), inputs)


def test_half_precision_and_autocast_come_back(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.a(x).relu()
            return self.b(y.float())

    x = torch.rand(2, 3)
    result = gp.prune(Mixed().eval(), x, target=HALF)
    gp.save(result, tmp_path)
    assert same(result.model, gp.load(tmp_path), x)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval().bfloat16()
    result = gp.prune(net, x.bfloat16(), target=HALF, verify=False)
    gp.save(result, tmp_path)
    assert same(result.model, gp.load(tmp_path, copy.deepcopy(net).float()), x.bfloat16())


def test_a_hugging_face_model_comes_back_from_its_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, vocab_size=31
    )
    tokens = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    model = randomised(transformers.AutoModelForSequenceClassification.from_config(config)).eval()
    target = gp.Target(channels={"*layer.0.intermediate*": 0.3, "*layer.1.intermediate*": 0.7, "*attention*": 0.7})
    result = gp.prune(model, tokens, target=target)
    gp.save(result, tmp_path)
    small = gp.load(tmp_path, model=transformers.AutoModelForSequenceClassification.from_config(config))
    widths = [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer]
    assert widths == [6, 14]
    assert same(result.model, small, tokens)
    assert same(result.model, gp.load(tmp_path), tokens)
    assert set(gp.load(tmp_path)(**tokens)) == {"logits"}


def test_the_files_are_safetensors_and_json(tmp_path):
    _, _, result = pruned("tied")
    gp.save(result, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    tensors = load_file(weights)
    for name, tensor in held(result.model):
        if name != "head.weight":  # tied
            assert torch.equal(tensors[name], tensor)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())


def test_an_artefact_says_what_it_is_and_where_every_position_was(tmp_path):
    model, _, result = pruned("convolutions")
    gp.save(result, tmp_path)
    artefact = gp.Artefact.read(tmp_path)
    assert artefact.plan == result.plan
    assert artefact.report["emitter"] == "module"
    assert artefact.report["costs"]["macs"]["before"] == result.report.costs["macs"].before
    assert artefact.manifest.made_with["torch"] == torch.__version__
    assert artefact.structure.inputs == ({"name": "x", "shape": [1, 3, 16, 16], "dtype": "float32"},)
    small, original = dict(held(result.model)), dict(held(model))
    shrunk = 0
    for name in artefact.structure.tensors:
        expected = original[name]
        for dim, kept in artefact.plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        shrunk += expected.shape != original[name].shape
        assert torch.equal(small[name], expected)
    assert shrunk > 5


def test_saving_again_leaves_one_artefact_and_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for fraction in (0.5, 0.25):
        result = gp.prune(randomised(CifarResNet(1)), torch.rand(1, 3, 16, 16), target=gp.Target(channels=fraction))
        gp.save(result, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert same(result.model, gp.load(tmp_path, CifarResNet(1)), torch.rand(1, 3, 16, 16))


def test_without_a_graph_the_class_is_needed(tmp_path):
    _, inputs, result = pruned("vit")
    gp.save(result, tmp_path, graph=False)
    assert same(result.model, gp.load(tmp_path, TinyViT), inputs)
    with pytest.raises(gp.ArtefactError, match=r"it was saved with graph=False; pass the original"):
        gp.load(tmp_path)


def test_a_model_that_cannot_be_traced_any_more_says_why(tmp_path):
    _, inputs, result = pruned("vit")
    result.model.head.register_forward_hook(lambda module, args, output: output.item())
    gp.save(result, tmp_path)
    with pytest.raises(gp.ArtefactError, match="could not be traced when it was saved"):
        gp.load(tmp_path)
    assert same(pruned("vit")[2].model, gp.load(tmp_path, TinyViT), inputs)


def test_odd_names_of_modules_need_the_class(tmp_path):
    x, net = torch.rand(2, 3), nn.Sequential()
    for name, part in {'"), print("': nn.Linear(3, 8), "b c-d": nn.ReLU(), "c": nn.Linear(8, 2)}.items():
        net.add_module(name, part)
    result = gp.prune(net.eval(), x, target=HALF)
    gp.save(result, tmp_path)
    assert same(result.model, gp.load(tmp_path, net), x)
    with pytest.raises(gp.ArtefactError, match="cannot name"):
        gp.load(tmp_path)


def test_an_op_without_a_rule_needs_the_callers_trust(tmp_path):
    with torch.library._scoped_library("gp_artefact", "DEF") as library:
        library.define("same(Tensor x) -> Tensor")
        library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")
        library.impl("same", lambda x: torch.empty_like(x), "Meta")

        class Custom(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

            def forward(self, x):
                return torch.ops.gp_artefact.same(self.b(self.a(x).relu()))

        x = torch.rand(2, 3)
        result = gp.prune(Custom().eval(), x, target=HALF)
        gp.save(result, tmp_path)
        assert same(result.model, gp.load(tmp_path, Custom), x)
        with pytest.raises(gp.ArtefactError, match=r"calls gp_artefact.same, .* ops=\['gp_artefact.same'\]"):
            gp.load(tmp_path)
        assert same(result.model, gp.load(tmp_path, ops=["gp_artefact.same"]), x)


def test_it_loads_in_another_process_that_knows_no_class(tmp_path):
    _, inputs, result = pruned("graft")
    gp.save(result, tmp_path / "artefact")
    torch.save({"x": inputs, "want": result.model(inputs)}, tmp_path / "case.pt")
    code = f"""
import torch, graphprune as gp
torch.set_num_threads(1)
case = torch.load({str(tmp_path / "case.pt")!r})
assert torch.equal(gp.load({str(tmp_path / "artefact")!r})(case["x"]), case["want"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(gp.__file__).parents[1])


@pytest.mark.parametrize("how", ["class", "graph"])
def test_a_loaded_model_compiles(how, tmp_path):
    _, inputs, result = pruned("graft")
    gp.save(result, tmp_path)
    small = gp.load(tmp_path, fresh("graft") if how == "class" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(small, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs), result.model(inputs))


# -- what cannot be saved ------------------------------------------------------------------------------------------


def test_save_takes_a_result(tmp_path):
    with pytest.raises(gp.ArtefactError, match=r"save takes what gp.prune returns, not a Linear"):
        gp.save(nn.Linear(2, 3), tmp_path)
    with pytest.raises(gp.ArtefactError, match="pass a path"):
        gp.save(pruned("vit")[2], 5)


def test_a_model_with_other_layers_than_it_was_pruned_to_is_refused(tmp_path):
    _, _, result = pruned("vit")
    result.model.head = nn.Linear(10, 3)
    with pytest.raises(gp.ArtefactError, match=r"head.weight is \[3, 10\] and was \[5, 10\]"):
        gp.save(result, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path):
    _, _, result = pruned("vit")
    result.model.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(gp.ArtefactError, match=r"table is torch.sparse_coo, which safetensors cannot hold"):
        gp.save(result, tmp_path / "new", graph=False)
    result.model.table = torch.empty(3, device="meta")
    with pytest.raises(gp.ArtefactError, match=r"table is on the meta device and has no values"):
        gp.save(result, tmp_path / "new", graph=False)
    assert not (tmp_path / "new").exists()
