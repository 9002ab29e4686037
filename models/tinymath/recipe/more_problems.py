"""Writes problems/fresh.jsonl and problems/negatives.jsonl, the same bytes every time. Plain Python 3.

    python3 models/tinymath/recipe/more_problems.py [--out models/tinymath/problems]
    python3 models/tinymath/recipe/more_problems.py --fresh 2000 --seed 930031 --out target     # target/fresh-2000.jsonl alone

fresh.jsonl: 600 problems from a seed that neither dev, test nor training used, two to seven operations in turn as in test.jsonl.
None of their texts, paraphrases included, stands in dev or test. With --fresh N, N more of the kind from another seed, in a file
of their own; those whose texts stand in dev or test are left out.

negatives.jsonl: texts close to dev questions that must not be taken for the same question. One object a line,
{"id", "kind", "base", "question", "other", "answer", "other_answer"}: `question` is that of dev problem `base`, and `other`
    number     one number of the story changed
    operation  the wording of one operation changed, all written numbers kept
    name       one name changed wherever it stands; the answer stays, the text is about somebody else
    other      another dev problem with as many operations and another answer
Edits repeat the draws that wrote the question, so that both texts use the same sentences everywhere else.
"""

import argparse
import json
import os
import random

import generate as G

HERE = os.path.dirname(os.path.abspath(__file__))
FRESH_SEED, FRESH_COUNT = 930011, 600
DEV_SEED, DEV_COUNT = 910001, 200
NEGATIVES_SEED, NEGATIVES_PER_KIND = 950017, 250
DELTAS = [-10, -3, -2, -1, 1, 2, 3, 10]
SWAPS = {"add": ["sub"], "sub": ["add"], "dbl": ["tri", "hlv"], "tri": ["dbl", "hlv"], "hlv": ["dbl", "tri"]}


class Tape:
    """Stands in for the `random.Random` of `generate.render`: writes its draws down, or repeats them with some changed."""

    def __init__(self, rng=None, draws=(), changed=None):
        self.rng, self.draws, self.changed, self.at = rng, list(draws), changed or {}, 0

    def _next(self, draw):
        if self.rng:
            self.draws.append(draw())
        self.at += 1
        return self.changed.get(self.at - 1, self.draws[self.at - 1])

    def random(self):
        return self._next(lambda: self.rng.random())

    def choice(self, seq):
        return seq[self._next(lambda: seq.index(self.rng.choice(seq)))]


def dev_problems():
    """The dev problems with the draws that wrote each question. Draws as `generate.problem_set` does."""
    rng, out, seen = random.Random(DEV_SEED), [], set()
    while len(out) < DEV_COUNT:
        p = G.make_problem(rng, 2 + len(out) % 6)
        tape = Tape(rng)
        question = G.render(p, tape)
        if question in seen:
            continue
        seen.add(question)
        paraphrases = []
        while len(paraphrases) < 4:
            text = G.render(p, rng)
            if text != question and text not in paraphrases:
                paraphrases.append(text)
        out.append(dict(p, id="dev-%04d" % len(out), question=question, draws=tape.draws))
    return out


def evaluate(start, ops):
    """All values of the story, or None where it leaves 0..99 or halves an odd number."""
    vals = [start]
    for op, n in ops:
        if op == "sub" and n > vals[-1]:
            return None
        vals.append(G.apply(op, n, vals[-1]))
        if not 0 <= vals[-1] <= 99:
            return None
    return vals


def change_number(p, rng):
    """(other text, other answer) or None."""
    places = [-1] + [i for i, (op, _) in enumerate(p["ops"]) if op in ("add", "sub")]
    place, delta = rng.choice(places), rng.choice(DELTAS)
    start, ops = p["start"], list(p["ops"])
    if place < 0:
        start += delta
    else:
        ops[place] = (ops[place][0], ops[place][1] + delta)
    if min([start] + [n for _, n in ops]) < 1:
        return None
    vals = evaluate(start, ops)
    if vals is None or vals[-1] == p["answer"]:
        return None
    return G.render(dict(p, start=start, ops=ops), Tape(draws=p["draws"])), vals[-1]


def templates(p):
    if p["kind"] == "person":
        return dict(add=G.P_ADD, sub=G.P_SUB, dbl=G.P_DBL, tri=G.P_TRI, hlv=G.P_HLV)
    return dict(add=G.C_ADD, sub=G.C_SUB, dbl=G.C_DBL, tri=G.C_TRI, hlv=G.C_HLV)


class TemplateDraws(Tape):
    """Also remembers at which draw each template was chosen."""

    def __init__(self, p):
        super().__init__(draws=p["draws"])
        self.lists, self.chosen = list(templates(p).values()), []

    def choice(self, seq):
        if any(seq is t for t in self.lists):
            self.chosen.append((self.at, seq[self.draws[self.at]]))
        return super().choice(seq)


