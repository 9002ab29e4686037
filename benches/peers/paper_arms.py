#!/usr/bin/env python3
"""The paper's three arms on Hugging Face transformers, paired with rksc on the same problems, prompts and machine.

    pip install torch==2.15.0 transformers==5.23.0 tokenizers==0.23.3
    cargo build --release
    python benches/peers/paper_arms.py --offset 0 --limit 10 --records FILE.jsonl      # in pieces; each appends its problems
    python benches/peers/paper_arms.py --limit 0 --records FILE.jsonl --json OUT.json  # no new problem: the table of all pieces

Arms, each B = 8 branches, greedy, answers of full length, behind the bundled few-shot prefix of 1,007 tokens:

    no-sharing  every branch prefills its whole prompt and, afterwards, its own verification prompt
    copied-kv   the prompt up to the fork is prefilled once, its KV copied to all branches (batch_repeat_interleave); every branch
                verified by a prompt of its own, from token 0
    rksc-paper  as copied-kv, with the rules of the paper's code: stop all branches when one leads (decode exit), skip the verification
                when one leads (level 1), leave the verification between two layers when every row's entropy is low and steady (level 2)

They stand beside `rksc-run bench ladder` with --policies no-sharing,paper-baseline,rksc-paper,rksc, run on the same piece of problems
right before and after them in turn. The arm order rotates from problem to problem. With several rounds, each arm's best round of a problem
counts, on both sides. Own code, written from the paper's description;
these faults of the published code are not repeated here, each of them makes answers or scores wrong and nothing faster:

    * right-padded prompts read at index -1, where a short row holds padding; left-padded ones read at len - 1. Rows here are padded on the
      left, masked, with positions that count real tokens, and read at the last column
    * prefix and branch tokenised apart with special tokens (a second BOS inside), padding between them that shifts positions
    * finished branches that go on sampling and feed their confidence. Here they leave the batch
    * verify prompts cut at 2,000 and 400 characters, answers of 8 tokens
    * a row that never left early reported as if it had left at the last layer; at full depth it is scored behind the final norm

Kept as published: the raw residual stream through the unembedding at an exit, without the final norm; logits clamped to +-1000; the batch
leaves only as a whole; entropies begin at layer l_min, so that the first exit is possible one later. theta and eps are constants in nats
for vocabularies of 32 to 152 thousand tokens; `--theta-scale` multiplies both, and 0.557 = ln 768 / ln 152064 carries them over to this one.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
ARMS = ["no-sharing", "copied-kv", "rksc-paper"]
POLICIES = ["no-sharing", "paper-baseline", "rksc-paper", "rksc"]
# Each arm here, and what it is compared with there.
TWINS = {"no-sharing": "no-sharing", "copied-kv": "paper-baseline", "rksc-paper": "rksc-paper"}
PAIRS = [("no-sharing", "rksc-paper"), ("copied-kv", "rksc-paper"), ("no-sharing", "copied-kv")]
RESAMPLES = 4000


class LeftEarly(Exception):
    """Carries a batch out of the layer stack."""

    def __init__(self, layer, logits):
        super().__init__()
        self.layer, self.logits = layer, logits


class Prompts:
    """The prompt pack as `rksc::prompts` fills it."""

    def __init__(self, model_dir, prefix):
        self.pack = json.loads((model_dir / "prompts.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.prefix = prefix
        config = json.loads((model_dir / "generation_config.json").read_text())
        eos = config["eos_token_id"]
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.pad = config.get("pad_token_id", 0)
        self.branches = [self.encode(self.pack["approach"].replace("{number}", str(i + 1)).replace("{approach}", a))
                         for i, a in enumerate(self.pack["approaches"])]
        self.yes, self.no = ([self.single(s) for s in self.pack[f]] for f in ("yes", "no"))
        self.answer_pattern = re.compile(self.pack["answer_pattern"])

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def single(self, text):
        (token,) = self.encode(text)
        return token

    def root(self, question):
        return self.encode(self.pack["begin"] + self.prefix + self.pack["problem"].replace("{question}", question))

    def verify(self, question, generated):
        proposal = self.pack["proposal"].replace("{solution}", self.text(generated))
        before, after = self.pack["verify_fresh"].split("{proposal}")
        return self.encode(self.pack["begin"] + before.replace("{question}", question) + proposal + after)

    def text(self, generated):
        return self.tokenizer.decode(generated)

    def answer(self, generated):
        found = self.answer_pattern.findall(self.text(generated))
        return found[-1] if found else None


class Arms:
    """The three arms on one model."""

    def __init__(self, model, prompts, args):
        self.model, self.prompts, self.args = model, prompts, args
        self.exit_rule = None  # level 2 runs where this is a dict of its state
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda _m, _in, out, layer=i + 1: self.after_layer(layer, out))

    def batch(self, rows, cached=0):
        """Left-padded ids, the mask over cached and new columns, positions."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.prompts.pad] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[1] * cached + [0] * (width - len(r)) + [1] * len(r) for r in rows])
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, cached:]

    def forward(self, ids, mask, positions, cache):
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                          use_cache=cache is not None, logits_to_keep=1).logits[:, -1].float()

    def prefill(self, arm, root):
        """(logits of the branches' last tokens, mask, positions of the last column, cache)."""
        branches = self.prompts.branches[: self.args.branches]
        cache = DynamicCache(config=self.model.config)
        if arm == "no-sharing":
            ids, mask, positions = self.batch([root + b for b in branches])
        else:
            self.forward(*self.batch([root]), cache)
            cache.batch_repeat_interleave(len(branches))
            ids, mask, positions = self.batch(branches, cached=len(root))
        return self.forward(ids, mask, positions, cache), mask, positions[:, -1:], cache

    def decode(self, arm, logits, mask, positions, cache):
        """Tokens of each branch without the end token, and each branch's mean top-1 probability."""
        num = logits.shape[0]
        tokens, sums, steps = [[] for _ in range(num)], [0.0] * num, [0] * num
        alive = list(range(num))
        for step in range(self.args.max_new_tokens):
            top, best = logits.softmax(-1).max(-1)
            for b, p, t in zip(alive, top.tolist(), best.tolist()):
                sums[b], steps[b] = sums[b] + p, steps[b] + 1
                if t not in self.prompts.eos:
                    tokens[b].append(t)
            keep = [i for i, t in enumerate(best.tolist()) if t not in self.prompts.eos]
            means = [s / n for s, n in zip(sums, steps)]
            if not keep or (arm == "rksc-paper" and stops_all(step, means)) or step + 1 == self.args.max_new_tokens:
                break
            if len(keep) < len(alive):
                index = torch.tensor(keep)
                cache.batch_select_indices(index)
                alive, mask, positions, best = [alive[i] for i in keep], mask[index], positions[index], best[index]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            positions = positions + 1
            logits = self.forward(best[:, None], mask, positions, cache)
        return tokens, means

    def after_layer(self, layer, out):
        """Level 2, on the last tokens of a verification pass."""
        state, args = self.exit_rule, self.args
        if state is None or layer < args.l_min or layer == len(self.model.model.layers):
            return
        hidden = (out[0] if isinstance(out, tuple) else out)[:, -1]
        logits = F.linear(hidden, self.model.lm_head.weight).float().clamp(-1000, 1000)
        q = logits.softmax(-1)
        entropy = -(q * (q + 1e-10).log()).sum(-1)
        before, state["entropy"] = state.get("entropy"), entropy
        scale = args.theta_scale
        if before is not None and bool(((entropy < args.theta * scale) & ((entropy - before).abs() < args.eps * scale)).all()):
            raise LeftEarly(layer, logits)

    def verify(self, arm, question, tokens):
        """(score of each branch, the layer at which the batch left early or None)."""
        ids, mask, positions = self.batch([self.prompts.verify(question, t) for t in tokens])
        self.exit_rule, left = ({} if arm == "rksc-paper" and not self.args.no_level2 else None), None
        try:
            logits = self.forward(ids, mask, positions, None)
        except LeftEarly as early:
            logits, left = early.logits, early.layer
        finally:
            self.exit_rule = None
        mass = lambda spellings: torch.logsumexp(logits[:, spellings], -1)
        return torch.sigmoid(mass(self.prompts.yes) - mass(self.prompts.no)).tolist(), left

    @torch.inference_mode()
    def solve(self, arm, problem):
        begin = time.perf_counter()
        question = problem["question"]
        filled = self.prefill(arm, self.prompts.root(question))
        prefilled = time.perf_counter()
        tokens, means = self.decode(arm, *filled)
        decoded = time.perf_counter()
        skipped = arm == "rksc-paper" and skips(means)
        scores, left = (None, None) if skipped else self.verify(arm, question, tokens)
        answers = [self.prompts.answer(t) for t in tokens]
        chosen = {rule: select(rule, answers, means, scores) for rule in ("vote", "score*sqrt(conf)")}
        end = time.perf_counter()
        return {"ms": [1e3 * (end - begin)], "prefill_ms": 1e3 * (prefilled - begin), "decode_ms": 1e3 * (decoded - prefilled),
                "verify_ms": 1e3 * (end - decoded), "answers": answers, "answer": chosen, "skipped": skipped, "exit_layer": left,
                "tokens": sum(map(len, tokens))}


