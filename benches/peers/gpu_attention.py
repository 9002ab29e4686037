#!/usr/bin/env python3
"""Decode attention and a prompt's through PyTorch's scaled_dot_product_attention, at the shapes of `bench kernels --op paged_attention`.

Every branch has its KV in one piece of its own: SDPA knows neither pages nor shared prefixes, so it is what a shared prefix is compared with
too. The default backend, and with grouped heads as `enable_gqa` has them.
"""

import torch
import torch.nn.functional as F
from gpu_common import MODELS, Out, copies

OWN = 48


def tensors(sets, *shape):
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]


def main():
    out = Out()
    for name, m in MODELS.items():
        for branches in (1, 8, 64):
            for prefix in (0, 128, 1024, 4096):
                slots = prefix + OWN
                sets = copies(4 * branches * slots * m["kv"] * m["dim"])
                q = torch.randn(branches, m["q"], 1, m["dim"], device="cuda", dtype=torch.bfloat16)
                k, v = tensors(sets, branches, m["kv"], slots, m["dim"]), tensors(sets, branches, m["kv"], slots, m["dim"])
                run = lambda i: F.scaled_dot_product_attention(q, k[i], v[i], enable_gqa=True)
                kinds = ["own"] + ["shared"] * (branches > 1 and prefix > 0)
                out.case("SDPA", "paged_attention", [f"{name} B={branches} P={prefix} own={OWN} {kind}" for kind in kinds], run, sets)
                del q, k, v
        rows = 1024
        sets = copies(4 * rows * m["kv"] * m["dim"])
        q = torch.randn(1, m["q"], rows, m["dim"], device="cuda", dtype=torch.bfloat16)
        k, v = tensors(sets, 1, m["kv"], rows, m["dim"]), tensors(sets, 1, m["kv"], rows, m["dim"])
        run = lambda i: F.scaled_dot_product_attention(q, k[i], v[i], is_causal=True, enable_gqa=True)
        out.case("SDPA", "paged_attention", [f"{name} prompt of {rows}"], run, sets)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
