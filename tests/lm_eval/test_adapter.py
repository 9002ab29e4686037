"""The adapter for lm-evaluation-harness on the bundled model, without the harness: its two base classes are stood in for."""

import importlib.util
import os
import pathlib
import sys
import types
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("RKSC_RUN", str(ROOT / "target/release/rksc-run"))
ASK = "<|bos|>Problem: Tom has 5 apples and buys 7 more. How many apples does he have?\nApproach #1: Use short equations.\nStep 1:"


def adapter():
    class LM:
        pass

    for name, contents in {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": None},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": lambda _: lambda model: model},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    spec = importlib.util.spec_from_file_location("adapter", ROOT / "examples/lm_eval_rksc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Rksc(program=PROGRAM, flags="--dtype f32")


def request(*args):
    return types.SimpleNamespace(args=args)


class Adapter(unittest.TestCase):
    def setUp(self):
        self.model = adapter()

    def test_the_right_continuation_is_greedy_and_likelier(self):
        right, wrong = self.model.loglikelihood([request(ASK, " 5+7=12\n"), request(ASK, " 5+7=13\n")])
        self.assertTrue(right[1])
        self.assertFalse(wrong[1])
        self.assertLess(wrong[0], right[0])
        self.assertLessEqual(right[0], 0)

    def test_a_text_is_scored_whole_but_for_its_first_token(self):
        whole, = self.model.loglikelihood_rolling([request(ASK + " 5+7=12\n")])
        end, = self.model.loglikelihood([request(ASK, " 5+7=12\n")])
        self.assertLess(whole, end[0])

    def test_text_ends_at_its_stops_and_limits(self):
        free, line, short = self.model.generate_until([
            request(ASK, {"until": ["<|eos|>"], "max_gen_toks": 64}),
            request(ASK, {"until": "\n", "max_gen_toks": 64}),
            request(ASK, {"until": [], "max_gen_toks": 2, "do_sample": True, "temperature": 0.5}),
        ])
        self.assertTrue(free.startswith(" 5+7=12\n"), free)
        self.assertEqual(line, " 5+7=12")
        self.assertLess(len(short), len(line))


if __name__ == "__main__":
    unittest.main()
