#!/usr/bin/env python3
"""Validates every preset on loads that the calibration has not seen, and prints a table of the errors, by policy.

    benches/validation_grid.py [--binary PATH] [--policy NAME]... [--load BATCHxISL+OSL[@SCHEDULE][~SPREAD]]... [--device DEVICE] [--threads N] [--less FILE] [--out FILE]
    benches/validation_grid.py --table FILE...       # only the table, of runs that --out wrote

Needs the default model, a profile of this machine (`batchmax profile`) and a quiet machine. Loads are the outer loop, so that
a disturbance falls on all policies. A policy passes where its median error is at most 12 %; beside it stands the error at the
pace at which the machine runs then (`validate` times what the profile has timed again, before and after). LESS needs its
networks: `batchmax prepare less --out FILE`. Standard library only.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys

BAR = 0.12
LOADS = ["1x700+40", "2x1500+64", "4x400+100", "3x1100+24"]
SPARSER = ["batch-max:budget=256,chunk=256", "batch-max:budget=50%,chunk=128"]


def median(runs, key):
    return statistics.median(abs(run[key]) for run in runs)


def nine_of_ten(runs, key):
    return sorted(abs(run[key]) for run in runs)[int(0.9 * (len(runs) - 1))]


def matched(run):
    """Every kind of op that ran was predicted, and the other way round."""
    return all(row["predicted"] > 0 and row["measured"] > 0 for row in run["comparison"]["rows"])


def table(runs):
    by_policy = {}
    for run in runs:
        by_policy.setdefault(run["policy"], []).append(run)
    loads = list(dict.fromkeys(run["load"] for run in runs))
    print(f"| policy | {' | '.join(loads)} | median | at the machine's pace | memory | KV bytes | op kinds |")
    print("|---" * (len(loads) + 6) + "|")
    for policy, own in sorted(by_policy.items()):
        cells = [", ".join(f"{r['total_error']:+.1%}" for r in own if r["load"] == load) for load in loads]
        over = "" if median(own, "total_error") <= BAR else " (over the bar)"
        equal = "equal" if all(r["kv_bytes_equal"] for r in own) else "differ"
        alike = "matched" if all(map(matched, own)) else "differ"
        print(f"| {policy} | {' | '.join(cells)} | {median(own, 'total_error'):.1%}{over} | {median(own, 'error_at_pace'):.1%} "
              f"| {median(own, 'memory_error'):.1%} | {equal} | {alike} |")
    time, paced = (f"{median(runs, key):.1%}, nine of ten within {nine_of_ten(runs, key):.1%}" for key in ("total_error", "error_at_pace"))
    print(f"\n{len(runs)} runs: error of the time, median {time}; at the machine's pace {paced}; "
          f"of the process's memory {median(runs, 'memory_error'):.1%}.")
    kinds(runs)


def kinds(runs):
    """Errors of each kind of op, over the runs in which it takes 1 % of the time or more."""
    errors = {}
    for run in runs:
        rows = run["comparison"]["rows"]
        total = sum(row["measured"] for row in rows)
        for row in rows:
            if row["measured"] >= 0.01 * total:
                errors.setdefault((row["phase"], row["family"]), []).append(row["error"])
    print("\n| phase | kind of op | runs | median error | nine of ten within | bias |\n|---|---|---|---|---|---|")
    for (phase, family), own in sorted(errors.items(), key=lambda e: -len(e[1])):
        sizes = sorted(map(abs, own))
        print(f"| {phase} | {family} | {len(own)} | {statistics.median(sizes):.1%} | {sizes[int(0.9 * (len(sizes) - 1))]:.1%} | {statistics.median(own):+.1%} |")


def batchmax(*arguments):
    run = subprocess.run([options.binary, *arguments, "--json"], capture_output=True, text=True)
    if run.returncode not in (0, 1):
        sys.exit(f"{' '.join(arguments)}: {run.stderr.strip()}")
    return json.loads(run.stdout)


def validated(policies):
    out = open(options.out, "a") if options.out else None
    types = ["--device", options.device]
    types += ["--weight-dtype", options.weight_dtype] if options.weight_dtype else []
    types += ["--threads", options.threads] if options.threads else []
    for load in options.load or LOADS:
        batch, isl, osl, schedule, spread = re.fullmatch(r"(\d+)x(\d+)\+(\d+)(?:@([^~]+))?(?:~(.+))?", load).groups()
        more = [*(["--schedule", schedule] if schedule else []), *(["--osl-spread", spread] if spread else [])]
        for policy in policies:
            preset = options.less if policy == "less" else policy
            found = batchmax("validate", "--policy", preset, "--batch", batch, "--isl", isl, "--osl", osl, "--tolerance", "10", *types, *more)
            run = {"policy": policy, "load": load, **found}
            print(f"{policy:34} {load:>12}  time {run['total_error']:+7.1%}  at its pace {run['error_at_pace']:+7.1%}", file=sys.stderr)
            if out:
                print(json.dumps(run), file=out, flush=True)
            yield run


options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--binary", default="target/release/batchmax")
options.add_argument("--policy", action="append")
options.add_argument("--load", action="append")
options.add_argument("--weight-dtype", help="type of the weights; it needs a profile of its own")
options.add_argument("--device", default="cpu", help="what of this machine runs")
options.add_argument("--threads", help="CPU threads; their number needs a profile of its own")
options.add_argument("--less", metavar="FILE", help="the preset that `prepare less` wrote; without it LESS is passed over")
options.add_argument("--out", help="file to which the runs are added, one JSON object a line")
options.add_argument("--table", nargs="+", metavar="FILE", help="print what --out wrote as a table, and run nothing")
options = options.parse_args()

if options.table:
    table([json.loads(line) for path in options.table for line in open(path)])
else:
    policies = options.policy or [p["name"] for p in batchmax("policies")["policies"]] + SPARSER
    if not options.less and "less" in policies:
        print("less is passed over: no --less FILE", file=sys.stderr)
        policies.remove("less")
    table(list(validated(policies)))
