"""The README: its Python runs, and its commands are what CI runs."""

from __future__ import annotations

import re

import torch

from tests import pages

PAGE = pages.ROOT / "README.md"
README = PAGE.read_text()


def test_every_python_block_runs_in_order(capsys):
    scope, printed = pages.run(PAGE, capsys, commands=False)  # they are about models and images of one's own
    assert "graphprune: Sequential, requested macs 0.5" in printed
    assert "goes with" in printed
    assert type(scope["smaller"]) is type(scope["detector"])
    assert scope["boxes"].shape[1] == 4
    assert scope["small"][0].out_channels == 4
    assert scope["done"].error == 0
    x = torch.rand(2, 7, 8)
    assert torch.equal(scope["again"](x), scope["alone"](x))
    net, largest = scope["net"], scope["by_largest"].plan.groups["0"]
    members = [net[0].weight, net[0].bias, net[1].weight, net[1].bias, net[3].weight.transpose(0, 1)]
    scores = torch.cat([m.detach().reshape(16, -1) for m in members], 1).abs().amax(1)
    assert largest == tuple(sorted(scores.argsort(descending=True, stable=True)[:8].tolist()))


def test_there_are_two_commands_and_both_start_from_nothing():
    commands = [block.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
    assert len(commands) == 2
    assert all(command.startswith("python -m venv .venv && .venv/bin/pip install") for command in commands)
    assert commands[0].endswith("graphprune demo")
    assert commands[1].endswith("pytest")


def test_every_file_the_readme_links_to_is_there():
    assert pages.links(PAGE)
    assert pages.broken(PAGE) == []
