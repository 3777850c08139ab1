#!/usr/bin/env python3
"""Validates configurations that the calibration has not seen and prints the distribution of the errors.

    benches/validation_grid.py [path of the batchmax binary]

Needs a profile of this machine (`batchmax profile`) and a quiet machine. Standard library only.
"""
import json, statistics, subprocess, sys

BINARY = sys.argv[1] if len(sys.argv) > 1 else "target/release/batchmax"
POLICIES = ["full", "snapkv", "snapkv-after-prefill", "streaming-llm",
            "batch-max:budget=256,chunk=256", "batch-max:budget=50%,chunk=128"]
LOADS = [(1, 700, 40), (2, 1500, 64), (4, 400, 100), (3, 1100, 24)]

times, memories = [], []
for policy in POLICIES:
    for batch, isl, osl in LOADS:
        command = [BINARY, "validate", "--policy", policy, "--batch", str(batch), "--isl", str(isl),
                   "--osl", str(osl), "--tolerance", "10", "--json"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode not in (0, 1):
            sys.exit(f"{policy} {batch}x{isl}+{osl}: {run.stderr.strip()}")
        found = json.loads(run.stdout)
        measured = found["measured"]["prefill_s"] + found["measured"]["decode_s"]
        error = found["total_error"]
        times.append(abs(error))
        memories.append(abs(found["memory_error"]))
        print(f"{policy:34} {batch} x {isl:4} + {osl:3}  {measured:6.2f} s  time {error:+7.1%}"
              f"  memory {found['memory_error']:+7.1%}  KV equal: {found['kv_bytes_equal']}", flush=True)
for name, errors in (("time", times), ("memory", memories)):
    print(f"{name}: {len(errors)} runs, median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
