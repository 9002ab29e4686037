"""lm-evaluation-harness on rksc-run: its requests become files for `rksc-run score` and `rksc-run batch`.

    pip install lm_eval
    python examples/lm_eval_rksc.py --model rksc --model_args model=DIR,program=target/release/rksc-run --tasks gsm8k

`model` is a model folder (the bundled model where it is left out), `bos` a text in front of every prompt (such as <s>),
`flags` what else rksc-run should be told ("--dtype f32 --threads 8").
"""

import json
import pathlib
import subprocess
import tempfile

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model


@register_model("rksc")
class Rksc(LM):
    def __init__(self, model=None, program="rksc-run", bos="", flags="", **_):
        super().__init__()
        self.command = [program], (["-m", model] if model else []) + flags.split()
        self.bos = bos

    def run(self, command, lines, *flags):
        with tempfile.TemporaryDirectory() as folder:
            source, answers = pathlib.Path(folder, "in.jsonl"), pathlib.Path(folder, "out.jsonl")
            source.write_text("".join(json.dumps(line) + "\n" for line in lines))
            program, model = self.command
            subprocess.run([*program, command, *model, "--in", source, "--out", answers, *flags], check=True)
            return [json.loads(line) for line in answers.read_text().splitlines()]

    def score(self, pairs):
        lines = [{"context": self.bos + context, "text": text} for context, text in pairs]
        for record in self.run("score", [{k: v for k, v in line.items() if v} for line in lines]):
            scored = [i for i, logprob in enumerate(record["token_logprobs"]) if logprob is not None]
            is_greedy = all(record["predicted"][i] == record["tokens"][i] for i in scored)
            yield sum(record["token_logprobs"][i] for i in scored), is_greedy

    def loglikelihood(self, requests):
        return list(self.score(request.args for request in requests))

    def loglikelihood_rolling(self, requests):
        return [logprob for logprob, _ in self.score(("", request.args[0]) for request in requests)]

    def generate_until(self, requests):
        def line(number, context, until=(), max_gen_toks=256, do_sample=False, temperature=0.0, **rest):
            body = {"prompt": self.bos + context, "stop": [until] if isinstance(until, str) else list(until),
                    "max_tokens": max_gen_toks, "temperature": temperature if do_sample else 0.0, **rest}
            return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}

        answers = self.run("batch", [line(i, r.args[0], **r.args[1]) for i, r in enumerate(requests)])
        return [answer["response"]["body"]["choices"][0]["text"] for answer in answers]


if __name__ == "__main__":
    cli_evaluate()
