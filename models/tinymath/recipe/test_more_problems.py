"""python3 -m unittest discover models/tinymath/recipe"""

import collections
import json
import os
import re
import tempfile
import unittest
from unittest import mock

import generate as G
import more_problems as M

PROBLEMS = os.path.join(M.HERE, "..", "problems")


def load(name):
    with open(os.path.join(PROBLEMS, name)) as f:
        return [json.loads(line) for line in f]


def pattern(template):
    """A sentence template as a regular expression; its start may be inside a sentence."""
    text = re.escape(template).replace(r"\{n\}", r"(\d+)")
    names = "|".join(name for name, _ in G.NAMES)
    for field, words in dict(N=names, X=names, S=names + "|he|she", s=names + "|he|she", P="him|her", p="his|her", o="[a-z]+", c="[a-z]+").items():
        text = text.replace(r"\{%s\}" % field, "(?:%s)" % words)
    return re.compile("^" + text + "$", re.I)


STARTS = [pattern(t) for t in G.P_START + G.C_START]
STEPS = [(op, pattern(t)) for lists in (dict(add=G.P_ADD, sub=G.P_SUB, dbl=G.P_DBL, tri=G.P_TRI, hlv=G.P_HLV),
                                        dict(add=G.C_ADD, sub=G.C_SUB, dbl=G.C_DBL, tri=G.C_TRI, hlv=G.C_HLV))
         for op, templates in lists.items() for t in templates]


def solve(text):
    """Reads the story back, knowing only the wordings; the answer, or an error that names the sentence."""
    start, *steps = re.findall(r"[^.?]+[.?]", text)[:-1]
    (value,) = {int(m[1]) for r in STARTS for m in [r.match(start.strip())] if m}
    for sentence in steps:
        sentence = re.sub(r"^(%s)" % "|".join(G.CONN), "", sentence.strip())
        first, *joined = sentence.split(" and then ")
        for part in [first.rstrip(".") + "."] + ["She " + j.rstrip(".") + "." for j in joined]:
            found = {(op, int(m[1]) if m.re.groups else 0) for op, r in STEPS for m in [r.match(part)] if m}
            if len(found) != 1:
                raise ValueError("%r reads as %s" % (part, found))
            ((op, n),) = found
            value = G.apply(op, n, value)
            if not 0 <= value <= 99:
                raise ValueError("%r leads to %d" % (part, value))
    return value


class MoreProblems(unittest.TestCase):
    def test_the_committed_files_are_what_the_script_writes(self):
        with tempfile.TemporaryDirectory() as out, mock.patch("sys.argv", ["more_problems.py", "--out", out]):
            M.main()
            for name in ("fresh.jsonl", "negatives.jsonl"):
                with open(os.path.join(out, name), "rb") as new, open(os.path.join(PROBLEMS, name), "rb") as old:
                    self.assertEqual(new.read(), old.read(), name)

    def test_every_answer_is_what_its_text_says(self):
        for p in load("fresh.jsonl"):
            self.assertEqual({solve(text) for text in [p["question"]] + p["paraphrases"]}, {p["answer"]}, p["id"])
        for n in load("negatives.jsonl"):
            self.assertEqual((solve(n["question"]), solve(n["other"])), (n["answer"], n["other_answer"]), n["id"])

    def test_the_reader_notices_a_wrong_answer(self):
        text = "Tom has 3 apples. Then he buys 4 more. Ann takes 2 apples from him. How many apples does Tom have?"
        self.assertEqual(solve(text), 5)
        self.assertRaises(ValueError, solve, text.replace("takes 2", "takes 9"))
        self.assertRaises(ValueError, solve, text.replace("buys", "eats"))

    def test_the_draws_are_those_of_the_dev_file(self):
        self.assertEqual([(p["id"], p["question"]) for p in M.dev_problems()], [(p["id"], p["question"]) for p in load("dev.jsonl")])

    def test_counts(self):
        fresh, negatives = load("fresh.jsonl"), load("negatives.jsonl")
        self.assertEqual(collections.Counter(p["n_ops"] for p in fresh), {n: 100 for n in range(2, 8)})
        self.assertEqual(collections.Counter(n["kind"] for n in negatives), {k: 250 for k in ("number", "operation", "name", "other")})


if __name__ == "__main__":
    unittest.main()
