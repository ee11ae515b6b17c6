"""Every architecture of the transformers library: half of every exact group goes, the outputs are the zeroed original's."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.nets import randomised
from tests.zoo.test_zoo import zeroed_by_hand
from tests.zoo.tiny import TINY, causal, tokens

KINDS = Path(__file__).parents[1] / "golden" / "transformers.txt"
HALF = gp.Target(channels=0.5)

OTHER = {
    "llama_odd": (
        "graph",
        "shape '.*' is invalid",
    ),  # queries keep 6 channels (pairs), values 5, one attribute for both
    "qwen3": ("graph", "size of tensor a"),  # queries keep all 12 channels (a norm is taken over them), values 6
    "gemma3": ("graph", "size of tensor a"),
    "falcon": ("graph", "output is off"),  # leaves the scale to its default, which follows the width
    "codegen": ("graph", "shape '.*' is invalid"),  # computes the split of q, k and v from a literal 4
    "mpnet": ("graph", "output is off"),  # the attribute that says the width of a head also says the scale
    "deberta": ("graft", "output is off"),
    "deberta_v2": ("graft", "output is off"),
    "siglip": ("graft", "was expecting embedding dimension"),  # torch's own attention wants the width that comes in
}
"""Whose own Python fixes a size that a random half changes: what is emitted, and what stopped the class.

Attention that is handed a cache to write to has no graft, so these become graph modules.
"""


def kinds(coupling: gp.Coupling) -> list[str]:
    """The groups with the number of the layer left out, each kind once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", g.name) for g in coupling.groups))


def written(path: Path = KINDS) -> dict[str, list[str]]:
    """The kinds of groups per model, from the golden file."""
    blocks = re.split(r"\n(?=\S)", path.read_text())
    return {name: [line.strip() for line in rest] for name, *rest in (block.splitlines() for block in blocks)}


def built(name: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model, inputs = TINY[name]()
    return randomised(model), inputs


@pytest.mark.parametrize("name", TINY)
def test_half_of_every_group_goes_and_the_outputs_are_those_of_the_zeroed_original(name):
    model, inputs = built(name)
    before = copy.deepcopy(model.config.to_dict())
    result = gp.prune(model, inputs, target=HALF, importance=gp.importance.Random(seed=1))
    check, report = result.report.verification, result.report
    assert result.coupling.unknown == ()
    assert kinds(result.coupling) == written()[name]
    assert all(w.after == max(1, int(w.before / 2 + 0.5)) for w in report.groups)
    assert {w.exactness for w in report.groups} == {"exact"}
    assert check.error < (1e-9 if check.precision == "float64" else check.tolerance)
    assert check.effect > 1e-3
    emitter, stopped = OTHER.get(name, ("module", "^$"))
    assert report.emitter == emitter
    assert re.search(stopped, report.reason)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("name", ["gpt2", "llama_eager", "deberta_v2", "mixtral", "t5", "mamba", "segformer"])
def test_both_front_ends_find_the_same_groups(name):
    model, inputs = built(name)
    recorded, exported = (gp.couple(gp.trace(model, inputs, front_end=f)) for f in ("record", "export"))
    assert recorded.program.carried == exported.program.carried
    assert {(g.name, g.size) for g in recorded.groups} == {(g.name, g.size) for g in exported.groups}


# -- language models that keep their class ---------------------------------------------------------------------------


@functools.cache
def pruned(name: str) -> tuple[nn.Module, gp.pruning.Result]:
    model, inputs = built(name)
    return model, gp.prune(model, inputs, target=HALF, importance=gp.importance.Random(seed=1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi", "mamba"])
def test_a_pruned_language_model_generates_what_the_zeroed_original_does(name):
    model, result = pruned(name)
    prompt = tokens(5)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None}
    options["pad_token_id"] = 0
    want = zeroed_by_hand(model, result.plan).generate(prompt, use_cache=True, **options)
    assert want.shape == (2, 17)
    assert torch.equal(result.model.generate(prompt, use_cache=True, **options), want)
    assert torch.equal(result.model.generate(prompt, use_cache=False, **options), want)
    assert not torch.equal(model.generate(prompt, **options), want)


@pytest.mark.parametrize("name", ["llama", "llama_eager", "gpt2", "phi"])
def test_a_pruned_model_works_with_masks_and_attention_that_it_was_not_traced_with(name):
    model, result = pruned(name)
    zeroed, small = zeroed_by_hand(model, result.plan), copy.deepcopy(result.model)
    for kind in ("eager", "sdpa"):
        for inputs in (tokens(7), tokens(7, mask=True)):
            for each in (zeroed, small):
                each.set_attn_implementation(kind)
            with torch.no_grad():
                want, got = zeroed(**inputs).logits, small(**inputs).logits
            assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_attention_without_a_cache_gets_a_graft_where_the_dims_of_queries_and_values_differ():
    model, inputs = built("llama_eager")
    inputs = {**inputs, "use_cache": False}
    result = gp.prune(model, inputs, target=gp.Target(channels={"*v_proj*": 0.5}))
    assert result.report.grafts == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    heads = result.model.model.layers[0].self_attn
    assert heads.v_proj.out_features < heads.k_proj.out_features
    zeroed = zeroed_by_hand(model, result.plan)
    other = {**tokens(5, mask=True), "use_cache": False}  # a length it was not traced with
    with torch.no_grad():
        want, got = zeroed(**other).logits, result.model(**other).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.raises(AssertionError, match=r"self_attn was traced for .* past_key_values is None"):
        result.model(**{**inputs, "use_cache": True})


def test_the_cache_of_a_pruned_model_is_as_narrow_as_its_heads():
    _, result = pruned("llama")
    cache = result.model(**tokens(5)).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 5, 6)] * 2
    assert [layer.values.shape for layer in cache.layers] == [(2, 2, 5, 6)] * 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_is_saved_with_its_own_config_and_weights(name, tmp_path):
    from safetensors.torch import load_file

    model, result = pruned(name)
    small = result.model
    configs = {id(vars(m)["config"]) for m in model.modules() if "config" in vars(m)}
    assert configs.isdisjoint(id(vars(m)["config"]) for m in small.modules() if "config" in vars(m))
    small.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    held = small.state_dict()
    assert saved
    assert all(torch.equal(tensor, held[n]) for n, tensor in saved.items())
    assert sum(t.numel() for t in saved.values()) == result.report.costs["params"].after
    again = copy.deepcopy(small)
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert not unexpected
    assert all(held[n].data_ptr() in {held[m].data_ptr() for m in saved} for n in missing)  # tied to one that was saved


