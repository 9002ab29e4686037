#!/usr/bin/env python3
"""The cases of `benches/linear.rs` through PyTorch's `F.linear` in bf16, weights rotated through memory.

    OMP_NUM_THREADS=2 python benches/peers/torch_linear.py [--rows 1,8,256] [--json FILE]

`ONEDNN_VERBOSE=1` shows which instruction set torch dispatched to.
"""

import argparse
import json
import os
import time

import torch
import torch.nn.functional as F

SHAPES = [
    ("qwen2.5-0.5b qkv", 896, 1152),
    ("qwen2.5-0.5b o", 896, 896),
    ("qwen2.5-0.5b gate_up", 896, 9728),
    ("qwen2.5-0.5b down", 4864, 896),
    ("qwen2.5-1.5b qkv", 1536, 2048),
    ("qwen2.5-1.5b gate_up", 1536, 17920),
    ("qwen2.5-1.5b down", 8960, 1536),
    ("qwen2.5-7b qkv", 3584, 4608),
    ("qwen2.5-7b gate_up", 3584, 37888),
    ("qwen2.5-7b down", 18944, 3584),
]
# Weights rotate through at least this much, and twice the L3 that is visible: they are to come from memory.
MIN_ROTATE_MIB = 256


def l3_mib():
    """Size of the last-level cache as the system tells it; 0 if it does not."""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as f:
            return int(f.read().strip().rstrip("K")) >> 10
    except (OSError, ValueError):
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64,256,512")
    parser.add_argument("--filter", default="")
    parser.add_argument("--rotate-mib", type=int, default=max(MIN_ROTATE_MIB, 2 * l3_mib()))
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    cases = []
    for name, k, n in SHAPES:
        if args.filter not in name:
            continue
        copies = max(2, -(-(args.rotate_mib << 20) // (n * k * 2)))
        weights = [torch.randn(n, k).bfloat16() for _ in range(min(copies, 4))]
        weights += [weights[i % 4].clone() for i in range(copies - len(weights))]
        for rows in map(int, args.rows.split(",")):
            x = torch.randn(rows, k).bfloat16()
            with torch.inference_mode():
                begin = time.perf_counter()
                samples, i = [], 0
                while len(samples) < 10 or (time.perf_counter() - begin < 0.6 and len(samples) < 300):
                    start = time.perf_counter()
                    F.linear(x, weights[i % copies])
                    samples.append(time.perf_counter() - start)
                    i += 1
            timed = sorted(samples[2:])
            us, p10 = timed[len(timed) // 2] * 1e6, timed[len(timed) // 10] * 1e6
            gbps, gflops = n * k * 2 / us / 1e3, 2 * n * k * rows / us / 1e3
            print(f"linear | {name} {k}->{n} bf16 torch | {rows} | {us:.1f} | {p10:.1f} | {gbps:.1f} | {gflops:.0f}", flush=True)
            cases.append({"shape": name, "in": k, "out": n, "rows": rows, "us": us, "p10_us": p10})
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"engine": f"torch {torch.__version__}", "cases": cases}, f, indent=1)


if __name__ == "__main__":
    main()
