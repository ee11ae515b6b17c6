"""Pages of documentation, read as programs: what they run, what they say is printed, and where they link to."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graphprune import cli

ROOT = Path(__file__).parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(page: Path, capsys: pytest.CaptureFixture[str], *, commands: bool = True) -> tuple[dict[str, Any], str]:
    """Run the Python blocks of a page in one namespace, and return that and all that they printed.

    With `commands`, lines of a `console` block that begin with `$ graphprune` are run too, and must succeed. A `text`
    block is what the block or the command before it printed, with `...` for what differs between runs.
    """
    text = page.read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed: list[str] = []
    for block in BLOCK.finditer(text):
        kind, content = block.groups()
        line = text.count("\n", 0, block.start(2))
        if kind == "python":  # at its own lines of the page, for tracebacks and messages that quote code
            exec(compile("\n" * line + content, str(page), "exec"), scope)
            printed.append(capsys.readouterr().out)
        elif kind == "console" and commands:
            for command in re.findall(r"^\$ graphprune (.*)$", content, re.MULTILINE):
                done = CliRunner().invoke(cli.app, shlex.split(command, comments=True))
                assert done.exit_code == 0, f"{page.name}:{line}: {command}\n{done.output}"
                printed.append(done.stdout)
        elif kind == "text":
            same = doctest.OutputChecker().check_output(content, printed[-1], OPTIONS)
            assert same, f"{page.name}:{line}: printed\n{printed[-1]}\nthe page says\n{content}"
    return scope, "".join(printed)


def links(page: Path) -> list[str]:
    """Where a page links to, but for other sites."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]


def anchors(page: Path) -> set[str]:
    """What can follow `#` in a link to a page: its headings, as MkDocs and GitHub spell them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    found = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found
