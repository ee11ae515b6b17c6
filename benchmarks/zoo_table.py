"""The results of the zoo as Markdown: everything here is computed from the records, nothing is run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zoo_run import Results

Record = Mapping[str, Any]
OURS = "graphprune"
TOOLS = (OURS, "torch-pruning", "torch-kirigami")
STEPS = ("trace", "couple", "plan", "rewrite", "verify")
UNCHECKED = STEPS[:4]
PEER_STEPS = ("build", "prune")
ABSENT = ("skipped", "missing", "too_large")


def attempted(record: Record) -> bool:
    """Whether a tool was let loose on the model at all."""
    return not any(key in record for key in ABSENT)


def checked(record: Record, what: str) -> bool:
    """Whether the check says `what`: runs, same_shape or exact."""
    return bool(record.get("check", {}).get(what))


def exact(record: Record) -> bool:
    """Whether the pruned model was proved; of graphprune also that every group was halved and its own proof held."""
    ours = record["tool"] != OURS or bool(record.get("halved") and record.get("verified"))
    return checked(record, "exact") and ours


def seconds(record: Record, steps: Sequence[str]) -> float | None:
    """What these steps took together; None if one of them is missing."""
    found = [record.get("seconds", {}).get(step) for step in steps]
    return None if None in found else sum(found)


def whole(record: Record) -> float | None:
    """Seconds from a model to a smaller one without a check; None if there is none, or it is wrong.

    Of graphprune the four steps, if what they made verified; if an unchecked rewrite took another reading of the
    model's attributes, all of `gp.prune` with `verify=False`, which tries readings until one runs right.
    """
    if record["tool"] != OURS:
        return seconds(record, PEER_STEPS)
    if not exact(record):
        return None
    return seconds(record, UNCHECKED) if seconds(record, ("verify",)) is not None else seconds(record, ("unverified",))


def why(record: Record) -> str:
    """What stood in the way, in one line; empty if nothing."""
    for key in ABSENT:
        if key in record:
            return f"{key.replace('_', ' ')}: {record[key]}"
    return record.get("error") or record.get("check", {}).get("why", "")


def line(record: Record) -> str:
    """One line for the screen."""
    state = "exact" if exact(record) else f"NOT EXACT ({why(record) or 'not every group was halved'})"
    if not attempted(record):
        state = why(record)
    about = [record.get("emitter", ""), f"{record.get('groups', '')} groups" if "groups" in record else ""]
    took = f"{record['wall_s']:.1f} s" if "wall_s" in record else ""
    return f"{record['tool']:<14} {record['model']:<32} {' '.join(filter(None, [took, *about, state]))}"


# -- Markdown ----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(item).replace("|", "\\|") for item in row) + " |" for row in lines]


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def text(sections: Sequence[Results]) -> str:
    """The whole page."""
    sections = [s for s in sections if s.data["records"]]
    lines = [
        "# Zoo",
        "",
        "Written by `benchmarks/zoo.py`, which says what was run and how it was checked. Half of the channels of every",
        "group, random weights, nothing annotated; one process for each model and tool.",
        "",
        "## Summary",
        "",
        *summary(sections),
    ]
    for results in sections:
        name = results.data["section"]
        lines += [f"## {name}", "", *conditions(results), "", *own_table(results), *reasons(results)]
        lines += peer_table(results)
    return "\n".join(lines).rstrip() + "\n"


def conditions(results: Results) -> list[str]:
    """Versions, dates and settings that the records of a section were made under."""
    records = results.data["records"]
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record["versions"].items():
            found.setdefault(package, set()).add(version)
    dates = sorted({record["date"] for record in records})
    threads = ", ".join(str(n) for n in sorted({record["threads"] for record in records}))
    load = max(record["load_average"] for record in records)
    env = results.data["environment"]
    limits: dict[str, set[str]] = {}
    for record in records:
        if "limit_s" in record:
            limits.setdefault(record["tool"], set()).add(f"{record['limit_s']:g} s")
    limited = ", ".join(f"{tool} {' and '.join(sorted(seconds))}" for tool, seconds in limits.items())
    memory = sorted({record.get("memory_gib", env["memory_gib"]) for record in records})
    packages = ", ".join(f"{package} {' and '.join(sorted(v))}" for package, v in found.items())
    return [
        f"{packages}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; seed 0; {threads} thread(s), "
        f"{env['jobs']} process(es) at a time on {env['cpus']} CPUs ({env['machine']}), load average up to {load:.1f};",
        f"limits: {limited}; {' and '.join(f'{gib:g}' for gib in memory)} GiB.",
    ]


def summary(sections: Sequence[Results]) -> list[str]:
    """How many models each tool prunes exactly, by which emitter, and who is faster."""
    rows = []
    for results in sections:
        for tool in TOOLS:
            records = list(results.of(tool))
            tried = [r for r in records if attempted(r)]
            if not tried:
                continue
            over = sum("not done after" in r.get("error", "") for r in tried)
            counts = (sum(checked(r, w) for r in tried) for w in ("runs", "same_shape"))
            rows.append([results.data["section"], tool, len(tried), *counts, sum(map(exact, tried)), over])
    lines = table(["section", "tool", "models", "runs", "same shape", "exact", "over the time limit"], rows)
    lines += ["", "What graphprune emitted, over the exact ones, and what it has no rule for:", ""]
    for results in sections:
        tried = [r for r in results.of(OURS) if attempted(r)]
        emitters = Counter(r["emitter"] for r in tried if exact(r))
        errors = [max(r["check"]["error"], r["verified"]["error"]) for r in tried if exact(r)]
        unknown = Counter(op for r in tried for op in r.get("unknown", {}))
        pins = sum(r.get("unknown_pins", 0) for r in tried)
        spelt = ", ".join(f"{op} ({n} models)" for op, n in unknown.most_common()) or "none"
        emitted = ", ".join(f"{emitter} {n}" for emitter, n in emitters.most_common()) or "nothing"
        largest = number(max(errors, default=None), ".1e")
        lines.append(
            f"* {results.data['section']}: {emitted}; largest relative error {largest}; "
            f"traced {sum(bool(r.get('traced')) for r in tried)} of {len(tried)}; ops without a rule: {spelt}; "
            f"parts of parameters pinned by them: {pins}; recorded rather than exported: "
            f"{sum(r.get('front_end') == 'record' for r in tried)} of {len(tried)}; same groups when exported: "
            f"{sum(r.get('same_groups') is True for r in tried)} of {sum('same_groups' in r for r in tried)}"
        )
    return [*lines, "", *speed(sections), ""]


def speed(sections: Sequence[Results]) -> list[str]:
    """From a model to a smaller one, beside torch-pruning, over the models where that succeeds."""
    rows = []
    for results in sections:
        ours = {r["model"]: r for r in results.of(OURS)}
        for title, what in (("same shape", "same_shape"), ("exact", "exact")):
            theirs = {r["model"]: whole(r) for r in results.of("torch-pruning") if checked(r, what)}
            if not theirs:
                continue
            mine = {name: whole(ours[name]) if name in ours else None for name in theirs}
            both = [name for name in theirs if mine[name] is not None]
            faster = sum(mine[name] < theirs[name] for name in both)
            row: list[object] = [results.data["section"], title, len(theirs), len(both), faster]
            for times in (mine, theirs):
                known = [times[name] for name in both]
                row += [number(sum(known)), number(statistics.median(known) if known else None)]
            rows.append(row)
    if not rows:
        return []
    head = ["section", "torch-pruning is", "models", "graphprune too", "graphprune faster"]
    return [
        "Seconds from a model to a smaller one without a check: trace, couple, plan and rewrite, beside",
        "torch-pruning's build and prune, over the models where its result runs with the original's output shapes,",
        "and over those where it is exact. Sums and medians are over the models where graphprune is exact too. Where",
        "an unchecked rewrite took a wrong reading of the model's attributes, the time is `gp.prune(verify=False)`'s.",
        "",
        *table([*head, "sum", "median", "sum, torch-pruning", "median, torch-pruning"], rows),
    ]


def own_table(results: Results) -> list[str]:
    """What graphprune made of every model."""
    rows = []
    for r in results.of(OURS):
        found, proof = r.get("check", {}), r.get("verified", {})
        unknown = ", ".join(f"{op} x {n}" for op, n in r.get("unknown", {}).items()) or "-"
        rows.append(
            [
                f"{r['family']}: {r['model']}" if "family" in r else r["model"],
                number(r["params"] / 1e6 if "params" in r else None, ".1f"),
                "yes" if r.get("traced") else "-" if not attempted(r) else "no",
                r.get("groups", "-"),
                number(r.get("params_kept")),
                number(found.get("error"), ".1e"),
                number(proof.get("error"), ".1e"),
                "yes" if exact(r) else "-" if not attempted(r) else "no",
                r.get("emitter", "-"),
                *(number(r.get("seconds", {}).get(step)) for step in (*STEPS, "prune", "export")),
                r.get("front_end", "-"),
                {True: "yes", False: "NO"}.get(r.get("same_groups"), "-"),
                unknown,
                r.get("pinned", "-"),
            ]
        )
    head = ["model", "M params", "traced", "groups", "params kept", "error", "error, its own proof", "exact", "emitter"]
    more = ["prune", "export", "front end", "same groups when exported", "unknown ops", "pinned axes"]
    return [*table([*head, *STEPS, *more], rows), ""]


def reasons(results: Results) -> list[str]:
    """Why a model is not exact, and why an emitter was passed over."""
    failed, passed = [], []
    for r in results.of(OURS):
        if not exact(r):
            failed.append(f"* {r['model']}: {why(r) or 'not every group was halved'}")
        elif r.get("reason"):
            passed.append(f"* {r['model']}: {r['emitter']}, since {' '.join(r['reason'].split())}"[:300])
    lines = ["Left out or not exact:", "", *failed, ""] if failed else []
    return [*lines, *(["Why the same class was not kept, or what is limited:", "", *passed, ""] if passed else [])]


def peer_table(results: Results) -> list[str]:
    """What the other libraries made of every model."""
    peers = [tool for tool in TOOLS[1:] if any(True for _ in results.of(tool))]
    rows = []
    for tool in peers:
        for r in results.of(tool):
            marks = ("yes" if checked(r, w) else "no" for w in ("runs", "same_shape", "exact"))
            error = r.get("check", {}).get("error")
            times = (number(seconds(r, [step])) for step in PEER_STEPS)
            kept = number(r.get("params_kept"))
            rows.append([r["model"], tool, *marks, kept, number(error, ".1e"), *times, why(r)[:160]])
    head = ["model", "tool", "runs", "same shape", "exact", "params kept", "error", *PEER_STEPS, "why not"]
    return ["### Peers", "", *table(head, rows), ""] if rows else []
