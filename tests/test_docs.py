"""The guides and the reference: every block runs and prints what the page says, every public name is listed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest

import graphprune as gp
from tests import pages

GUIDES = sorted(pages.ROOT.glob("docs/*.md"))
REFERENCE = sorted(pages.ROOT.glob("docs/reference/*.md"))
LISTED = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_every_block_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pages.run(page, capsys)


@pytest.mark.parametrize("page", [*GUIDES, *REFERENCE], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_every_link_leads_somewhere(page):
    assert pages.broken(page) == []


def test_the_first_page_leads_to_all_others():
    index = pages.ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in pages.links(index)}
    assert linked >= {*GUIDES, *REFERENCE} - {index}


PAGE = """# A page

```python
print(1 + 1)
```

```text
{}
```

[here](#a-page) [there](other.md) [nowhere](#b-page)
"""


def test_a_page_that_says_something_else_is_found(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("2"))
    assert pages.run(page, capsys)[1] == "2\n"
    page.write_text(PAGE.format("3"))
    with pytest.raises(AssertionError, match=r"page\.md:7: printed\n2\n\nthe page says\n3"):
        pages.run(page, capsys)
    page.write_text("```console\n$ graphprune nothing\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: nothing"):
        pages.run(page, capsys)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("2"))
    assert pages.broken(page) == ["other.md", "#b-page"]


# -- the reference ----------------------------------------------------------------------------------------------------


def public():
    """Every public name, as the reference spells it."""
    for name in gp.__all__:
        value = getattr(gp, name)
        if isinstance(value, types.ModuleType):
            yield from (f"graphprune.{name}.{inner}" for inner in value.__all__ if getattr(gp, inner, None) is None)
        elif importlib.util.find_spec(f"graphprune.{name}") is not None:  # a module has that name too
            yield f"graphprune.{name}.{name}"
        else:
            yield f"graphprune.{name}"
    for name, value in vars(gp.cost).items():
        if getattr(value, "__module__", "") == "graphprune.cost" and isinstance(value, (type, types.FunctionType)):
            yield from () if name.startswith("_") else (f"graphprune.cost.{name}",)


def test_the_reference_lists_every_public_name_once():
    names = list(public())
    assert len(names) > 90
    assert [name for name in names if LISTED.count(name) != 1] == []


def test_the_reference_lists_nothing_that_is_not_there():
    for name in LISTED:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_warnings(tmp_path):
    command = sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=pages.ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    built = (tmp_path / "site" / "reference" / "pruning.html").read_text()
    assert 'id="graphprune.prune"' in built
