"""Writes the checkpoints that tests/checkpoints.rs reads, and what every matrix in them stands for.

    python3 tests/checkpoints/make.py

Needs numpy and nothing else. Each folder is a Llama of one layer whose projections are rounded from seeded weights and
packed as the format's own tools pack them; expected.json holds, for every projection, the SHA-256 of its elements in f32
([out, in], little-endian) and a few of them as bits. The same bytes come out on every run.
"""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SMALL = {"hidden": 64, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 32}
NARROW = {**SMALL, "intermediate": 64}
BLOCKS = {**SMALL, "hidden": 160, "intermediate": 32}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


# ---- numbers ----------------------------------------------------------------------------------------------------------


def splitmix(seed, count):
    """count 64-bit numbers of splitmix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def bell(seed, shape, size):
    """Sums of four uniform numbers, about `size` in spread."""
    bits = splitmix(seed, int(np.prod(shape))).reshape(shape)
    parts = [((bits >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.float64) / 65536 - 0.5 for i in range(4)]
    return (sum(parts) * size * 1.7).astype(np.float32)


def order(seed, count):
    return np.argsort(splitmix(seed, count), kind="stable")


def to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def e4m3_table():
    """The numbers of codes 0 to 126, from the definition: bias 7, no infinities."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, (code & 7) / 8
    return np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0)).astype(np.float32)


E4M3 = e4m3_table()


def to_e4m3(x):
    code = np.searchsorted((E4M3[1:] + E4M3[:-1]) / 2, np.abs(x)).astype(np.uint8)
    return code | np.where(x < 0, 0x80, 0).astype(np.uint8)


def from_e4m3(code):
    size = E4M3[code & 0x7F]
    return np.where(code & 0x80, -size, size).astype(np.float32)


# ---- files ------------------------------------------------------------------------------------------------------------

DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}


def tensor(array, dtype=None):
    array = np.ascontiguousarray(array)
    return {"dtype": dtype or DTYPES[array.dtype.name], "shape": list(array.shape), "bytes": array.tobytes()}


