#!/usr/bin/env python3
"""`linear` against PyTorch, paired: for each shape the two run in turn, several times, on an idle machine.

    cargo bench --bench linear --no-run          # prints the path of the binary
    python benches/peers/linear_vs_torch.py BINARY [--rounds 3] [--rows 1,8,256] [--filter 7b] [--tile-tflops 7.7] [--json FILE]

Prints a Markdown table: best 10th percentile of either side in microseconds, torch over ours, the range of that ratio over the rounds,
and our floor: the bytes of W at the best plain read of these runs, or the operations at `--tile-tflops` if that takes longer.
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
        result = json.load(open(out.name))
    times = {c["rows"]: c["p10_us"] for c in result["cases"]}
    elems = next(c["in"] * c["out"] for c in result["cases"])
    return times, elems, result.get("read_gb_per_s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="1,8,256")
    parser.add_argument("--filter", default="")
    parser.add_argument("--tile-tflops", type=float, help="rate of a bare loop of tile products, all threads")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch = [sys.executable, os.path.join(os.path.dirname(__file__), "torch_linear.py")]
    cases = []
    print("| shape | rows | ours us | torch us | torch / ours | rounds | floor us | floor / ours |\n|---|---|---|---|---|---|---|---|")
    for shape in (s for s in SHAPES if args.filter in s):
        rounds = [(run([args.binary], args.rows, shape), run(torch, args.rows, shape)) for _ in range(args.rounds)]
        elems = rounds[0][0][1]
        read = max(ours[2] for ours, _ in rounds)
        for rows in map(int, args.rows.split(",")):
            pairs = [(ours[0][rows], theirs[0][rows]) for ours, theirs in rounds]
            ours, theirs = min(o for o, _ in pairs), min(t for _, t in pairs)
            ratios = sorted(t / o for o, t in pairs)
            floor = 2 * elems / read / 1e3
            if args.tile_tflops:
                floor = max(floor, 2 * elems * rows / args.tile_tflops / 1e6)
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"| {shape} | {rows} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.2f} | {spread} | {floor:.0f} | {100 * floor / ours:.0f} % |", flush=True)
            case = {"shape": shape, "rows": rows, "ours_us": ours, "torch_us": theirs, "ratios": ratios, "pairs_us": pairs}
            cases.append({**case, "read_gb_per_s": read, "floor_us": floor})
    if args.json:
        with open(args.json, "w") as f:
            json.dump(cases, f, indent=1)


if __name__ == "__main__":
    main()
