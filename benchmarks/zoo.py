"""How many networks of timm, torchvision and transformers are pruned exactly, beside what other libraries make of them.

    python benchmarks/zoo.py                                   # every section, graphprune alone
    python benchmarks/zoo.py --peers                           # torch-pruning and torch-kirigami on the same models
    python benchmarks/zoo.py --section timm --only resnet vit_tiny_patch16_224 --resume
    python benchmarks/zoo.py --table                           # write the tables anew from the JSON

The peers are not dependencies; `pip install torch-pruning==1.6.1 torch-kirigami==0.2.1` brings them.
One that is missing is recorded as missing.

Every model has random weights (nothing is downloaded) and is given to every tool as it is: half of the channels of
every group, ranked by magnitude, in eval mode, with nothing annotated. Each (model, tool) runs in a process of its own
under a limit of time and memory; results go to `results/zoo_SECTION.json` as they come, and the tables to
`results/zoo.md`. Without `--resume`, what is asked for is measured anew.

Models
  timm          of every family (`timm.list_modules()`) the architecture with the fewest parameters, if it has less than
                `--limit-params`; with `--all` every architecture below it.
  torchvision   every model of `list_models()`. Of a detection model the tensor part: `zoo_models.Dense` maps images to
                backbone features and runs the dense head (the region proposal head, or the class and box heads) on
                them; `zoo_models.RoiHeads`, listed as NAME/roi_heads, runs the box, mask and keypoint heads on given
                region features. What lies between depends on values. Quantised models are skipped.
  transformers  one tiny random configuration of each architecture in `zoo_models.TRANSFORMERS`.

The check, the same for all tools (`zoo_check`)
  The original's parameters are given values that tell channels apart, so what a tool removed is read off the values it
  kept. The original with those positions set to zero must give the same outputs: relative error at most 1e-9 in
  float64, 1e-5 where the model's code rounds to float32, 1e-4 where it does not run in float64. `runs` means that the
  forward gives something, `same shape` that outputs have the original's shapes, `exact` that they agree and that
  zeroing moved them. A tool that narrows what a LayerNorm takes statistics over may run without being exact.

The peers get what they derive by themselves. torch-pruning is also told to leave alone the layers that the outputs come
out of (in its documentation the classifier), and to take every tensor of an output. torch-kirigami protects inputs and
outputs itself; it is asked with the strategy of its documentation, `Greedy(GroupMagnitude(p=2))`.

Seconds are of one run, after a small network that pays for imports, with the packages loaded before. `unchecked` is
trace + couple + plan + rewrite with the emitter that `gp.prune` chose, and compares with torch-pruning's build + prune.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zoo_models
import zoo_table
import zoo_tools
from zoo_run import Record, Results, preload, supervise

SECTIONS = ("timm", "torchvision", "transformers")
PEERS = ("torch-pruning", "torch-kirigami")
COUNTING_LIMIT = 3600.0
"""Seconds that counting the parameters of all of timm may take."""


@dataclass(frozen=True)
class Job:
    """One model for one tool; `about` goes into its record."""

    section: str
    model: str
    tool: str
    about: Mapping[str, Any]


def ready(report: Any) -> None:
    """Nothing: the first worker waits until the packages are loaded, and that is no model's time."""


def count(only: list[str], report: Any) -> None:
    """Parameters of timm's architectures, counted in a worker since it loads every one of them."""
    report({"sizes": zoo_models.timm_sizes(only)})


def listed(section: str, args: argparse.Namespace, results: Results) -> Iterator[tuple[str, Record]]:
    """The models of a section that were asked for, and what is known about each beforehand."""
    if section == "timm":
        yield from _timm(args, results)
        return
    names = zoo_models.torchvision_names() if section == "torchvision" else list(zoo_models.TRANSFORMERS)
    for name in names:
        if not args.only or name in args.only or name.partition("/")[0] in args.only:
            yield name, {}