def write_safetensors(path, tensors):
    header, end = {}, 0
    # In order of alignment, so that a map can be used in place.
    names = sorted(tensors, key=lambda name: (-{"I64": 8, "I32": 4, "F32": 4, "F8_E4M3": 1}.get(tensors[name]["dtype"], 2), name))
    for name in names:
        start, end = end, end + len(tensors[name]["bytes"])
        header[name] = {"dtype": tensors[name]["dtype"], "shape": tensors[name]["shape"], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensors[name]["bytes"] for name in names)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def pack(codes, bits, axis, order=None):
    """Neighbours along `axis` in 32-bit words, from the low bits."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    codes = np.moveaxis(codes.astype(np.uint32), axis, 0)
    words = codes.reshape(codes.shape[0] // per_word, per_word, *codes.shape[1:])
    packed = np.zeros((words.shape[0], *words.shape[2:]), np.uint32)
    for place, element in enumerate(order):
        packed |= words[:, element] << np.uint32(bits * place)
    return np.moveaxis(packed, 0, axis).astype(np.uint32).view(np.int32)


# ---- formats: weight [out, in] -> tensors by ending, and what they stand for -------------------------------------------


def rounded(weight, bits, group_of, symmetric):
    """Codes [in, out], zeros and scales [groups, out], by rounding to nearest."""
    w, groups, top = weight.T, group_of.max() + 1, (1 << bits) - 1
    scales, zeros = np.zeros((groups, w.shape[1]), np.float16), np.zeros((groups, w.shape[1]), np.int64)
    for g in range(groups):
        rows = w[group_of == g]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if symmetric:
            scales[g], zeros[g] = 2 * np.maximum(-low, high) / top, (top + 1) // 2
        else:
            scales[g] = (high - low) / top
            zeros[g] = np.clip(np.rint(-low / scales[g].astype(np.float32)), 0, top)
    spread = scales.astype(np.float32)[group_of]
    codes = np.clip(np.rint(w / spread) + zeros[group_of], 0, top).astype(np.int64)
    dense = ((codes - zeros[group_of]).astype(np.float32) * spread).T
    return codes, zeros, scales, np.ascontiguousarray(dense)


def groups_of(columns, group, act_order_seed):
    group_of = np.arange(columns) // (columns if group == -1 else group)
    if act_order_seed is None:
        return group_of
    shuffled = np.zeros_like(group_of)
    shuffled[order(act_order_seed, columns)] = group_of
    return shuffled


def gptq(weight, input_seed, *, bits=4, group, symmetric, act_order, less_one):
    group_of = groups_of(weight.shape[1], group, input_seed if act_order else None)
    codes, zeros, scales, dense = rounded(weight, bits, group_of, symmetric)
    if less_one:
        zeros = np.where(zeros == 0, 1, zeros)  # 0 less one cannot be stored
        spread = scales.astype(np.float32)[group_of]
        dense = np.ascontiguousarray(((codes - zeros[group_of]).astype(np.float32) * spread).T)
    stored = zeros - 1 if less_one else zeros
    return {
        "qweight": tensor(pack(codes, bits, 0)),
        "qzeros": tensor(pack(stored, bits, 1)),
        "scales": tensor(scales),
        "g_idx": tensor(group_of.astype(np.int32)),
    }, dense


def awq(weight, _, *, group):
    codes, zeros, scales, dense = rounded(weight, 4, groups_of(weight.shape[1], group, None), False)
    return {
        "qweight": tensor(pack(codes, 4, 1, AWQ_ORDER)),
        "qzeros": tensor(pack(zeros, 4, 1, AWQ_ORDER)),
        "scales": tensor(scales),
    }, dense


def packed(weight, input_seed, *, group):
    """compressed-tensors; columns in another order where `input_seed` is even."""
    group_of = groups_of(weight.shape[1], group, input_seed if input_seed % 2 == 0 else None)
    codes, _, scales, _ = rounded(weight, 4, group_of, True)
    scales = to_bf16(scales.astype(np.float32))
    dense = ((codes - 8).astype(np.float32) * from_bf16(scales)[group_of]).T
    tensors = {
        "weight_packed": tensor(pack(codes.T, 4, 1)),
        "weight_scale": tensor(scales.T, "BF16"),
        "weight_shape": tensor(np.array(weight.shape, np.int64)),
    }
    if input_seed % 2 == 0:
        tensors["weight_g_idx"] = tensor(group_of.astype(np.int32))
    return tensors, np.ascontiguousarray(dense)


def fp8(weight, scale, spread, name):
    code = to_e4m3(weight / spread)
    return {"weight": tensor(code, "F8_E4M3"), name: scale}, from_e4m3(code) * spread


def fp8_tensor(weight, _):
    scale = np.float32(np.abs(weight).max() / 448)
    return fp8(weight, tensor(scale.reshape(())), np.full_like(weight, scale), "weight_scale")


def fp8_channel(weight, _):
    scale = to_bf16(np.abs(weight).max(1, keepdims=True) / 448)
    # Rounded down, a scale may be too small for the largest weight; the code is cut at 448.
    return fp8(weight, tensor(scale, "BF16"), np.broadcast_to(from_bf16(scale), weight.shape), "weight_scale")


def fp8_block(weight, _):
    out, inside = weight.shape
    scale = np.zeros((-(-out // 128), -(-inside // 128)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = np.abs(weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]).max() / 448
    spread = scale.repeat(128, 0)[:out].repeat(128, 1)[:, :inside]
    return fp8(weight, tensor(scale), spread, "weight_scale_inv")


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def compressed(format, weights):
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def gptq_config(**fields):
    return {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True, "lm_head": False, "damp_percent": 0.01, **fields}


# name: (shape, quantization_config, packing of a projection, projections left dense)
CHECKPOINTS = {
    "gptq": (
        SMALL,
        gptq_config(group_size=32),
        lambda w, s: gptq(w, s, group=32, symmetric=True, act_order=False, less_one=True),
        [],
    ),
    "gptq-act-order": (
        SMALL,
        gptq_config(group_size=32, desc_act=True, sym=False, checkpoint_format="gptq", pack_dtype="int32"),
        lambda w, s: gptq(w, s, group=32, symmetric=False, act_order=True, less_one=True),
        [],
    ),
    "gptq-v2": (
        SMALL,
        gptq_config(group_size=64, sym=False, checkpoint_format="gptq_v2"),
        lambda w, s: gptq(w, s, group=64, symmetric=False, act_order=False, less_one=False),
        [],
    ),
    "gptq-8-bit": (
        NARROW,
        gptq_config(bits=8, group_size=-1),
        lambda w, s: gptq(w, s, bits=8, group=-1, symmetric=True, act_order=False, less_one=True),
        ["v"],
    ),
    "awq": (
        SMALL,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
        lambda w, s: awq(w, s, group=64),
        [],
    ),
    "packed": (
        SMALL,
        compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
        lambda w, s: packed(w, s, group=32),
        [],
    ),
    "fp8-tensor": (
        NARROW,
        {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ["o_proj", "lm_head"]},
        fp8_tensor,
        ["o"],
    ),
    "fp8-channel": (
        NARROW,
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        fp8_channel,
        [],
    ),
    "fp8-block": (
        BLOCKS,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        fp8_block,
        [],
    ),
}


def projections(s):
    """(layer's module, name, out, in, number of the input)"""
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    return [
        ("self_attn", "q", q, s["hidden"], 1),
        ("self_attn", "k", kv, s["hidden"], 1),
        ("self_attn", "v", kv, s["hidden"], 1),
        ("self_attn", "o", s["hidden"], q, 2),
        ("mlp", "gate", s["intermediate"], s["hidden"], 3),
        ("mlp", "up", s["intermediate"], s["hidden"], 3),
        ("mlp", "down", s["hidden"], s["intermediate"], 4),
    ]


def make(name, shape, quantization, packing, left_dense):
    seed = 1000 * (1 + list(CHECKPOINTS).index(name))
    hidden = shape["hidden"]
    half = lambda x: tensor(x.astype(np.float16))
    tensors = {
        "model.embed_tokens.weight": half(bell(seed, (shape["vocab"], hidden), 1)),
        "model.norm.weight": half(1 + bell(seed + 1, hidden, 0.1)),
        "model.layers.0.input_layernorm.weight": half(1 + bell(seed + 2, hidden, 0.1)),
        "model.layers.0.post_attention_layernorm.weight": half(1 + bell(seed + 3, hidden, 0.1)),
    }
    expected = {}
    for at, (module, projection, out, inside, input_number) in enumerate(projections(shape)):
        base = f"model.layers.0.{module}.{projection}_proj"
        weight = bell(seed + 10 + at, (out, inside), inside**-0.5)
        if projection in left_dense:
            tensors[f"{base}.weight"] = half(weight)
            continue
        of_matrix, dense = packing(weight, seed + input_number)
        assert dense.shape == weight.shape and np.abs(dense - weight).max() < 0.2 * np.abs(weight).max(), base
        tensors |= {f"{base}.{what}": tensor for what, tensor in of_matrix.items()}
        dense = np.ascontiguousarray(dense, np.float32)
        spots = [0, 1, inside - 1, dense.size // 2 + 5, dense.size - 1]
        expected[f"{base}.weight"] = {
            "sha256": hashlib.sha256(dense.tobytes()).hexdigest(),
            "bits": {str(i): int(dense.ravel().view(np.uint32)[i]) for i in spots},
        }
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_size": hidden,
        "intermediate_size": shape["intermediate"],
        "num_hidden_layers": 1,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return expected


if __name__ == "__main__":
    expected = {name: make(name, *fields) for name, fields in CHECKPOINTS.items()}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
