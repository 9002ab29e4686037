#!/usr/bin/env python3
"""`linear` against PyTorch, paired: for each shape the two run in turn, several times, on an idle machine.

    cargo bench --bench linear --no-run          # prints the path of the binary
    python benches/peers/linear_vs_torch.py BINARY [--rounds 3] [--rows 1,8,256] [--json FILE]

Prints a Markdown table: best 10th percentile of either side in microseconds, torch over ours, and the range of that ratio over the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

SHAPES = ["0.5b qkv", "0.5b o", "0.5b gate_up", "0.5b down", "1.5b qkv", "1.5b gate_up", "1.5b down", "7b qkv", "7b gate_up", "7b down"]


def run(command, rows, shape):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        args = command + ["--rows", rows, "--filter", shape, "--json", out.name]
        subprocess.run(args, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"})
        return {c["rows"]: c["p10_us"] for c in json.load(open(out.name))["cases"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="1,8,256")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch = [sys.executable, os.path.join(os.path.dirname(__file__), "torch_linear.py")]
    cases = []
    print("| shape | rows | ours us | torch us | torch / ours | rounds |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        rounds = [(run([args.binary], args.rows, shape), run(torch, args.rows, shape)) for _ in range(args.rounds)]
        for rows in map(int, args.rows.split(",")):
            ours, theirs = min(o[rows] for o, _ in rounds), min(t[rows] for _, t in rounds)
            ratios = sorted(t[rows] / o[rows] for o, t in rounds)
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"| {shape} | {rows} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.2f} | {spread} |", flush=True)
            cases.append({"shape": shape, "rows": rows, "ours_us": ours, "torch_us": theirs, "ratios": ratios})
    if args.json:
        with open(args.json, "w") as f:
            json.dump(cases, f, indent=1)


if __name__ == "__main__":
    main()
