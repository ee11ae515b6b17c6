"""The emitted module: same class where that can be, and everything a user hung on the model survives."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.pruning import emit_verified
from tests.nets import Attention, CifarResNet, DenseBlock, UNet


def half(model, example, **options):
    torch.manual_seed(0)
    return gp.prune(model, example, target=gp.Target(channels=0.5), importance=gp.importance.Random(3), **options)


EMITTED = ["module", "graph"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, on copying any graph module
@pytest.mark.parametrize("emit", EMITTED)
def test_state_dict_keys_stay_and_the_weights_load(emit):
    model = UNet().eval()
    result = half(model, torch.rand(2, 3, 16, 16), emit=emit)
    assert list(result.model.state_dict()) == list(model.state_dict())
    again = copy.deepcopy(result.model)
    again.load_state_dict(result.model.state_dict(), strict=True)


@pytest.mark.parametrize("emit", EMITTED)
def test_sliced_weights_are_the_kept_slices_of_the_original(emit):
    model = UNet().eval()
    result = half(model, torch.rand(2, 3, 16, 16), emit=emit)
    small = result.model.state_dict()
    for name, tensor in model.state_dict().items():
        for dim, kept in result.plan.kept.get(name, {}).items():
            tensor = tensor.index_select(dim, kept)
        assert torch.equal(small[name], tensor), name


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_requires_grad_survive(emit, dtype):
    model = UNet().to(dtype).eval()
    frozen = {"down1.0.weight", "up2.bias", "head.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    result = half(model, torch.rand(2, 3, 16, 16, dtype=dtype), emit=emit)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert {n for n, p in result.model.named_parameters() if not p.requires_grad} == frozen
    check = result.report.verification
    assert check.precision == "float64"
    assert check.error < check.tolerance == 1e-9


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("training", [True, False])
def test_the_train_flag_survives_and_switches_dropout_and_batch_norm(emit, training):
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 2, 1))
    small = half(body.train(training), torch.rand(4, 3, 8, 8), emit=emit).model
    assert {m.training for m in small.modules()} == {training}
    x, before = torch.rand(4, 3, 8, 8), dict(small.named_buffers())["1.running_mean"].clone()
    small.eval()
    assert torch.equal(small(x), small(x))
    assert torch.equal(dict(small.named_buffers())["1.running_mean"], before)
    small.train()
    assert not torch.equal(small(x), small(x))
    assert not torch.equal(dict(small.named_buffers())["1.running_mean"], before)


class Shared(nn.Module):
    """One convolution used twice, and two linear layers of one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Linear(3, 6), nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 8), nn.Linear(6, 8)
        self.other.weight = self.one.weight
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        h = self.twice(F.relu(self.twice(F.relu(self.stem(x)))))
        return self.last(self.one(h) * self.other(h))


@pytest.mark.parametrize("emit", EMITTED)
def test_tied_weights_stay_tied_and_untied_ones_stay_apart(emit):
    model = Shared().eval()
    small = half(model, torch.rand(4, 3), emit=emit).model
    parameters = dict(small.named_parameters(remove_duplicate=False))
    assert parameters["one.weight"] is parameters["other.weight"]
    assert parameters["one.bias"] is not parameters["other.bias"]
    originals = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert originals.isdisjoint(t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers()))


def test_hooks_and_methods_survive_in_the_same_class():
    seen = []
    model = CifarResNet(1).eval()
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    small = half(model, torch.rand(2, 3, 32, 32), emit="module").model
    assert type(small) is CifarResNet
    seen.clear()
    small(torch.rand(5, 3, 32, 32))
    assert seen == [(5, 8, 32, 32)]


def test_attributes_of_torch_modules_follow_the_weights():
    small = half(UNet(8).eval(), torch.rand(2, 3, 16, 16), emit="module").model
    assert (small.down1[0].in_channels, small.down1[0].out_channels, small.down1[1].num_features) == (3, 4, 4)
    assert (small.up2.in_channels, small.up2.out_channels) == (16, 8)
    grouped = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=8), nn.GroupNorm(4, 32), nn.Conv2d(32, 2, 1))
    )
    small = half(grouped.eval(), torch.rand(2, 3, 8, 8), emit="module").model
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (4, small[0].out_channels, 16)
    assert (small[2].num_groups, small[2].num_channels) == (2, 16)


@pytest.mark.parametrize("emit", EMITTED)
def test_int_attributes_of_user_modules_are_solved(emit):
    model = Attention(width=30, heads=4, head_dim=6).eval()
    result = half(model, torch.rand(2, 7, 30), emit=emit)
    assert [(w.before, w.after) for w in result.report.groups] == [(4, 2), (6, 3)]
    if emit == "module":
        assert (result.model.heads, result.model.head_dim) == (2, 3)
    assert (model.heads, model.head_dim) == (4, 6)


