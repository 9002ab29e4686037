"""Reference answers of the tinymath model, computed with Hugging Face transformers.

For the first N problems and each of the 8 canonical hints, without and with the few-shot prefix,
this records the greedy continuation (argmax; up to <|eos|> or 256 new tokens) of

    <|bos|>[prefix]Problem: {question}\\nApproach #{k}: {hint k}\\nStep 1:

The bf16 weights are widened to float32; float32 on the CPU, one thread, eager attention.
One JSON object per line of the output, in the order (prefixed, problem, hint):
    id          problem id
    hint        1..8, also the number behind "Approach #"
    prefixed    whether the few-shot prefix stands in front of "Problem:"
    tokens      generated ids without <|eos|>; 256 of them mean that <|eos|> never came
    answer      the integer behind the last "The answer is ", null when there is none
    min_margin  smallest difference between the largest and the second largest logit over all
                steps, the step that chose <|eos|> included
    margin_at   that step (0-based; equal to the number of tokens when it is the <|eos|> step)

The common head (<|bos|> or <|bos|> + prefix) is prefilled once and its KV cache repeated for the
rows of a left-padded batch. That changes float32 sums slightly, so --check decodes some prompts
again, one at a time and whole, with model.generate(), and compares ids and margins.

Command of the committed output (from the root of the repository):
    nice -n 10 python models/tinymath/reference/transformers_answers.py \\
        --model models/tinymath --problems models/tinymath/problems/test.jsonl \\
        --out models/tinymath/reference/transformers_answers.jsonl --limit 100
with Python 3.11.7, torch 2.15.0+cu132, transformers 5.23.0, tokenizers 0.23.3, numpy 2.4.6
"""

import argparse
import copy
import json
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

BOS, EOS, PAD = 0, 1, 2
MAX_NEW, BATCH = 256, 50
HINTS = ["Use short equations.", "Explain each step in words.", "Track the units.",
         "Compute and re-check each step.", "List the givens first.", "Keep a running total.",
         "Break numbers into tens and ones.", "Make a table."]


def extract_answer(text):
    """The integer behind the last 'The answer is ', or None."""
    _, found, rest = text.rpartition("The answer is ")
    number = re.match(r"-?\d+", rest) if found else None
    return int(number[0]) if number else None


def greedy_batch(model, head_cache, bodies):
    """(tokens, min_margin, margin_at) per body behind the head; finished rows leave the batch."""
    shared, width = head_cache.get_seq_length(), max(map(len, bodies))
    cache = copy.deepcopy(head_cache)
    cache.batch_repeat_interleave(len(bodies))
    ids = torch.tensor([[PAD] * (width - len(b)) + b for b in bodies])
    mask = torch.tensor([[1] * shared + [0] * (width - len(b)) + [1] * len(b) for b in bodies])
    position = mask.cumsum(1)[:, shared:] - 1
    tokens, margins = [[] for _ in bodies], [[] for _ in bodies]
    alive = torch.arange(len(bodies))
    for _ in range(MAX_NEW):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        value, index = logits.topk(2)
        gap = value[:, 0] - value[:, 1]
        for row, best, g in zip(alive.tolist(), index[:, 0].tolist(), gap.tolist()):
            margins[row].append(g)
            if best != EOS:
                tokens[row].append(best)
        keep = (index[:, 0] != EOS).nonzero()[:, 0]
        if len(keep) == 0:
            break
        if len(keep) < len(alive):
            cache.batch_select_indices(keep)
        alive, ids, position = alive[keep], index[keep, :1], position[keep, -1:] + 1
        mask = torch.cat([mask[keep], mask.new_ones(len(keep), 1)], 1)
    return [(t, min(m), m.index(min(m))) for t, m in zip(tokens, margins)]


