#!/usr/bin/env python3
"""Makes the goldens of tests/conformance.rs: tiny models of every family with weights from an integer hash, run by transformers.

    pip install torch transformers
    python3 tests/conformance/make.py [CASE ...]

Writes <case>/config.json as transformers saves it and <case>/golden.json. The weights are not stored: tests/conformance.rs
fills the same tensors from the same hash (see `fill`). `older`, where a case has it, is the same configuration in the
spelling that published checkpoints use.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
VOCAB = 96
NUM_TOKENS = 512
# Logits are kept behind prompts of these lengths: around blocks of 16, tiles of 64, windows and trained lengths.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 200, 512]
# Greedy continuations: of prompts of these lengths, so many tokens.
GREEDY_LENGTHS, GREEDY_TOKENS = [1, 40, 300], 24
# The two most likely tokens of every greedy step lie at least this far apart; another salt is tried where they do not.
MARGIN = 0.02

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def hash_name(name, salt):
    """FNV-1a over the salt's decimal digits, a colon and the name."""
    h = 0xCBF29CE484222325
    for byte in f"{salt}:{name}".encode():
        h = (h ^ byte) * 0x100000001B3 & MASK
    return h


def splitmix(key, n):
    """Outputs 1 to n of splitmix64 from `key`."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


def uniform(name, salt, n):
    """In [-1, 1), multiples of 2^-23."""
    return (splitmix(hash_name(name, salt), n) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def fill(name, shape, salt, norm_offset):
    """Matrices uniform with variance 1 / columns, lm_head and embedding larger, biases in [-0.25, 0.25), norms around 1."""
    u = uniform(name, salt, math.prod(shape))
    if "norm" in name:
        x = np.float32(0.25) * u + np.float32(1 - norm_offset)
    elif name.endswith("bias"):
        x = np.float32(0.25) * u
    elif "embed_tokens" in name:
        x = u
    else:
        gain = 4.0 if name.startswith("lm_head") else 1.0
        x = np.float32(gain * math.sqrt(3.0 / shape[-1])) * u
    return torch.from_numpy(x.reshape(shape))


def tokens(salt):
    return (splitmix(hash_name("tokens", salt), NUM_TOKENS) % np.uint64(VOCAB)).astype(np.int64)


BASE = dict(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=None,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75, original_max_position_embeddings=128,
    short_factor=[1 + 0.02 * i for i in range(12)], long_factor=[1.3**i for i in range(12)],
)  # fmt: skip


def rope(theta, **more):
    return dict(rope_parameters=dict(rope_theta=theta, rope_type=more.pop("kind", "default"), **more))


# case: class prefix, what differs from BASE, the context of each run (None: one run of all), the older spelling of rope.
CASES = {
    "llama2": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5, **rope(10000.0)), [512], {"rope_theta": 10000.0}),
    "llama31": (
        "Llama",
        dict(
            rms_norm_eps=1e-5, tie_word_embeddings=True,
            **rope(500000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        ),
        [512],
        {
            "rope_theta": 500000.0,
            "rope_scaling": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        },
    ),
    "llama_bias": ("Llama", dict(attention_bias=True, mlp_bias=True, **rope(10000.0)), [512], None),
    "llama_linear": (
        "Llama", dict(max_position_embeddings=128, **rope(10000.0, kind="linear", factor=4.0)), [512],
        {"rope_theta": 10000.0, "rope_scaling": dict(type="linear", factor=4.0)},
    ),
    "llama_dynamic": (
        "Llama", dict(max_position_embeddings=128, **rope(10000.0, kind="dynamic", factor=4.0)), [128, 512],
        {"rope_theta": 10000.0, "rope_scaling": dict(type="dynamic", factor=4.0)},
    ),
    "falcon3": ("Llama", dict(num_attention_heads=2, num_key_value_heads=1, head_dim=256, num_hidden_layers=2, **rope(1000042.0)), [512], {"rope_theta": 1000042}),
    "mistral": ("Mistral", dict(sliding_window=100, head_dim=32, **rope(10000.0)), [512], {"rope_theta": 10000.0}),
    "mistral_full": ("Mistral", dict(sliding_window=None, num_hidden_layers=2, **rope(1000000.0)), [512], {"rope_theta": 1000000.0}),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, use_sliding_window=False, **rope(1000000.0)), [512], {"rope_theta": 1000000.0}),
    "qwen2_yarn": (
        "Qwen2",
        dict(max_position_embeddings=128, **rope(1000000.0, kind="yarn", factor=4.0, original_max_position_embeddings=128)), [512],
        {"rope_theta": 1000000.0, "rope_scaling": dict(type="yarn", factor=4.0, original_max_position_embeddings=128)},
    ),
    "qwen2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=65, max_window_layers=1, **rope(10000.0)), [512], None),
    "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True, **rope(1000000.0)), [512], {"rope_theta": 1000000.0}),
    "phi3": ("Phi3", dict(sliding_window=90, **rope(10000.0)), [512], {"rope_theta": 10000.0, "rope_scaling": None}),
    "phi4_mini": (
        "Phi3", dict(sliding_window=None, tie_word_embeddings=True, original_max_position_embeddings=128, rope_parameters=LONGROPE), [128, 512],
        {
            "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "rope_scaling": dict(type="longrope", short_factor=LONGROPE["short_factor"], long_factor=LONGROPE["long_factor"]),
        },
    ),
    "olmo2": ("Olmo2", dict(rms_norm_eps=1e-6, **rope(500000.0)), [512], {"rope_theta": 500000}),
    "gemma2": ("Gemma2", dict(head_dim=32, query_pre_attn_scalar=48, sliding_window=64, num_hidden_layers=4, attn_logit_softcapping=5.0, final_logit_softcapping=8.0, **rope(10000.0)), [512], {"rope_theta": 10000.0}),
    "gemma3": (
        "Gemma3",
        dict(
            head_dim=32, query_pre_attn_scalar=32, sliding_window=50, num_hidden_layers=7,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            },
        ),
        [512],
        {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": dict(rope_type="linear", factor=8.0), "sliding_window_pattern": 6, "layer_types": None},
    ),
}  # fmt: skip


def build(case, salt):
    prefix, differs, _, _ = CASES[case]
    config_class = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_class)(**{**BASE, **differs}, attn_implementation="eager")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    offset = 1 if prefix.startswith("Gemma") else 0
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(fill(name, tuple(tensor.shape), salt, offset))
    model.config.architectures = [f"{prefix}ForCausalLM"]
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy(model, prompt):
    """Tokens and the least distance between the two best, every step from the whole text."""
    ids, least = list(prompt), math.inf
    for _ in range(GREEDY_TOKENS):
        top = torch.topk(logits_of(model, ids)[-1], 2)
        least = min(least, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], least


def make(case, salt):
    model, ids = build(case, salt), tokens(salt).tolist()
    contexts = CASES[case][2]
    runs, continuations = [], []
    for context in contexts:
        # Rules that look at the length of the call: one call for each length within the trained one, one for the longest.
        shortest = 0 if context == contexts[0] else contexts[0]
        lengths = [n for n in LENGTHS if shortest < n <= context and (len(contexts) == 1 or context == contexts[0] or n == context)]
        every = logits_of(model, ids[:context])
        rows = [[round(float(x), 5) for x in every[n - 1]] for n in lengths]
        runs.append(dict(context=context, lengths=lengths, logits=rows))
        # Behind the trained length the rule of `dynamic` changes with every token.
        for length in GREEDY_LENGTHS:
            fits = shortest < length and length + GREEDY_TOKENS <= context
            if not fits or (case == "llama_dynamic" and context != contexts[0]):
                continue
            out, least = greedy(model, ids[:length])
            if least < MARGIN:
                return None
            continuations.append(dict(context=context, length=length, tokens=out))
    return dict(salt=salt, tokens=ids, runs=runs, greedy=continuations)


def main(cases):
    for case in cases:
        for salt in range(200):
            golden = make(case, salt)
            if golden is not None:
                break
        else:
            sys.exit(f"{case}: no salt of 200 keeps the two best tokens apart")
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        model = build(case, golden["salt"])
        config = json.loads(model.config.to_json_string(use_diff=False))
        keep = set(json.loads(model.config.to_json_string())) | set(BASE) | {"architectures", "hidden_act", "head_dim"}
        config = {key: value for key, value in config.items() if key in keep}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        older = CASES[case][3]
        if older is not None:
            plain = {key: value for key, value in config.items() if key != "rope_parameters"}
            (folder / "config.older.json").write_text(json.dumps({**plain, **older}, indent=1) + "\n")
        made = dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
        text = json.dumps({**made, **golden}, separators=(",", ":"))
        (folder / "golden.json").write_text(text.replace("],[", "],\n[") + "\n")
        print(f"{case}: salt {golden['salt']}, {len(golden['greedy'])} continuations")


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
