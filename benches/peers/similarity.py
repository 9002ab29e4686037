#!/usr/bin/env python3
"""How well the residual stream tells paraphrases from hard negatives: an independent count of what the ASKS probe sees.

    pip install torch==2.15.0 transformers==5.23.0 tokenizers==0.23.3
    python benches/peers/similarity.py [--prefix none|bundled] [--at last|mean] [--center] [--json FILE]

Pairs: every dev question with each of its paraphrases, and every pair of negatives.jsonl. State: the residual stream behind layer l at the
last token of `begin + prefix + problem` (f32, positions as in the prompt). Similarity: sum over the probed layers of w_l * cos, with w_l
proportional to exp(1.5 * l / L). `--at mean` averages the states of the question's tokens instead, `--center` takes the mean over all
dev questions away first: neither is the paper's, both ask whether another reading of the same states would do better.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TAUS = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999]
PROBES = {"1": [1], "1..2": [1, 2], "1..4": [1, 2, 3, 4], "1,2,4": [1, 2, 4], "1..8": list(range(1, 9))}


class States:
    """text -> [L, hidden], unit length after centring."""

    def __init__(self, args):
        model_dir = ROOT / "models/tinymath"
        self.model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.pack = json.loads((model_dir / "prompts.json").read_text())
        prefix = (model_dir / "problems/fewshot_prefix_1024.txt").read_text() if args.prefix == "bundled" else ""
        self.head = self.tokenizer.encode(self.pack["begin"] + prefix, add_special_tokens=False).ids
        with torch.inference_mode():
            self.cache = self.model(torch.tensor([self.head]), use_cache=True).past_key_values
        self.at, self.of, self.behind = args.at, {}, {}
        for i, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(lambda _m, _in, out, i=i: self.behind.update({i: out[0] if isinstance(out, tuple) else out}))

    @torch.inference_mode()
    def add(self, text):
        if text in self.of:
            return
        ids = self.tokenizer.encode(self.pack["problem"].replace("{question}", text), add_special_tokens=False).ids
        self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache.crop(-len(ids))
        hidden = torch.stack([self.behind[i].reshape(len(ids), -1) for i in range(len(self.behind))])
        self.of[text] = hidden[:, -1] if self.at == "last" else hidden.mean(1)


def auc(positive, negative):
    """Probability that a paraphrase is more similar than a negative; ties count half."""
    both = sorted([(x, 1) for x in positive] + [(x, 0) for x in negative])
    rank_sum, i = 0.0, 0
    while i < len(both):
        j = i
        while j < len(both) and both[j][0] == both[i][0]:
            j += 1
        rank_sum += (i + j + 1) / 2 * sum(p for _, p in both[i:j])
        i = j
    n, m = len(positive), len(negative)
    return (rank_sum - n * (n + 1) / 2) / (n * m)


def quantiles(values):
    values = sorted(values)
    return [values[round(q * (len(values) - 1))] for q in (0, 0.05, 0.5, 0.95, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", choices=["none", "bundled"], default="bundled")
    parser.add_argument("--at", choices=["last", "mean"], default="last")
    parser.add_argument("--center", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    states = States(args)
    problems = ROOT / "models/tinymath/problems"
    read = lambda name: [json.loads(line) for line in (problems / name).read_text().splitlines()]
    dev = read("dev.jsonl")
    pairs = {"paraphrase": [(p["question"], o) for p in dev for o in p["paraphrases"]]}
    for n in read("negatives.jsonl"):
        pairs.setdefault(n["kind"], []).append((n["question"], n["other"]))
    for text in {t for kind in pairs.values() for pair in kind for t in pair}:
        states.add(text)
    layers = next(iter(states.of.values())).shape[0]
    middle = torch.stack([states.of[p["question"]] for p in dev]).mean(0) if args.center else 0.0
    unit = {t: torch.nn.functional.normalize(s - middle, dim=-1) for t, s in states.of.items()}
    cosines = {kind: torch.stack([(unit[a] * unit[b]).sum(-1) for a, b in of]) for kind, of in pairs.items()}
    report = {"prefix": args.prefix, "at": args.at, "center": args.center, "pairs": {k: len(v) for k, v in pairs.items()}, "probes": {}}
    print(f"prefix {args.prefix}, state at {args.at}{', centred' if args.center else ''}; " +
          ", ".join(f"{len(v)} {k}" for k, v in pairs.items()))
    for name, probed in PROBES.items():
        weight = torch.tensor([math.exp(1.5 * l / layers) for l in probed])
        weight /= weight.sum()
        sigma = {k: (c[:, [l - 1 for l in probed]] @ weight).tolist() for k, c in cosines.items()}
        negatives = [x for k, v in sigma.items() if k != "paraphrase" for x in v]
        harmful = [x for k, v in sigma.items() if k not in ("paraphrase", "name") for x in v]
        aucs = {k: auc(sigma["paraphrase"], v) for k, v in sigma.items() if k != "paraphrase"}
        aucs |= {"all": auc(sigma["paraphrase"], negatives), "all but name": auc(sigma["paraphrase"], harmful)}
        rates = {k: [sum(x >= tau for x in v) / len(v) for tau in TAUS] for k, v in sigma.items()}
        report["probes"][name] = {"auc": aucs, "quantiles": {k: quantiles(v) for k, v in sigma.items()}, "taus": TAUS, "at_least_tau": rates}
        print(f"\nlayers {name}: AUC " + ", ".join(f"{k} {v:.3f}" for k, v in aucs.items()))
        print("| kind | min | 5 % | median | 95 % | max | " + " | ".join(f">= {t}" for t in TAUS) + " |\n|---" + "|---" * (5 + len(TAUS)) + "|")
        for kind, values in sigma.items():
            print(f"| {kind} | " + " | ".join(f"{q:.4f}" for q in quantiles(values)) + " | " + " | ".join(f"{100 * r:.0f} %" for r in rates[kind]) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
