#!/usr/bin/env python3
"""The results of a visit to a GPU as Markdown: `visit_table.py RESULTS`. Prints nothing where there are none."""

import json
import os
import sys


def lines(folder, stage):
    """Whole lines of a stage; one cut short by the end of the time is left out."""
    path = os.path.join(folder, stage + ".jsonl")
    if not os.path.exists(path):
        return []
    found = []
    for line in open(path):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return found


def table(header, rows):
    if rows:
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        print()


def number(x, digits=1):
    return "-" if x is None else f"{x:.{digits}f}"


def kernels(folder, peers):
    all_lines = lines(folder, "kernels")
    heads = [line for line in all_lines if "bench" in line and line.get("timed")]
    if not heads:
        return
    head = heads[0]
    print(f"{head['device']}, driver for CUDA {head['driver']}, commit {head['commit']}, {head['date']};", end=" ")
    print(f"a copy moves {head['copy_gb_s']:.0f} GB/s (read and write counted).\n")
    rows = []
    for case in all_lines:
        if "op" not in case:
            continue
        if case["failed"]:
            rows.append([case["op"], case["shape"], "failed: " + case["failed"], "", "", "", "", ""])
            continue
        us = case["us"]
        theirs = ", ".join(f"{peer} {t:.1f} ({t / us['p50']:.2f}x)" for peer, t in peers.get((case["op"], case["shape"]), []))
        share = f"{case['of_copy'] * 100:.0f} %"
        right = f"{case['error']:.0e}" if case["right"] else f"WRONG: {case['error']}"
        spread = f"{us['p10']:.1f} to {us['p90']:.1f}"
        rows.append([case["op"], case["shape"], number(us["p50"]), spread, share, number(case["tflops"]), right, theirs])
    table(["op", "shape", "us", "10 to 90 %", "of copy", "TFLOP/s", "error", "peers, us (over ours)"], rows)


def model(folder, peers):
    steps, ratios, agreements = [], [], []
    for line in lines(folder, "model"):
        if line.get("bench") == "agree":
            agreements.append([str(line[key]) for key in ("branches", "same", "close_calls", "different")])
        elif line.get("bench") == "decode":
            shape = line["model"].split(" ")[0]
            for case in line["cases"]:
                case_peers = peers.get(("decode", f"{shape} B={case['branches']} context={line['measured']['context']}"), [])
                theirs = ", ".join(f"{peer} {t:.2f} ({t / case['ms']['p50']:.2f}x)" for peer, t in case_peers)
                ms = case["ms"]
                share = f"{case['of_floor'] * 100:.0f} %"
                steps.append([shape, str(case["branches"]), number(ms["p50"], 2), number(case["floor_ms"], 2), share, theirs])
        elif line.get("bench") == "ladder":
            for name, ratio in line["ratios"].items():
                measured = ratio["measured"] if "measured" in ratio else ratio
                low_high = f"{measured['lo']:.2f} to {measured['hi']:.2f}"
                ratios.append([line["model"].split(" ")[0], name, f"{measured['value']:.2f}", low_high, f"{ratio['ceiling']:.2f}"])
    table(["branches", "the CPU's tokens", "close calls", "different"], agreements)
    table(["model", "branches", "ms/step", "floor", "of floor", "peers, ms (over ours)"], steps)
    table(["model", "policies", "ratio", "95 %", "ceiling"], ratios)


def checks(folder):
    found = lines(folder, "check")
    listed = [device for line in found if "devices" in line for device in line["devices"]["devices"]]
    results = [line["result"] for line in found if "result" in line]
    if results and any("compute_capability" in device for device in listed):
        print(f"Kernel tests on the GPU: {results.count('ok')} passed, {results.count('FAILED')} failed.\n")
    rows = [[line["tool"], line["control"], str(line.get("errors", "-"))] for line in lines(folder, "sanitize") if "tool" in line]
    table(["compute-sanitizer", "planted fault", "errors"], rows)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else "results"
    peers = {}
    for line in lines(folder, "peers"):
        if "op" in line and "failed" not in line:
            time = line["us"]["p50"] if "us" in line else line["ms"]["p50"]
            peers.setdefault((line["op"], line["shape"]), []).append((line["peer"], time))
    checks(folder)
    kernels(folder, peers)
    model(folder, peers)


if __name__ == "__main__":
    main()