def distance(a, b):
    """Words to insert, delete or replace."""
    a, b = a.split(), b.split()
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def change_operation(p, rng):
    """(other text, other answer) or None. The new sentence is the closest one that leaves the following draws alone."""
    reader = TemplateDraws(p)
    G.render(p, reader)
    i = rng.randrange(len(p["ops"]))
    (op, n), (at, old) = p["ops"][i], reader.chosen[i]
    new_op = rng.choice(SWAPS[op])
    new = templates(p)[new_op]
    like = lambda t: (t.startswith("{S} "), t.startswith("Now"))
    near = [k for k, t in enumerate(new) if like(t) == like(old)]
    if not near:
        return None
    least = min(distance(old, new[k]) for k in near)
    pick = rng.choice([k for k in near if distance(old, new[k]) == least])
    ops = list(p["ops"])
    ops[i] = (new_op, {"dbl": 2, "tri": 3, "hlv": 2}.get(new_op, n))
    vals = evaluate(p["start"], ops)
    if vals is None or vals[-1] == p["answer"]:
        return None
    return G.render(dict(p, ops=ops), Tape(draws=p["draws"], changed={at: pick})), vals[-1]


def change_name(p, rng):
    """(other text, the same answer) or None, where no name stands in the text."""
    people = [p["name"]] + p["others"]
    words = p["question"].replace(".", " ").replace("?", " ").split()
    present = [i for i, name in enumerate(people) if name in words]
    if not present:
        return None
    i = rng.choice(present)
    pronoun = dict(G.NAMES)[people[i]]
    name = rng.choice([n for n, pr in G.NAMES if pr == pronoun and n not in people])
    people[i] = name
    return G.render(dict(p, name=people[0], others=people[1:]), Tape(draws=p["draws"])), p["answer"]


def change_all(p, rng, problems):
    like = [q for q in problems if len(q["ops"]) == len(p["ops"]) and q["answer"] != p["answer"]]
    q = rng.choice(like)
    return q["question"], q["answer"]


def negatives():
    problems, rng, out = dev_problems(), random.Random(NEGATIVES_SEED), []
    kinds = dict(number=change_number, operation=change_operation, name=change_name, other=lambda p, r: change_all(p, r, problems))
    for kind, edit in kinds.items():
        pairs, turn = set(), 0
        while len(pairs) < NEGATIVES_PER_KIND:
            p = problems[turn % len(problems)]
            turn += 1
            # An edit may leave the range of the stories: some more tries for this problem, then the next.
            for _ in range(40):
                edited = edit(p, rng)
                if edited and edited[0] != p["question"] and (p["id"], edited[0]) not in pairs:
                    pairs.add((p["id"], edited[0]))
                    out.append(dict(id="%s-%03d" % (kind, len(pairs) - 1), kind=kind, base=p["id"], question=p["question"], other=edited[0],
                                    answer=p["answer"], other_answer=edited[1]))
                    break
    return out


def texts(path):
    with open(path) as f:
        return {text for line in f for p in [json.loads(line)] for text in [p["question"]] + p["paraphrases"]}


def fresh(problems_dir):
    known = texts(os.path.join(problems_dir, "dev.jsonl")) | texts(os.path.join(problems_dir, "test.jsonl"))
    out = G.problem_set(FRESH_SEED, FRESH_COUNT, "fresh")
    for p in out:
        p.pop("raw")
        if known & {p["question"], *p["paraphrases"]}:
            raise SystemExit("%s stands in dev or test: take another seed" % p["id"])
    return out


def more(problems_dir, seed, count):
    """`count` problems of `seed` that share no text with dev or test."""
    known = texts(os.path.join(problems_dir, "dev.jsonl")) | texts(os.path.join(problems_dir, "test.jsonl"))
    # Two or three operations leave few stories: some of a long set may be known.
    out = [p for p in G.problem_set(seed, count + count // 10 + 10, "fresh-%d" % seed) if not known & {p["question"], *p["paraphrases"]}]
    for p in out:
        p.pop("raw")
    return out[:count]


def lines(objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(HERE, "..", "problems"))
    parser.add_argument("--fresh", type=int, metavar="N", help="only N more fresh problems")
    parser.add_argument("--seed", type=int, default=930031, help="their seed; not one of the other sets'")
    args = parser.parse_args()
    out, problems_dir = args.out, os.path.join(HERE, "..", "problems")
    if args.seed in (FRESH_SEED, DEV_SEED, NEGATIVES_SEED, 920002, 940004):
        parser.error("--seed: another set has it")
    os.makedirs(out, exist_ok=True)
    if args.fresh:
        files = [("fresh-%d" % args.fresh, more(problems_dir, args.seed, args.fresh))]
    else:
        files = [("fresh", fresh(problems_dir)), ("negatives", negatives())]
    for name, objects in files:
        with open(os.path.join(out, name + ".jsonl"), "w", newline="\n") as f:
            f.write(lines(objects))


if __name__ == "__main__":
    main()
