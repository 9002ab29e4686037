#!/usr/bin/env python3
"""Decode steps of transformers with a static cache and torch.compile(mode="reduce-overhead"), random weights, at the shapes and contexts of
`rksc-run bench decode`. Branches are a batch whose prompts are copies: transformers shares nothing between them."""

import inspect
import time

import torch
from gpu_common import MODELS, Out, percentiles

CONTEXT, STEPS, WARM_UP = 1024, 32, 8


def model(m):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, kind = (Qwen2Config, Qwen2ForCausalLM) if m["family"] == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    config = config(
        hidden_size=m["hidden"], intermediate_size=m["intermediate"], num_hidden_layers=m["layers"], num_attention_heads=m["q"],
        num_key_value_heads=m["kv"], vocab_size=m["vocab"], max_position_embeddings=8192, tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return kind(config).eval()


def decode(model, branches):
    from transformers import StaticCache

    length = CONTEXT + WARM_UP + STEPS + 2
    try:
        cache = StaticCache(config=model.config, max_cache_len=length)
    except TypeError:  # older releases
        cache = StaticCache(model.config, branches, length, "cuda", torch.bfloat16)
    takes_cache_position = "cache_position" in inspect.signature(model.forward).parameters

    def at(positions):
        given = dict(position_ids=positions.expand(branches, -1), past_key_values=cache, use_cache=True)
        return given | (dict(cache_position=positions) if takes_cache_position else {})

    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT), device="cuda").expand(branches, -1)
    prompt = model(ids, **at(torch.arange(CONTEXT, device="cuda")), logits_to_keep=1)
    token = prompt.logits[:, -1:].argmax(-1)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    samples = []
    for i in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        token = step(token.clone(), **at(torch.tensor([CONTEXT + i], device="cuda"))).logits[:, -1:].argmax(-1)
        token.tolist()  # one read-back a step, as here
        if i >= WARM_UP:
            samples.append((time.perf_counter() - started) * 1e3)
    return samples


def main():
    out = Out()
    try:
        import transformers
    except ImportError:
        return out.write(peer="transformers", skipped="not installed")
    out.write(peer="transformers", version=transformers.__version__)
    for name, m in MODELS.items():
        made = model(m)
        for branches in (1, 8, 64):
            case = dict(peer="transformers", op="decode", shape=f"{name} B={branches} context={CONTEXT}")
            try:
                out.write(**case, ms=percentiles(decode(made, branches)))
            except Exception as error:
                out.write(**case, failed=(str(error).splitlines() or [repr(error)])[0])
            torch._dynamo.reset()
        del made
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
