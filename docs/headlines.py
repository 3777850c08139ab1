#!/usr/bin/env python3
"""What each system claims, what the simulator predicts for that setting, and what a run here shows at equal memory.

    docs/headlines.py [--binary PATH] [--repeats N] --less FILE [--out FILE.json] > table.md

The baseline (`full`) and the system run in turn, and ratios are medians over the repeats. Needs the default model and a profile
of this machine, and for LESS its networks (`batchmax prepare less --out FILE`). Standard library only.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

# System, what its authors report, the metric, the setting of the prediction, the policy there, its baseline, the policy here.
BATCH = ["--batch", "1,2,4,8,16,24,32,48,64,96,128,192,256,384,512,max"]
ONE = ["--batch", "1"]
SYSTEMS = [
    ("Batch-Max", "higher throughput where memory is short and prompts are long", "output_tok_s",
     ["--model", "llama-3.1-8b", "--gpu", "a10g", "--isl", "8k", "--osl", "256", *BATCH],
     "batch-max:budget=1024,chunk=1024", "full", "batch-max"),
    ("SpeCache", "decode throughput 4.6x, batch 12x (LLaMA-2-7B, A6000)", "decode_tok_s",
     ["--model", "llama-2-7b", "--gpu", "rtx-a6000", "--isl", "2k", "--osl", "512", *BATCH],
     "specache", "full", "specache"),
    ("DBudgetKV", "keeps 64 % of the cache (Llama-3-8B), chosen by the text", "output_tok_s",
     ["--model", "llama-3-8b", "--gpu", "a10g", "--isl", "4k", "--osl", "256", *BATCH],
     "dbudgetkv", "full", "dbudgetkv"),
    ("RocketKV", "decode 3.7x (Llama-3.1-8B, A100, batch 1, to 96k)", "tpot_s",
     ["--model", "llama-3.1-8b", "--gpu", "a100-sxm-80gb", "--isl", "96k", "--osl", "256", *ONE],
     "rocketkv", "full", "rocketkv"),
    ("FastKV", "prefill 1.82x (Llama-3.1-8B, 128k)", "ttft_s",
     ["--model", "llama-3.1-8b", "--gpu", "a100-sxm-80gb", "--isl", "127k", "--osl", "128", *ONE],
     "fastkv", "full", "fastkv"),
    ("ClusterKV", "decode 2.5x (32k, budget 1k to 2k)", "tpot_s",
     ["--model", "llama-3.1-8b", "--gpu", "rtx-6000-ada", "--isl", "32k", "--osl", "256", *ONE],
     "clusterkv:budget=1024", "full", "clusterkv"),
    ("RefreshKV", "whole run 1.12x (Llama-3.1-8B, A100, 16k, 256 out)", "total_s",
     ["--model", "llama-3.1-8b", "--gpu", "a100-sxm-80gb", "--isl", "16k", "--osl", "256", *ONE],
     "refreshkv", "full", "refreshkv"),
    ("KVSharer", "generation 1.3x, 30 % less cache (Llama-2-7B)", "output_tok_s",
     ["--model", "llama-2-7b", "--gpu", "a100-sxm-80gb", "--isl", "2k", "--osl", "512", *BATCH],
     "kvsharer:layers=10", "full", "kvsharer:layers=9"),
    ("ThinK", "20 % less cache; batch 1.25x over KIVI alone (Llama-2-7B)", "batch",
     ["--model", "llama-2-7b", "--gpu", "a100-sxm-80gb", "--isl", "160", "--osl", "338", *BATCH],
     "think+kivi:bits=2,residual=32", "kivi:bits=2,residual=32", "think"),
    ("CacheBlend", "time to first token 2.2x to 3.3x (Mistral-7B, A40)", "ttft_s",
     ["--model", "mistral-7b-v0.2", "--gpu", "a40", "--isl", "4k", "--osl", "32", *ONE],
     "cacheblend", "full", "cacheblend"),
    ("LESS", "throughput 1.7x, and four tokens of memory (Llama-2-7B)", "output_tok_s",
     ["--model", "llama-2-7b", "--gpu", "a100-sxm-80gb", "--isl", "2k", "--osl", "2k", *BATCH],
     "less:budget=10%", "full", "less"),
    ("KIVI", "batch 4x, throughput 2.35x to 3.47x (Llama-2-7B, A100)", "output_tok_s",
     ["--model", "llama-2-7b", "--gpu", "a100-sxm-80gb", "--isl", "160", "--osl", "338", *BATCH],
     "kivi:bits=2,residual=32", "full", "kivi:bits=2"),
]
NAMES = {"output_tok_s": "tokens/s", "decode_tok_s": "decode tokens/s", "tpot_s": "time per token", "ttft_s": "time to first token",
         "total_s": "whole run", "batch": "largest batch"}
HERE = ["--device", "cpu", "--isl", "1k", "--osl", "64"]
MEMORY = ["--kv-memory", "32MB"]

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--binary", default="target/release/batchmax")
options.add_argument("--repeats", type=int, default=3)
options.add_argument("--weight-dtype", help="type of the weights; it needs a profile of its own")
options.add_argument("--less", metavar="FILE", required=True, help="the preset that `prepare less` wrote")
options.add_argument("--out", help="keep the figures here (JSON); systems that it has already are not repeated")
options = options.parse_args()


def batchmax(*arguments):
    run = subprocess.run([options.binary, "--quiet", *arguments, "--json"], capture_output=True, text=True)
    if run.returncode not in (0, 1):
        return None, run.stderr.strip()
    return json.loads(run.stdout), ""


def gain(metric, policy, baseline):
    """How many times better: rates and batches up, times down."""
    ratio = policy[metric] / baseline[metric]
    return 1 / ratio if metric.endswith("_s") and not metric.endswith("tok_s") else ratio


def predicted(metric, setting, policy):
    found, error = batchmax("what-if", *setting, "--policy", policy)
    if found is None:
        sys.exit(f"{policy}: {error}")
    # The best of the batches that fit; the largest batch is not always the fastest.
    found = [a["answer"] for a in found["answers"] if a["answer"] and a["answer"]["fits"]]
    rows = [{"batch": f["batch"], **f["metrics"]} for f in found]
    return max(rows, key=lambda row: gain(metric, row, rows[0]))


def run_here(metric, policy):
    batch = ["--batch", "max"] if metric in ("output_tok_s", "decode_tok_s", "batch") else ["--batch", "1"]
    policy = options.less if policy == "less" else policy
    types = ["--weight-dtype", options.weight_dtype] if options.weight_dtype else []
    found, error = batchmax("validate", *HERE, *MEMORY, *batch, "--policy", policy, "--tolerance", "1000", *types)
    if found is None:
        sys.exit(f"{policy}: {error}")
    own = found["measured"]
    # Of equal numbers of tokens: the first ones come with the prefill.
    own |= {"ttft_s": own["prefill_s"], "tpot_s": own["decode_s"], "total_s": own["prefill_s"] + own["decode_s"]}
    return own, {"batch": own["batch"], **found["predicted"]["metrics"]}


rows = []
if options.out and os.path.exists(options.out):
    rows = json.load(open(options.out))["rows"]
for system, claim, metric, setting, policy, baseline, local in SYSTEMS:
    if any(r["system"] == system for r in rows):
        continue
    own, base = predicted(metric, setting, policy), predicted(metric, setting, baseline)
    there, batches_there = gain(metric, own, base), (base["batch"], own["batch"])
    measured, expected, batches = [], [], None
    for _ in range(options.repeats):
        base, base_expected = run_here(metric, "full")
        own, own_expected = run_here(metric, local)
        measured.append(gain(metric, own, base))
        expected.append(gain(metric, own_expected, base_expected))
        batches = (base["batch"], own["batch"])
    row = {"system": system, "claim": claim, "metric": NAMES[metric], "setting": " ".join(setting), "policy": policy,
           "baseline": baseline, "predicted_there": there, "batches_there": batches_there, "here": local, "batches_here": batches,
           "predicted_here": statistics.median(expected), "measured_here": statistics.median(measured),
           "spread_here": [min(measured), max(measured)]}
    rows.append(row)
    print(f"{system}: there {there:.2f}, here {row['measured_here']:.2f} (predicted {row['predicted_here']:.2f})", file=sys.stderr, flush=True)
    if options.out:
        with open(options.out, "w") as out:
            json.dump({"here": " ".join(HERE + MEMORY), "rows": rows}, out, indent=1)

print("| system | its authors report | metric | predicted for that setting (batches) | run here: batches | predicted here | measured here (spread) |")
print("|---|---|---|---|---|---|---|")
for r in rows:
    low, high = r["spread_here"]
    print(f"| {r['system']} | {r['claim']} | {r['metric']} | {r['predicted_there']:.2f}x ({r['batches_there'][0]}, {r['batches_there'][1]}) | {r['batches_here'][0]}, {r['batches_here'][1]} "
          f"| {r['predicted_here']:.2f}x | {r['measured_here']:.2f}x ({low:.2f} to {high:.2f}) |")
