"""Copies of modules, which are to be what `copy.deepcopy` gives."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from graphprune.rewrite.state import deepcopied


class Forgets(nn.Linear):
    def __getstate__(self):
        return {**super().__getstate__(), "cache": None}


class Remade(nn.Linear):
    def __reduce_ex__(self, protocol):
        return Remade, (self.in_features, self.out_features)


class Tells(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__({**state, "told": True})


class Same(nn.Linear):
    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Same(self.in_features, self.out_features))


def made(kind):
    module = nn.Sequential(kind(2, 3))
    module[0].cache = [torch.ones(2)]
    return deepcopied(module, {})[0]


@pytest.mark.parametrize("kind", [Forgets, Remade, Tells, Same])
def test_a_class_has_its_own_way_to_be_copied(kind):
    copied = made(kind)
    assert type(copied) is kind
    assert (kind is Tells) == hasattr(copied, "told")
    assert (kind in (Remade, Same)) == (not hasattr(copied, "cache"))
    assert getattr(copied, "cache", None) is None or copied.cache[0].tolist() == [1, 1]


def test_a_module_may_have_its_own_way_to_be_copied():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    module[0].__deepcopy__ = lambda memo: nn.Identity()
    assert [type(part) for part in deepcopied(module, {})] == [nn.Identity, nn.ReLU]


def test_what_is_shared_is_shared_in_the_copy_and_nothing_is_shared_with_the_original():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module.append(module[0])
    module[0].config = module[1].config = {"sizes": [2, 3], "owner": [module], "empty": OrderedDict(), (1, 2): {4}}
    module[1].weight = module[0].weight
    module[0].parts = module._modules
    module[1].register_forward_hook(print)
    copied = deepcopied(module, {})
    assert copied[2] is copied[0]
    assert copied[1].weight is copied[0].weight
    assert copied[0].parts is copied._modules
    config = copied[0].config
    assert config is copied[1].config
    assert config["owner"] == [copied]
    assert (config["sizes"], config["empty"], config[1, 2]) == ([2, 3], OrderedDict(), {4})
    assert all(config[key] is not held for key, held in module[0].config.items())
    assert list(copied[1]._forward_hooks.values()) == [print]
    assert copied[1]._forward_hooks is not module[1]._forward_hooks
    assert vars(copied).keys() == vars(module).keys()
    torch.testing.assert_close(copied.state_dict(), module.state_dict(), rtol=0, atol=0)
