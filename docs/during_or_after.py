#!/usr/bin/env python3
"""Table and plot of what a cut after every chunk costs against one cut after the prompt.

    batchmax quality --policy ... --chunked --context 1k,2k --budget 25% --out results.json
    docs/during_or_after.py results.json ... > table.md      # writes docs/during-or-after.svg, too

Differences are paired by sample; intervals are 90 % percentile bootstraps (10,000 resamples, fixed seed). Standard library
only.
"""
import json
import os
import random
import sys

rows = {}
for path in sys.argv[1:]:
    for row in json.load(open(path))["rows"]:
        # A chunk that was typed is part of the name; it has a column of its own.
        policy = row["policy"].split(":chunk=")[0]
        rows[policy, row["budget"], row["chunk"], row["context"]] = row


def interval(values):
    draw = random.Random(1)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(10_000))
    return means[500], means[9_499]


def mean(values):
    return sum(values) / len(values)


found = []
for (policy, budget, chunk, context), during in rows.items():
    after = rows.get((policy, budget, None, context))
    if chunk is None or after is None:
        continue
    entry = {"policy": policy, "context": context, "budget": budget, "chunk": chunk}
    for metric in ("kl", "digits"):
        apart = [d - a for d, a in zip(during[metric], after[metric])]
        entry[metric] = (mean(after[metric]), mean(during[metric]), mean(apart), *interval(apart))
    found.append(entry)
found.sort(key=lambda e: (e["policy"], e["context"], -float(e["budget"].rstrip("%")), e["chunk"]))

print("| policy | context | kept | chunk | KL after | KL during | difference (90 %) | digits after | during | difference (90 %) |")
print("|---|---|---|---|---|---|---|---|---|---|")
for e in found:
    k, d = e["kl"], e["digits"]
    print(f"| {e['policy']} | {e['context']} | {e['budget']} | {e['chunk']} | {k[0]:.3f} | {k[1]:.3f} | {k[2]:+.3f} ({k[3]:+.3f} to {k[4]:+.3f}) "
          f"| {d[0]:.2f} | {d[1]:.2f} | {d[2]:+.2f} ({d[3]:+.2f} to {d[4]:+.2f}) |")

# One row per policy, context, budget and chunk; on the left KL, on the right digits.
height, width, top = 22, 300, 56
plot = [f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{top + height * len(found) + 30}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="12" y="20" font-size="14">Cut after every chunk of the prompt, less one cut after the prompt: '
        'SmolLM2-135M; prompt tokens, share that stays, tokens of a chunk</text>']
for metric, left, label, worse in (("kl", 270, "KL(full || policy), nats", 1), ("digits", 630, "hidden digits found, share", -1)):
    most = 1.1 * max(max(abs(e[metric][3]), abs(e[metric][4])) for e in found)
    x = lambda v: left + width / 2 + v / most * width / 2
    plot.append(f'<text x="{left + width / 2}" y="44" text-anchor="middle">{label}</text>')
    bottom = top + height * len(found)
    for tick in (-most / 1.1, 0, most / 1.1):
        plot.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}" stroke="#ccc"/>')
        plot.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:+.2f}</text>')
    for i, e in enumerate(found):
        y = top + height * i + height / 2
        _, _, middle, low, high = e[metric]
        colour = "#555" if low <= 0 <= high else ("#b2182b" if middle * worse > 0 else "#2166ac")
        plot.append(f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        plot.append(f'<circle cx="{x(middle):.1f}" cy="{y}" r="4" fill="{colour}"/>')
for i, e in enumerate(found):
    y = top + height * i + height / 2 + 4
    plot.append(f'<text x="12" y="{y}">{e["policy"]}, {e["context"]}, {e["budget"]}, {e["chunk"]}</text>')
plot.append("</svg>")
out = os.path.join(os.path.dirname(os.path.abspath(__file__)), "during-or-after.svg")
with open(out, "w") as file:
    file.write("\n".join(plot) + "\n")