def greedy_single(model, prompt):
    """(tokens, min_margin) of one whole prompt through model.generate(), for the check."""
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                         max_new_tokens=MAX_NEW, do_sample=False, eos_token_id=EOS,
                         pad_token_id=PAD, output_logits=True, return_dict_in_generate=True)
    gaps = [(v[0, 0] - v[0, 1]).item() for v in (x.topk(2).values for x in out.logits)]
    return [t for t in out.sequences[0, len(prompt):].tolist() if t != EOS], min(gaps)


@torch.inference_mode()
def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", default="models/tinymath", help="folder with config.json")
    ap.add_argument("--problems", default="models/tinymath/problems/test.jsonl",
                    help="the few-shot prefix is read from the same folder")
    ap.add_argument("--out", default="transformers_answers.jsonl")
    ap.add_argument("--limit", type=int, default=100, help="number of problems")
    ap.add_argument("--check", type=int, default=40, help="unbatched checks, half on low margins")
    args = ap.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    lines = Path(args.problems).read_text(encoding="utf-8").splitlines()[:args.limit]
    prefix = (Path(args.problems).parent / "fewshot_prefix_1024.txt").read_text(encoding="utf-8")
    prefix_ids = tokenizer.encode(prefix).ids
    jobs = [(p, h) for p in map(json.loads, lines) for h in range(1, len(HINTS) + 1)]
    texts = [f"Problem: {p['question']}\nApproach #{h}: {HINTS[h - 1]}\nStep 1:" for p, h in jobs]
    bodies = [tokenizer.encode(t).ids for t in texts]
    # Cutting in front of "Problem:" must not change the ids (the model card says it does not).
    assert all(prefix_ids + b == tokenizer.encode(prefix + t).ids for t, b in zip(texts, bodies))

    with open(args.out, "w", encoding="utf-8", newline="\n") as out:
        for prefixed, head in ((False, [BOS]), (True, [BOS] + prefix_ids)):
            start, results = time.time(), [None] * len(jobs)
            cache = model(torch.tensor([head]), use_cache=True).past_key_values
            order = sorted(range(len(jobs)), key=lambda i: (jobs[i][1], len(bodies[i])))
            for first in range(0, len(order), BATCH):
                rows = order[first:first + BATCH]
                for i, r in zip(rows, greedy_batch(model, cache, [bodies[i] for i in rows])):
                    results[i] = r
            seconds, right = time.time() - start, [0] * len(HINTS)
            for (problem, hint), (tokens, margin, at) in zip(jobs, results):
                answer = extract_answer(tokenizer.decode(tokens))
                right[hint - 1] += answer == problem["answer"]
                record = dict(id=problem["id"], hint=hint, prefixed=prefixed, tokens=tokens,
                              answer=answer, min_margin=round(margin, 6), margin_at=at)
                out.write(json.dumps(record, separators=(",", ":")) + "\n")
            # Unbatched: half of the sample at random, half with the least margins.
            sample = random.Random(0).sample(range(len(jobs)), min(args.check // 2, len(jobs)))
            by_margin = sorted(set(range(len(jobs))) - set(sample), key=lambda i: results[i][1])
            sample += by_margin[:args.check - len(sample)]
            single = [(greedy_single(model, head + bodies[i]), results[i]) for i in sample]
            off = max((abs(s[1] - r[1]) for s, r in single), default=0.0)
            rate = [round(100 * r / len(lines), 1) for r in right]
            low = [sum(r[1] < limit for r in results) for limit in (0.01, 0.05)]
            print(f"head of {len(head)} tokens: accuracy % by hint {rate}, "
                  f"mean {sum(rate) / len(rate):.2f}; {seconds:.1f} s; "
                  f"{sum(len(r[0]) == MAX_NEW for r in results)} unfinished; "
                  f"min_margin < 0.01 in {low[0]}, < 0.05 in {low[1]} of {len(jobs)}; unbatched: "
                  f"same ids in {sum(s[0] == r[0] for s, r in single)} of {len(single)}, "
                  f"min_margin off by at most {off:.1e}", flush=True)


if __name__ == "__main__":
    main()
