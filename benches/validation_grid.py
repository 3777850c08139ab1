#!/usr/bin/env python3
"""Validates every preset on loads that the calibration has not seen and prints the errors, by policy.

    benches/validation_grid.py [--binary PATH] [--policy NAME]... [--load BATCHxISL+OSL]... [--out FILE]

Needs the default model, a profile of this machine (`batchmax profile`) and a quiet machine. Loads are the outer loop, so that
a disturbance falls on all policies. A policy passes where its median error is at most 12 %, at the pace at which the machine runs
then (`validate` times what the profile has timed again, before and after). Standard library only.
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

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--binary", default="target/release/batchmax")
options.add_argument("--policy", action="append")
options.add_argument("--load", action="append")
options.add_argument("--out", help="where the runs go, one JSON object a line")
options = options.parse_args()


def batchmax(*arguments):
    run = subprocess.run([options.binary, *arguments, "--json"], capture_output=True, text=True)
    if run.returncode not in (0, 1):
        sys.exit(f"{' '.join(arguments)}: {run.stderr.strip()}")
    return json.loads(run.stdout)


policies = options.policy or [p["name"] for p in batchmax("policies")["policies"]] + SPARSER
out = open(options.out, "w") if options.out else None
times, phases, memories, unequal = {}, {}, [], []
for load in options.load or LOADS:
    batch, isl, osl = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", load).groups()
    for policy in policies:
        found = batchmax("validate", "--policy", policy, "--batch", batch, "--isl", isl, "--osl", osl, "--tolerance", "10")
        error = found["total_error"]
        at_pace = found["error_at_pace"]
        times.setdefault(policy, []).append((abs(error), abs(at_pace)))
        memories.append(abs(found["memory_error"]))
        if not found["kv_bytes_equal"]:
            unequal.append((policy, load))
        measured = found["measured"]["prefill_s"] + found["measured"]["decode_s"]
        print(f"{policy:34} {load:>12}  {measured:6.2f} s  time {error:+7.1%}  at its pace {at_pace:+7.1%}  memory {found['memory_error']:+7.1%}"
              f"  KV equal: {found['kv_bytes_equal']}", flush=True)
        if out:
            print(json.dumps({"policy": policy, "load": load, **found}), file=out, flush=True)

print()
worst = lambda errors, which: max(e[which] for e in errors)
median = lambda errors, which: statistics.median(e[which] for e in errors)
for policy, errors in sorted(times.items(), key=lambda entry: median(entry[1], 1)):
    print(f"{policy:34} median {median(errors, 0):6.1%}  worst {worst(errors, 0):6.1%}  at its pace {median(errors, 1):6.1%}"
          f"  worst {worst(errors, 1):6.1%}{'' if median(errors, 1) <= BAR else '  over the bar'}")
together = [error for errors in times.values() for error in errors]
for name, errors in (("time", [e[0] for e in together]), ("time at its pace", [e[1] for e in together]), ("memory", memories)):
    print(f"{name}: {len(errors)} runs, median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
print(f"KV bytes differ from the prediction: {unequal or 'nowhere'}")
