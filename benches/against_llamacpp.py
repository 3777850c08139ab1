#!/usr/bin/env python3
"""This executor and llama.cpp in turn on the same loads, and a table of the ratios.

    benches/against_llamacpp.py --python PYTHON --model Q4_0.gguf [--model Q8_0.gguf] [--rounds 3] [--out FILE]
    benches/against_llamacpp.py --table FILE

PYTHON has llama-cpp-python; `benches/llamacpp_batch.py --requantise` makes the models. Each round runs every engine once on a
load, one after the other, so that a disturbance falls on all of them; the table shows medians and the peer's best format.
Standard library only.
"""
import argparse
import json
import pathlib
import statistics
import subprocess

# Batch, prompt, generated, whether the peer reads one prompt for all.
LOADS = [(1, 512, 64, 0), (1, 2048, 64, 0), (1, 4096, 64, 0), (8, 512, 64, 0), (32, 512, 32, 1), (8, 2048, 32, 1)]
# At equal memory for the caches: prompt, generated, MiB, requests. What does not fit together goes in waves.
EQUAL = [(2048, 64, 64, 8), (2048, 64, 128, 8), (4096, 64, 128, 4)]
# Bytes of a token's keys and values in f16.
TOKEN = 23_040

parser = argparse.ArgumentParser()
parser.add_argument("--binary", default="target/release/batchmax")
parser.add_argument("--python", default="python3")
parser.add_argument("--model", action="append", default=[])
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--load", action="append", type=int, help="indices of the loads; those at equal memory come last")
parser.add_argument("--out")
parser.add_argument("--table")
args = parser.parse_args()


def call(command):
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-300:]}


def ours(batch, isl, osl, *more):
    whole = [args.binary, "run", "--device", "cpu", "--json", "--quiet", "--isl", str(isl), "--osl", str(osl), "--batch", str(batch), *more]
    done = subprocess.run(whole, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-300:]}


def theirs(model, batch, isl, osl, *more):
    script = str(pathlib.Path(__file__).parent / "llamacpp_batch.py")
    flags = ["--batch", str(batch), "--isl", str(isl), "--osl", str(osl), *more]
    return call([args.python, script, model, *flags])


def plain(batch, isl, osl, read_one):
    # One prompt at a time in chunks, as the peer reads them.
    yield "ours", ours(batch, isl, osl, "--policy", "full:chunk=512", "--schedule", "staggered:1")
    for model in args.model:
        yield pathlib.Path(model).stem, theirs(model, batch, isl, osl, *(["--read-one"] if read_one else []))


def equal(isl, osl, mib, requests):
    memory = f"{mib}MiB"
    for name, policy in (("full", "full:chunk=512"), ("batch-max", "batch-max:budget=25%")):
        yield name, ours("max", isl, osl, "--policy", policy, "--kv-memory", memory)
    # The cells of a sequence are a multiple of 256.
    batch = min(requests, (mib << 20) // (-(-(isl + osl) // 256) * 256 * TOKEN))
    for model in args.model if batch else []:
        waves = -(-requests // batch)
        yield pathlib.Path(model).stem, theirs(model, batch, isl, osl, "--waves", str(waves))


def measure():
    cases = [("plain", load) for load in LOADS] + [("equal", load) for load in EQUAL]
    chosen = [c for i, c in enumerate(cases) if args.load is None or i in args.load]
    rows = []
    for kind, load in chosen:
        runs = {}
        for _ in range(args.rounds):
            for name, result in (plain if kind == "plain" else equal)(*load):
                runs.setdefault(name, []).append({k: result.get(k) for k in (
                    "prefill_s", "decode_s", "output_tok_s", "peak_rss_bytes", "batch", "error")})
        rows.append({"kind": kind, "load": load, "runs": runs})
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps(rows, indent=1))
    return rows


def median(runs, key):
    values = [r[key] for r in runs if r.get(key)]
    return statistics.median(values) if values else None


def ratio(a, b):
    return f"{a / b:.2f}x" if a and b else "-"


def table(rows):
    first = [r for r in rows if r["kind"] == "plain"]
    print("| batch x prompt + generated | reading, s | llama.cpp | ratio | generating, s | llama.cpp | ratio | memory, MB | llama.cpp |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in first:
        batch, isl, osl, _ = row["load"]
        own, peers = row["runs"]["ours"], {n: r for n, r in row["runs"].items() if n != "ours"}
        cells = []
        for key in ("prefill_s", "decode_s"):
            mine, (name, other) = median(own, key), min(((n, median(r, key)) for n, r in peers.items()), key=lambda p: p[1] or 9e9)
            cells += [f"{mine:.2f}", f"{other:.2f} ({name.split('.')[-1]})", ratio(other, mine)]
        held = [median(own, "peak_rss_bytes"), min(median(r, "peak_rss_bytes") for r in peers.values())]
        print(f"| {batch} x {isl} + {osl} | " + " | ".join(cells + [f"{h / 1e6:.0f}" for h in held]) + " |")
    second = [r for r in rows if r["kind"] == "equal"]
    if second:
        print("\n| prompt + generated, caches | full, tokens/s | batch-max | over full | llama.cpp | batch-max over it |")
        print("|---|---|---|---|---|---|")
    for row in second:
        isl, osl, mib, _ = row["load"]
        rate = {n: median(r, "output_tok_s") for n, r in row["runs"].items()}
        batches = {n: r[0].get("batch") for n, r in row["runs"].items()}
        peer = max((v for n, v in rate.items() if n not in ("full", "batch-max") and v), default=None)
        shown = lambda n: f"{rate[n]:.1f} ({batches[n]})" if rate.get(n) else "-"
        print(f"| {isl} + {osl}, {mib} MiB | {shown('full')} | {shown('batch-max')} | {ratio(rate.get('batch-max'), rate.get('full'))} "
              f"| {f'{peer:.1f}' if peer else 'does not fit'} | {ratio(rate.get('batch-max'), peer)} |")


table(json.loads(pathlib.Path(args.table).read_text()) if args.table else measure())
