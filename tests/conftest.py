"""Shared by all tests: torchvision's operators where its build lacks them; one thread, tiny tensors gain from no more."""

from __future__ import annotations

import torch

from tests import shim

shim.install()
torch.set_num_threads(1)
