#!/usr/bin/env python3
"""torch.mm (cuBLAS) in a CUDA graph at the shapes of `bench kernels --op linear`, and the unembedding's statistics in plain PyTorch at those
of `--op entropy_probe`."""

import torch
from gpu_common import MODELS, Out, copies


def main():
    out = Out()
    for name, m in MODELS.items():
        q = m["q"] * m["dim"]
        matrices = [
            ("qkv", m["hidden"], q + 2 * m["kv"] * m["dim"]),
            ("o", q, m["hidden"]),
            ("gate_up", m["hidden"], 2 * m["intermediate"]),
            ("down", m["intermediate"], m["hidden"]),
            ("lm_head", m["hidden"], m["vocab"]),
        ]
        for matrix, k, n in matrices:
            sets = copies(2 * k * n)
            weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
            for rows in (1, 8, 16, 17, 64, 256, 1024):
                if rows > 16 and matrix == "lm_head":
                    continue
                x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
                run = lambda i: torch.mm(x, weights[i].T, out=y)
                op = "linear" if rows <= 16 else "linear_cublas"
                out.case("torch.mm", op, [f"{name} {matrix} {rows} x {k} -> {n}"], run, sets)
            if matrix == "lm_head":
                for rows in (8, 32, 104):
                    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                    out.case("torch", "entropy_probe", [f"{name} {rows} rows over {n}"], lambda i: statistics(x, weights[i]), sets)
            del weights


def statistics(x, w):
    logits = torch.mm(x, w.T).float()
    logprobs = torch.log_softmax(logits, -1)
    top = logits.topk(2, -1)
    return top.indices[:, 0], top.values[:, 0] - top.values[:, 1], -(logprobs.exp() * logprobs).sum(-1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
