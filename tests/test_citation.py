"""CITATION.cff: what the software is called, and the papers whose methods it has."""

from __future__ import annotations

import re

import pytest

import graphprune as gp
from tests.pages import ROOT

yaml = pytest.importorskip("yaml")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
KINDS = {"conference-paper": "conference", "article": "journal"}


def test_the_software_is_named_as_it_is_packaged():
    packaged = (ROOT / "pyproject.toml").read_text()
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["message"]
    assert (CITATION["title"], CITATION["type"], CITATION["version"]) == ("graphprune", "software", gp.__version__)
    assert all(author["name"] for author in CITATION["authors"])
    assert f'license = "{CITATION["license"]}"' in packaged
    assert f'description = "{CITATION["abstract"].removesuffix(".")}"' in packaged


@pytest.mark.parametrize("paper", CITATION["references"], ids=lambda paper: paper["title"][:40])
def test_every_paper_says_who_wrote_it_where_and_for_what(paper):
    where = KINDS[paper["type"]]
    assert set(paper) == {"type", "title", "authors", where, "year", "notes"}
    assert paper["title"]
    assert paper["notes"]
    assert 2000 < paper["year"] < 2100
    for author in paper["authors"]:
        assert set(author) == {"family-names", "given-names"}
        assert all(isinstance(name, str) and name for name in author.values())


def test_every_paper_that_a_docstring_names_is_listed():
    listed = {(paper["authors"][0]["family-names"], paper["year"]) for paper in CITATION["references"]}
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "graphprune").rglob("*.py")))
    cited = re.findall(r"([A-Z]\w+) (?:et\s+al\.|and\s+[A-Z]\w+),?\s[^)(]*?((?:19|20)\d\d)\b", text)
    named = {(author, int(year)) for author, year in cited}
    assert len(named) > 12
    assert sorted(named - listed) == []