def test_tied_embeddings_stay_tied():
    for name, first, second in (
        ("gpt2", "transformer.wte", "lm_head"),
        ("t5", "shared", "decoder.embed_tokens"),
        ("bert_masked_lm", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ):
        model, result = pruned(name)
        for each in (model, result.model):
            assert each.get_submodule(first).weight is each.get_submodule(second).weight


def test_experts_in_a_loop_over_those_that_were_hit_are_refused_with_the_line():
    model, inputs = causal("Mixtral", num_local_experts=5, num_experts_per_tok=2, experts_implementation="eager")()
    with pytest.raises(gp.TraceError, match=r"(?s)cannot be traced.*for expert_idx in expert_hit"):
        gp.trace(model, inputs)


# -- the residual stream ---------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Only the logits, so that no other output holds the width of the residual stream."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).logits


@pytest.mark.parametrize(
    ("name", "group", "size"),
    [
        ("bert_masked_lm", "model.bert.encoder.layer.0.attention.output.dense", 48),
        ("llama", "model.model.layers.0.self_attn.o_proj", 48),
        ("vit", "model.vit.embeddings.patch_embeddings.projection", 48),
        ("t5", "model.encoder.block.0.layer.0.SelfAttention.o", 48),
    ],
)
def test_the_residual_stream_is_pinned_or_renormalised_as_asked(name, group, size):
    model, inputs = built(name)
    model = Logits(model)
    exact = gp.couple(gp.trace(model, inputs))
    assert group not in {g.name for g in exact.groups}
    (pinned_to,) = [p for p in exact.pinned if p.name == group]
    assert "takes statistics over it (norms='prune' allows it)" in pinned_to.reason
    result = gp.prune(model, inputs, target=HALF, importance=gp.importance.Random(seed=1), norms="prune")
    found = {w.name: w for w in result.report.groups}[group]
    assert (found.before, found.after, found.exactness) == (size, size // 2, "renormalised")
    assert len(result.coupling.groups) == len(exact.groups) + 1
    check = result.report.verification
    assert check.error < (1e-9 if check.precision == "float64" else check.tolerance)
    assert check.effect > 1e-3
