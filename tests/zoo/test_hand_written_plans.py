"""Plans written by hand for Llama, DeiT, ResNet-56 and a GRU: what each group is, shape by shape, removed exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.pruning import emit_verified
from tests.nets import CifarResNet, randomised
from tests.zoo.tiny import causal, hf, tokens

LAYERS = range(2)
ATTENTION = "model.layers.{}.self_attn."


def carried_out(
    model: nn.Module, inputs, keep: dict[str, list[int]], **options: str
) -> tuple[nn.Module, str, gp.Coupling, gp.Plan]:
    """The model with this plan carried out and verified, and which emitter did it."""
    given = gp.Inputs.of(inputs)
    coupling = gp.couple(gp.trace(model, given), **options)
    plan = gp.Plan.of(coupling, keep)
    assert plan.removed > 0
    rewritten, check = emit_verified(model, given, coupling, plan)
    assert check.precision == "float64"
    assert check.error < 1e-9
    assert check.effect > 1e-3
    return rewritten.model, rewritten.emitter, coupling, plan


def changed(model: nn.Module, small: nn.Module) -> dict[str, tuple[int, ...]]:
    """The new shapes of the parameters and buffers that shrank, by name."""
    state = dict(small.named_parameters()) | dict(small.named_buffers())
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tuple(t.shape) for name, t in state.items() if name in before and t.shape != before[name].shape}


# -- Llama: 3 key/value heads, each for 2 query heads, 12 channels a head (6 pairs turned by RoPE), 48 -> 80 -> 48 ----


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    return randomised(causal("Llama")()[0]).double()


def test_llama_loses_a_key_value_head_with_its_query_heads(llama):
    keep = {"model.layers.0.self_attn.q_proj:[3]x2x12": [0, 2], "model.layers.1.self_attn.q_proj:[3]x2x12": [1]}
    small, emitter, _, plan = carried_out(llama, tokens(), keep)
    assert emitter == "module"
    assert changed(llama, small) == {
        "model.layers.0.self_attn.q_proj.weight": (2 * 2 * 12, 48),
        "model.layers.0.self_attn.k_proj.weight": (2 * 12, 48),
        "model.layers.0.self_attn.v_proj.weight": (2 * 12, 48),
        "model.layers.0.self_attn.o_proj.weight": (48, 2 * 2 * 12),
        "model.layers.1.self_attn.q_proj.weight": (1 * 2 * 12, 48),
        "model.layers.1.self_attn.k_proj.weight": (1 * 12, 48),
        "model.layers.1.self_attn.v_proj.weight": (1 * 12, 48),
        "model.layers.1.self_attn.o_proj.weight": (48, 1 * 2 * 12),
    }
    heads = plan.kept["model.layers.0.self_attn.q_proj.weight"][0].reshape(4, 12)[:, 0] // 12
    assert heads.tolist() == [0, 1, 4, 5]  # query heads 2 and 3 belong to key/value head 1


def test_llama_loses_a_query_head_of_every_key_value_head(llama):
    keep = {"model.layers.0.self_attn.q_proj:3x[2]x12": [1]}
    small, emitter, _, plan = carried_out(llama, tokens(), keep)
    assert emitter == "module"
    assert changed(llama, small) == {
        "model.layers.0.self_attn.q_proj.weight": (3 * 1 * 12, 48),
        "model.layers.0.self_attn.o_proj.weight": (48, 3 * 1 * 12),
    }
    heads = plan.kept["model.layers.0.self_attn.q_proj.weight"][0].reshape(3, 12)[:, 0] // 12
    assert heads.tolist() == [1, 3, 5]
    assert [layer.self_attn.num_key_value_groups for layer in small.model.layers] == [1, 2]
    assert [layer.self_attn.num_key_value_groups for layer in llama.model.layers] == [2, 2]


PAIRS = {"model.layers.0.self_attn.q_proj:3x2x[12][0:6]": [0, 2, 3, 5]}
VALUES = {f"{ATTENTION.format(i)}v_proj:3x[12]": [0, 1, 3, 4, 6, 7, 9, 11] for i in LAYERS}
TURNED = {
    "model.rotary_emb.inv_freq": (4,),
    **{f"{ATTENTION.format(i)}q_proj.weight": (3 * 2 * 8, 48) for i in LAYERS},
    **{f"{ATTENTION.format(i)}k_proj.weight": (3 * 8, 48) for i in LAYERS},
}
CARRIED = {
    **{f"{ATTENTION.format(i)}v_proj.weight": (3 * 8, 48) for i in LAYERS},
    **{f"{ATTENTION.format(i)}o_proj.weight": (48, 3 * 2 * 8) for i in LAYERS},
}


@pytest.mark.parametrize(
    ("keep", "shapes", "same_class"),
    [
        # the one attribute for the width of a head says that of queries, keys and values
        pytest.param(PAIRS | VALUES, TURNED | CARRIED, True, id="of all"),
        pytest.param(PAIRS, TURNED, False, id="of queries and keys"),
        pytest.param(VALUES, CARRIED, False, id="of values"),
    ],
)
def test_llama_loses_channels_of_its_heads(llama, keep, shapes, same_class):
    small, emitter, _, plan = carried_out(llama, tokens(), keep)
    assert (emitter == "module") == same_class
    assert changed(llama, small) == shapes
    if keep is not VALUES:  # channels i and i + 6 are turned together, by the same angle in both layers
        for i in LAYERS:
            kept = plan.kept[f"{ATTENTION.format(i)}k_proj.weight"][0]
            assert kept[:8].tolist() == [0, 2, 3, 5, 6, 8, 9, 11]


def test_llama_loses_inner_channels_of_its_mlp(llama):
    keep = {"model.layers.0.mlp.gate_proj": list(range(0, 80, 3)), "model.layers.1.mlp.gate_proj": [79]}
    small, emitter, *_ = carried_out(llama, tokens(), keep)
    assert emitter == "module"
    assert changed(llama, small) == {
        "model.layers.0.mlp.gate_proj.weight": (27, 48),
        "model.layers.0.mlp.up_proj.weight": (27, 48),
        "model.layers.0.mlp.down_proj.weight": (48, 27),
        "model.layers.1.mlp.gate_proj.weight": (1, 48),
        "model.layers.1.mlp.up_proj.weight": (1, 48),
        "model.layers.1.mlp.down_proj.weight": (48, 1),
    }


def test_a_llama_with_fewer_heads_and_inner_channels_is_one_that_its_own_config_could_have_made(llama):
    keep = {f"{ATTENTION.format(i)}q_proj:[3]x2x12": [0, 2] for i in LAYERS}
    keep |= {f"model.layers.{i}.mlp.gate_proj": list(range(40)) for i in LAYERS}
    small, *_ = carried_out(llama, tokens(), keep)
    sizes = {
        "hidden_size": 48,
        "head_dim": 12,
        "num_hidden_layers": 2,
        "vocab_size": 101,
        "max_position_embeddings": 33,
    }
    stock = hf(
        "LlamaForCausalLM",
        "LlamaConfig",
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        pad_token_id=0,
    )
    stock.load_state_dict(small.state_dict(), strict=True)
    stock = stock.double().eval()
    with torch.no_grad():
        assert torch.equal(stock(**tokens()).logits, small(**tokens()).logits)


def test_qwen3_keeps_its_class_where_the_channels_of_values_stay_like_those_of_queries():
    torch.manual_seed(0)
    qwen3 = randomised(causal("Qwen3")()[0]).double()
    attention = [f"{ATTENTION.format(i)}q_proj:[3]x2x12" for i in LAYERS]
    small, emitter, coupling, _ = carried_out(qwen3, tokens(), {name: [1] for name in attention})
    assert emitter == "module"
    assert changed(qwen3, small)["model.layers.0.self_attn.v_proj.weight"] == (12, 48)
    assert "norms='prune' allows it" in coupling.why_not("model.layers.0.self_attn.q_norm.weight", 0)


# -- DeiT-tiny: 3 heads of 64 channels, q, k and v fused, 192 -> 768 -> 192 ------------------------------------------


@pytest.fixture
def deit() -> nn.Module:
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    return randomised(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)).double()


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_deit_loses_a_head(deit):
    small, _, _, plan = carried_out(deit, IMAGES, {"blocks.0.attn.qkv:3x[3]x64": [0, 2]})
    assert changed(deit, small) == {
        "blocks.0.attn.qkv.weight": (3 * 2 * 64, 192),
        "blocks.0.attn.qkv.bias": (3 * 2 * 64,),
        "blocks.0.attn.proj.weight": (192, 2 * 64),
    }
    assert (plan.kept["blocks.0.attn.qkv.weight"][0].reshape(3, 2, 64)[:, :, 0] // 64).tolist() == [
        [0, 2],
        [3, 5],
        [6, 8],
    ]


def test_deit_loses_channels_of_its_heads(deit):
    small, _, _, plan = carried_out(deit, IMAGES, {"blocks.1.attn.qkv:3x3x[64]": list(range(1, 64, 2))})
    assert changed(deit, small) == {
        "blocks.1.attn.qkv.weight": (3 * 3 * 32, 192),
        "blocks.1.attn.qkv.bias": (3 * 3 * 32,),
        "blocks.1.attn.proj.weight": (192, 3 * 32),
    }
    assert (plan.kept["blocks.1.attn.proj.weight"][1] % 2 == 1).all()


def test_deit_loses_inner_channels_of_its_mlp(deit):
    small, emitter, *_ = carried_out(deit, IMAGES, {"blocks.0.mlp.fc1": list(range(100))})
    assert emitter == "module"
    assert changed(deit, small) == {
        "blocks.0.mlp.fc1.weight": (100, 192),
        "blocks.0.mlp.fc1.bias": (100,),
        "blocks.0.mlp.fc2.weight": (192, 100),
    }


def test_deit_loses_width_of_its_residual_stream_when_norms_may_be_pruned(deit):
    small, _, coupling, _ = carried_out(deit, IMAGES, {"patch_embed.proj": list(range(150))}, norms="prune")
    assert coupling.group("patch_embed.proj").exactness == "renormalised"
    shapes = changed(deit, small)
    assert shapes["pos_embed"] == (1, 5, 150)
    assert shapes["cls_token"] == (1, 1, 150)
    assert shapes["blocks.0.norm1.weight"] == (150,)
    assert shapes["blocks.0.attn.qkv.weight"] == (3 * 3 * 64, 150)
    assert shapes["blocks.1.mlp.fc2.weight"] == (150, 768)
    assert shapes["head.weight"] == (1000, 150)
    assert set(shapes) == {f"{m.name}" for m in coupling.group("patch_embed.proj").members}


# -- ResNet-56: 9 blocks a stage, shortcuts that pad the channels they lack with zeros ------------------------------


@pytest.fixture
def resnet56() -> nn.Module:
    torch.manual_seed(0)
    return randomised(CifarResNet(9)).eval()


def test_resnet56_loses_inner_channels_of_two_blocks(resnet56):
    keep = {"layer1.4.conv1": [0, 3, 5, 15], "layer3.8.conv1": list(range(1, 64, 3))}
    small, emitter, _, _ = carried_out(resnet56, torch.rand(2, 3, 32, 32), keep)
    assert emitter == "module"
    inner = {name: shape for name, shape in changed(resnet56, small).items() if "bn" not in name}
    assert inner == {
        "layer1.4.conv1.weight": (4, 16, 3, 3),
        "layer1.4.conv2.weight": (16, 4, 3, 3),
        "layer3.8.conv1.weight": (21, 64, 3, 3),
        "layer3.8.conv2.weight": (64, 21, 3, 3),
    }


def test_resnet56_loses_channels_that_its_second_stage_adds(resnet56):
    keep = {"layer2.0.conv2[0:8]": [1, 6]}
    small, emitter, _, _ = carried_out(resnet56, torch.rand(2, 3, 32, 32), keep)
    assert emitter == "graft"  # the shortcut of one block pads unequally from now on, its code does so equally
    shapes = changed(resnet56, small)
    assert {shapes[f"layer2.{k}.conv2.weight"] for k in range(9)} == {(32 - 6, 32, 3, 3)}
    assert shapes["layer3.0.conv1.weight"] == (64, 32 - 6, 3, 3)
    assert {shapes[f"layer3.{k}.conv2.weight"] for k in range(9)} == {
        (64 - 6, 64, 3, 3)
    }  # its shortcut carries them on
    assert not any(name.startswith("layer1.") for name in shapes)


def test_resnet56_loses_channels_of_its_whole_residual_stream(resnet56):
    small, emitter, _, _ = carried_out(resnet56, torch.rand(2, 3, 32, 32), {"conv1": [0, 2, 3, 7, 11]})
    assert emitter == "module"
    shapes = changed(resnet56, small)
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        assert {shapes[f"layer{stage}.{k}.conv2.weight"] for k in range(9)} == {(width - 11, width, 3, 3)}
    assert shapes["linear.weight"] == (10, 64 - 11)


# -- GRU: two layers in two directions that share one hidden size -----------------------------------------------------


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(23, 7), nn.GRU(7, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(2 * 5, 3)

    def forward(self, tokens):
        return self.last(self.gru(self.words(tokens))[0].mean(1))


def test_a_gru_loses_hidden_units():
    torch.manual_seed(0)
    model = Reader().eval()
    small, emitter, _, _ = carried_out(model, torch.arange(18).reshape(2, 9), {"gru.weight_ih_l0:3x[5]": [0, 2, 3]})
    assert emitter == "module"
    shapes = changed(model, small)
    assert shapes["gru.weight_ih_l0"] == (3 * 3, 7)
    assert shapes["gru.weight_hh_l1_reverse"] == (3 * 3, 3)
    assert shapes["gru.weight_ih_l1"] == (3 * 3, 2 * 3)
    assert shapes["last.weight"] == (3, 2 * 3)
    assert small.gru.hidden_size == 3


def test_a_gru_loses_features_of_its_input():
    torch.manual_seed(0)
    model = Reader().eval()
    small, emitter, _, _ = carried_out(model, torch.arange(18).reshape(2, 9), {"words.dim1": [0, 2, 3, 6]})
    assert emitter == "module"
    assert changed(model, small) == {
        "words.weight": (23, 4),
        "gru.weight_ih_l0": (15, 4),
        "gru.weight_ih_l0_reverse": (15, 4),
    }