def _timm(args: argparse.Namespace, results: Results) -> Iterator[tuple[str, Record]]:
    version = zoo_tools.versions("timm", "graphprune").get("timm")
    sizes = results.data.get("sizes") if results.data.get("sizes_of") == version else None
    if sizes is None:
        print("counting the parameters of timm's architectures", flush=True)
        found = supervise(count, (args.only,), seconds=COUNTING_LIMIT, memory=args.memory * 2**30)
        if "sizes" not in found:
            raise SystemExit(f"timm's architectures could not be counted: {found.get('error')}")
        sizes = found["sizes"]
        if not args.only:
            results.data |= {"sizes": sizes, "sizes_of": version}
    for family, members in sizes.items():
        chosen = [name for name in args.only if name in members]
        if not args.only or family in args.only:
            ordered = sorted(members, key=lambda name: (members[name], name))
            chosen += ordered if args.all else ordered[:1]
        for name in dict.fromkeys(chosen):
            yield name, {"family": family, "params": members[name]}


def jobs(section: str, args: argparse.Namespace, results: Results) -> Iterator[Job]:
    """What is to be run, without what `--resume` finds done."""
    for name, about in listed(section, args, results):
        for tool in ("graphprune", *args.peers):
            if not (args.resume and results.done(name, tool, zoo_tools.versions(section, tool))):
                yield Job(section, name, tool, about)


def run(job: Job, args: argparse.Namespace, stop: threading.Event) -> Record:
    """The record of a job."""
    record: Record = {"model": job.model, "tool": job.tool, **job.about}
    record |= {"versions": zoo_tools.versions(job.section, job.tool), "seed": 0, "threads": args.threads}
    record |= {"date": datetime.date.today().isoformat(), "load_average": os.getloadavg()[0]}
    record |= {"memory_gib": args.memory}
    if reason := zoo_tools.missing(job.tool):
        return record | {"missing": reason}
    if job.about.get("params", 0) >= args.limit_params * 1e6:
        return record | {"too_large": f"{job.about['params'] / 1e6:.0f} M parameters"}
    limited = {} if job.tool == "graphprune" else {"steps": ("build", "prune"), "step_seconds": args.peer_limit}
    return (record | {"limit_s": limited.get("step_seconds", args.limit)}) | supervise(
        zoo_tools.measure,
        (job.section, job.model, job.tool, args.threads),
        seconds=args.limit,
        memory=args.memory * 2**30,
        stop=stop,
        **limited,
    )


def run_section(section: str, args: argparse.Namespace) -> None:
    """Run what is asked for of a section, writing each result as it comes."""
    results = Results(args.out / f"zoo_{section}.json", section)
    if not args.resume and not args.only:
        results.clear()
    todo = list(jobs(section, args, results))
    results.data["environment"] = environment(args)
    results.write()
    stop, start = threading.Event(), time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, job, args, stop) for job in todo]
        try:
            for k, future in enumerate(as_completed(futures), start=1):
                record = future.result()
                results.put(record)
                minutes = (time.perf_counter() - start) / 60
                print(f"{section} {k}/{len(todo)} {minutes:5.1f} min  {zoo_table.line(record)}", flush=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def environment(args: argparse.Namespace) -> Record:
    """What the numbers of the latest run depend on, without naming the machine."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "device": "cpu",
        "jobs": args.jobs,
        "memory_gib": args.memory,
        "limit_params_millions": args.limit_params,
    }


def main() -> None:
    """Run the sections asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="which sections to run")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models or timm families alone")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="run these too; both if none is named")
    parser.add_argument("--all", action="store_true", help="every architecture of timm, not one of each family")
    parser.add_argument("--resume", action="store_true", help="skip what the results hold for the same versions")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables from the results")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one model and tool may take")
    parser.add_argument(
        "--peer-limit", type=float, default=120, help="seconds that another library may take for its own steps"
    )
    parser.add_argument("--memory", type=float, default=10, help="GiB a process may hold")
    parser.add_argument("--limit-params", type=float, default=95, help="millions of parameters, from which timm's are")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; more than one disturbs the timing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    args.peers = list(PEERS) if args.peers == [] else (args.peers or [])
    preload("zoo_tools", "timm", "torchvision", "transformers", "torch_pruning", "torch_kirigami")
    try:
        if not args.table:
            supervise(ready, (), seconds=COUNTING_LIMIT, memory=float("inf"))
        for section in () if args.table else args.section:
            run_section(section, args)
    except KeyboardInterrupt:
        print("interrupted; what was done is kept, and --resume goes on from there", flush=True)
    text = zoo_table.text([Results(args.out / f"zoo_{section}.json", section) for section in SECTIONS])
    (args.out / "zoo.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