def test_three_heads_beside_three_of_query_key_and_value_are_told_apart():
    result = half(Attention(width=30, heads=3, head_dim=6).eval(), torch.rand(2, 7, 30), emit="module")
    assert (result.model.heads, result.model.head_dim) == (2, 3)


class Coincident(nn.Module):
    """Three attributes of one value, of which one is a width."""

    def __init__(self):
        super().__init__()
        self.longest, self.heads, self.version = 4, 4, 4
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        b, n, _ = x[:, : self.longest].shape
        h = self.first(x[:, : self.longest]).view(b, n, self.heads, -1)
        return self.last((h * h.sum(-1, keepdim=True)).reshape(b, n, -1))


def test_attributes_that_equal_a_width_by_chance_keep_their_value():
    model, x = Coincident().eval(), torch.rand(2, 2, 3)
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {"first:[4]x2": [0, 3]})
    small = emit_verified(model, gp.Inputs((x,)), coupling, plan, emit="module")[0].model
    assert (small.longest, small.heads, small.version) == (4, 2, 4)


class Shortcut(nn.Module):
    """Reads its number of heads while it is traced, and otherwise only if asked to; its index may equal it."""

    def __init__(self, index):
        super().__init__()
        self.index, self.heads = index, 4
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, careful=False):
        heads = self.heads if careful or torch.compiler.is_exporting() else self.first.weight.shape[0] // 2
        h = self.first(x).reshape(len(x), heads, 2)
        return x + self.last((h * h.sum(-1, keepdim=True)).flatten(1))


def test_the_one_attribute_that_every_layer_holds_changes_even_if_this_call_does_not_read_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Shortcut(index) for index in range(3, 6))).eval(), torch.rand(2, 8)
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {f"{i}.first:[4]x2": [0, 3] for i in range(3)})
    small = emit_verified(model, gp.Inputs((x,)), coupling, plan, emit="module")[0].model
    assert [(m.index, m.heads) for m in small] == [(3, 2), (4, 2), (5, 2)]
    assert torch.equal(small[1](x, careful=True), small[1](x))


def test_padding_that_equals_the_number_of_groups_stays():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=2), nn.Conv2d(8, 2, 1)).eval()
    small = half(net, torch.rand(2, 3, 8, 8), emit="module").model
    assert (small[1].groups, small[1].padding) == (1, (2, 2))
    assert small[1]._reversed_padding_repeated_twice == net[1]._reversed_padding_repeated_twice


class Remembering(nn.Module):
    """Keeps the result of its last forward, with its graph."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(3, 8), nn.Linear(8, 2), None

    def forward(self, x):
        self.seen = self.first(x).relu()
        return self.last(self.seen)


def test_a_model_that_remembers_a_result_can_be_copied():
    model = Remembering()
    model(torch.rand(2, 3))
    assert model.seen.grad_fn is not None
    assert half(model, torch.rand(2, 3), emit="module").model.first.out_features == 4


def test_a_model_that_cannot_be_copied_becomes_a_graph():
    model = Remembering()
    model.lock = threading.Lock()
    result = half(model, torch.rand(2, 3))
    assert result.report.emitter == "graph"
    assert "Remembering cannot be copied: TypeError: cannot pickle" in result.report.reason


class Config:
    def __init__(self):
        self.heads, self.head_dim, self.unrelated = 4, 6, 4


class Configured(Attention):
    """Reads its sizes from a config object that all layers share."""

    def __init__(self, config):
        super().__init__(30, config.heads, config.head_dim)
        del self.heads, self.head_dim
        self.config = config

    def __getattr__(self, name):
        return getattr(self.config, name) if name in ("heads", "head_dim") else super().__getattr__(name)


def test_a_config_that_layers_share_is_copied_before_it_changes():
    config = Config()
    model = nn.Sequential(Configured(config), Configured(config)).eval()
    coupling = gp.couple(gp.trace(model, torch.rand(2, 7, 30)))
    plan = gp.Plan.of(coupling, {"0.qkv:3x[4]x6": [1, 2, 3], "1.qkv:3x4x[6]": [0, 5]})
    small = gp.rewrite(model, torch.rand(2, 7, 30), coupling, plan, emit="module", problem=_problem(model, plan)).model
    assert [(m.config.heads, m.config.head_dim) for m in small] == [(3, 6), (4, 2)]
    assert (config.heads, config.head_dim) == (4, 6)


class Derives(nn.Module):
    """Its config says the number of heads; the weights do too, and they are asked."""

    def __init__(self, config):
        super().__init__()
        self.config, self.first, self.last = config, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.first(x).reshape(len(x), self.first.weight.shape[0] // 2, 2)
        return x + self.last((h * h.sum(-1, keepdim=True)).flatten(1))


def test_a_config_that_nobody_had_to_change_is_still_shared():
    torch.manual_seed(0)
    config = Config()
    model, x = nn.Sequential(Derives(config), Derives(config)).eval(), torch.rand(2, 8)
    model.config = config
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {"0.first:[4]x2": [0, 2], "1.first:[4]x2": [1]})
    small = emit_verified(model, gp.Inputs((x,)), coupling, plan, emit="module")[0].model
    assert small[0].config is small[1].config is small.config
    assert small.config is not config
    assert vars(small.config) == vars(config)


def _problem(model, plan):
    x = torch.rand(2, 7, 30)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            for dim, kept in plan.kept.get(name, {}).items():
                gone = sorted(set(range(parameter.shape[dim])) - set(kept.tolist()))
                parameter.index_fill_(dim, torch.tensor(gone), 0)
    want = zeroed(x)

    def problem(candidate):
        try:
            return "" if torch.allclose(candidate(x), want, atol=1e-6) else "off"
        except RuntimeError as error:
            return str(error)

    return problem


class Fixed(nn.Module):
    """Its own Python states a size, so the same class cannot follow."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).reshape(-1, 2, 4).relu().reshape(-1, 8))