def lead(values):
    top, second = sorted(values, reverse=True)[:2]
    return top, top - second


def stops_all(step, means):
    top, gap = lead(means)
    return step >= 3 and top >= 0.72 and gap / max(top, 1e-6) >= 0.10


def skips(means):
    top, gap = lead(means)
    return (top >= 0.70 and gap >= 0.06) or (top >= 0.63 and gap / max(top, 1e-6) >= 0.08)


def select(rule, answers, means, scores):
    """`rksc::solver::select`: the answer with the largest sum of confidences, or the branch of the best composite."""
    if rule == "vote":
        weights = {}
        for a, m in zip(answers, means):
            if a is not None:
                weights[a] = weights.get(a, 0.0) + m
        return max(weights, key=weights.get) if weights else None
    composites = [(1.0 if scores is None else scores[i]) * math.sqrt(m) for i, m in enumerate(means)]
    return answers[composites.index(max(composites))]


def ladder(args, lines, select_rule):
    """policy -> problem id -> its line, from one run of `rksc-run bench ladder` on these problems."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as problems:
        problems.writelines(lines)
        problems.flush()
        command = [args.binary, "bench", "ladder", "--problems", problems.name, "--prefix", "bundled", "--policies", ",".join(POLICIES),
                   "-B", str(args.branches), "--max-new-tokens", str(args.max_new_tokens), "--dtype", args.dtype, "--threads", str(args.threads),
                   "--select", select_rule, "--json"]
        out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return out, {p["policy"]: {line["id"]: line for line in p["per_problem"]} for p in out["policies"]}


def cpu_seconds():
    """(of the whole machine, of this process and the children it waited for)"""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def measure(args):
    torch.set_num_threads(args.threads)
    model_dir = ROOT / "models/tinymath"
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype={"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]).eval()
    prompts = Prompts(model_dir, (model_dir / "problems/fewshot_prefix_1024.txt").read_text())
    arms = Arms(model, prompts, args)
    lines = Path(args.problems).read_text().splitlines(keepends=True)[args.offset : args.offset + args.limit]
    problems = [json.loads(line) for line in lines]
    records = [{"id": p["id"], "expected": str(p["answer"]), "dtype": args.dtype, "torch": {}, "rksc": {}} for p in problems]

    def theirs():
        for arm in ARMS:
            arms.solve(arm, problems[0])  # nothing counts before every path has run once
        for i, (problem, record) in enumerate(zip(problems, records)):
            for turn in range(len(ARMS)):
                arm = ARMS[(turn + i) % len(ARMS)]
                result = arms.solve(arm, problem)
                if arm in record["torch"]:
                    record["torch"][arm]["ms"] += result["ms"]
                else:
                    record["torch"][arm] = result

    def ours():
        out, by_policy = ladder(args, lines, "vote")
        for record in records:
            record["rksc_device"] = out["device"]
            for policy, of in by_policy.items():
                line = of[record["id"]]
                if policy in record["rksc"]:
                    record["rksc"][policy]["ms"] += line["latency_ms"]
                else:
                    record["rksc"][policy] = {"ms": line["latency_ms"], "answer": {"vote": line["answer"]}, "skipped": line["skipped"],
                                              "exit_layers": line["exit_layers"]}

    # ours, theirs, ours, theirs, ...: a slow minute of the machine hits both.
    begin, (all_before, own_before) = time.perf_counter(), cpu_seconds()
    for _ in range(args.rounds):
        ours()
        theirs()
    all_after, own_after = cpu_seconds()
    others = (all_after - all_before - own_after + own_before) / (time.perf_counter() - begin)
    print(f"other programs took {others:.2f} of {os.cpu_count()} cores meanwhile", file=sys.stderr)
    if others > args.max_others:
        sys.exit("nothing recorded: the machine was not idle (--max-others)")
    _, by_policy = ladder(args, lines, "score*sqrt(conf)")  # for the answers alone
    for record in records:
        for policy, of in by_policy.items():
            record["rksc"][policy]["answer"]["score*sqrt(conf)"] = of[record["id"]]["answer"]
    with open(args.records, "a") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)


def ratio(a, b):
    """Sum over sum with the 95 % interval of a bootstrap over problems."""
    draws, n = random.Random(0x5eed), len(a)
    def resample():
        picks = [draws.randrange(n) for _ in range(n)]
        return sum(a[i] for i in picks) / sum(b[i] for i in picks)
    values = sorted(resample() for _ in range(RESAMPLES))
    return {"value": sum(a) / sum(b), "lo": values[int(0.025 * RESAMPLES)], "hi": values[int(0.975 * RESAMPLES)]}


def wilson(k, n):
    z, p = 1.96, k / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)]


def arm_row(records, engine, arm):
    results = [r[engine][arm] for r in records]
    ms = sorted(min(x["ms"]) for x in results)
    right = {rule: sum(x["answer"][rule] == r["expected"] for x, r in zip(results, records)) for rule in ("vote", "score*sqrt(conf)")}
    layers = [x["exit_layer"] for x in results if x.get("exit_layer")] if engine == "torch" else [
        layer for x in results for layer in x["exit_layers"]]
    twin = TWINS.get(arm)
    agree = sum(r["torch"][arm]["answer"]["vote"] == r["rksc"][twin]["answer"]["vote"] for r in records) if engine == "torch" else None
    row = {"engine": engine, "arm": arm, "mean_ms": statistics.mean(ms), "median_ms": statistics.median(ms),
           "p10_ms": ms[int(0.1 * (len(ms) - 1))], "p90_ms": ms[round(0.9 * (len(ms) - 1))], "right": right,
           "right_interval": wilson(right["vote"], len(ms)), "skipped": sum(x["skipped"] for x in results),
           "left_early": len(layers), "mean_exit_layer": statistics.mean(layers) if layers else None, "same_answer_as_rksc": agree}
    if engine == "torch":
        row["phase_ms"] = {p: statistics.median(x[p + "_ms"] for x in results) for p in ("prefill", "decode", "verify")}
        row["tokens"] = statistics.mean(x["tokens"] for x in results)
    return row


def table(args):
    records = [json.loads(line) for line in Path(args.records).read_text().splitlines()]
    assert len({r["id"] for r in records}) == len(records), "a problem stands twice in the records"
    n = len(records)
    best = lambda engine, arm: [min(r[engine][arm]["ms"]) for r in records]
    rows = [arm_row(records, "torch", a) for a in ARMS] + [arm_row(records, "rksc", p) for p in POLICIES]
    ratios = {f"{e} {a} / {b}": ratio(best(e, a), best(e, b)) for e, pairs in
              (("torch", PAIRS), ("rksc", [(TWINS[a], TWINS[b]) for a, b in PAIRS] + [("no-sharing", "rksc"), ("paper-baseline", "rksc")]))
              for a, b in pairs}
    ratios |= {f"torch {a} / rksc {p}": ratio(best("torch", a), best("rksc", p))
               for a, p in list(TWINS.items()) + [("rksc-paper", "rksc")]}
    print(f"{n} problems, {len(records[0]['torch'][ARMS[0]]['ms'])} round(s), {records[0]['dtype']}, {records[0]['rksc_device']}\n")
    print("| engine | arm | ms/problem, median (p10 to p90) | right by vote | by score*sqrt(conf) | verify skipped | left early, mean layer | same answer as rksc |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        left = f"{r['left_early']}, {r['mean_exit_layer']:.1f}" if r["left_early"] else "0"
        same = "" if r["same_answer_as_rksc"] is None else f"{r['same_answer_as_rksc']} of {n}"
        print(f"| {r['engine']} | {r['arm']} | {r['median_ms']:.0f} ({r['p10_ms']:.0f} to {r['p90_ms']:.0f}) | {r['right']['vote']} of {n} | "
              f"{r['right']['score*sqrt(conf)']} of {n} | {r['skipped']} | {left} | {same} |")
    print("\n| ratio of mean latencies | value (95 %) |\n|---|---|")
    for name, r in ratios.items():
        print(f"| {name} | {r['value']:.2f} ({r['lo']:.2f} to {r['hi']:.2f}) |")
    if args.json:
        head = {"bench": "paper_arms", "problems": n, "dtype": records[0]["dtype"], "rksc_device": records[0]["rksc_device"],
                "cpu": cpu(), "threads": args.threads, "torch": torch.__version__, "transformers": transformers.__version__,
                "theta": args.theta, "eps": args.eps, "theta_scale": args.theta_scale, "l_min": args.l_min, "branches": args.branches}
        keep = lambda x: {k: v for k, v in x.items() if k != "answers"}
        slim = [{**r, "torch": {a: keep(x) for a, x in r["torch"].items()}} for r in records]
        Path(args.json).write_text(json.dumps({**head, "arms": rows, "ratios": ratios, "records": slim}) + "\n")


def cpu():
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else []
    return f"{names[0]}, {len(names)} cores" if names else "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/rksc-run"))
    parser.add_argument("--problems", default=str(ROOT / "models/tinymath/problems/test.jsonl"))
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1, help="times every problem is solved by every arm of both engines")
    parser.add_argument("--records", required=True)
    parser.add_argument("--json")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-B", "--branches", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--theta", type=float, default=8.0, help="nats")
    parser.add_argument("--eps", type=float, default=3.0, help="nats")
    parser.add_argument("--theta-scale", type=float, default=1.0, help="on theta and eps")
    parser.add_argument("--l-min", type=int, default=2)
    parser.add_argument("--max-others", type=float, default=0.15, help="cores that other programs may take before a piece is thrown away")
    parser.add_argument("--no-level2", action="store_true")
    args = parser.parse_args()
    if args.limit > 0:
        measure(args)
    table(args)


if __name__ == "__main__":
    sys.exit(main())