def test_auto_passes_over_a_class_that_cannot_follow_and_says_why():
    result = half(Fixed().eval(), torch.rand(5, 3))
    assert result.report.emitter == "graph"
    assert result.report.reason.startswith("the same class does not work: RuntimeError: ")
    assert "emitted   graph because the same class does not work" in str(result.report)
    with pytest.raises(gp.RewriteError, match=r"(?s)the same class does not work.*use emit='auto', 'graft' or 'graph'"):
        half(Fixed().eval(), torch.rand(5, 3), emit="module")


def test_readings_that_were_not_tried_are_counted():
    model = Fixed().eval()
    model.a = model.b = model.c = model.d = model.e = 8
    reason = half(model, torch.rand(5, 3)).report.reason
    assert " (and 16 readings of its int attributes were not tried)" in reason


def test_an_unknown_emitter_is_refused():
    with pytest.raises(gp.InputError, match="it is 'auto', 'module', 'graft' or 'graph'"):
        half(Fixed().eval(), torch.rand(5, 3), emit="script")


def test_unequal_halves_of_a_chunk_are_written_as_sizes():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            a, b = self.first(x).chunk(2, dim=-1)
            return self.a(a) + self.b(b)

    model, x = Halves().eval(), torch.rand(5, 3)
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {"first[0:4]": [2], "first[4:8]": [0, 1, 3]})
    made = gp.rewrite(model, x, coupling, plan, emit="graph").model
    assert "split_with_sizes" in made.code
    assert gp.verify(model, made, x, coupling, plan).error < 1e-9


class Positions(nn.Module):
    """Adds a code of the position, made in the dtype of its input: a trace writes that dtype down."""

    def forward(self, x):
        return x + torch.linspace(0, 1, x.shape[-2], dtype=x.dtype, device=x.device).unsqueeze(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_graph_module_can_be_cast_like_the_original(dtype):
    model = Attention(width=30, heads=4, head_dim=6).eval()
    small = half(model, torch.rand(2, 7, 30), emit="graph").model
    assert small.to(dtype)(torch.rand(2, 7, 30, dtype=dtype)).dtype == dtype


def test_a_graph_that_states_dtypes_is_verified_in_float64_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(Positions(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    result = half(model, torch.rand(5, 7, 3), emit="graph")
    assert result.report.verification.precision == "float64"
    assert result.report.verification.error < 1e-9


@pytest.mark.parametrize("batch", [1, 4])
def test_a_graph_module_takes_any_batch_size_whatever_the_example(batch):
    model = DenseBlock(3).eval()
    result = half(model, torch.rand(batch, 3, 8, 8), emit="graph")
    x = torch.rand(7, 3, 8, 8)
    each = torch.cat([result.model(x[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(result.model(x), each)


def test_a_model_that_fixes_its_batch_size_says_so():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            assert x.shape[0] == 4
            return self.last(self.first(x).relu()).reshape(2, 2, 2)

    result = half(Batched().eval(), torch.rand(4, 3), emit="graph")
    assert result.report.reason == "the batch size stays 4, the model cannot be traced with an open one"


def test_a_pruned_model_of_the_same_class_can_be_copied_pickled_and_pruned_again():
    model = CifarResNet(1).eval()
    small = half(model, torch.rand(2, 3, 32, 32), emit="module").model
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
    smaller = half(small, x, emit="module")
    assert smaller.report.costs["params"].after < sum(p.numel() for p in small.parameters())


def test_without_verification_the_first_emission_that_can_be_built_is_returned():
    result = half(CifarResNet(1).eval(), torch.rand(2, 3, 32, 32), verify=False)
    assert result.report.verification is None
    assert "verified  no (verify=False)" in str(result.report)
