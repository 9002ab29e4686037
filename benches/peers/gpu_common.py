"""What the peers on a GPU share: the models' shapes, and time taken as `rksc-run bench kernels` takes it.

A sample is one replay of a CUDA graph of many launches between two events, divided by its launches; inputs that come from memory in a
step of a model rotate through 256 MB.
"""

import argparse
import json
import statistics

import torch

ROTATE_BYTES = 256 << 20
SAMPLES = 40
SAMPLE_MS = 0.5
MODELS = {
    "qwen2.5-7b": dict(hidden=3584, intermediate=18944, layers=28, q=28, kv=4, dim=128, vocab=152064, family="qwen2"),
    "llama-3-8b": dict(hidden=4096, intermediate=14336, layers=32, q=32, kv=8, dim=128, vocab=128256, family="llama"),
}


class Out:
    """One JSON line a case, on disk as soon as it is done."""

    def __init__(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", default="/dev/stdout")
        self.file = open(parser.parse_args().out, "a")
        self.write(peer="torch", version=torch.__version__, device=torch.cuda.get_device_name())

    def write(self, **line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def case(self, peer, op, shapes, run, copies=1):
        """`run(i)` launches with the i-th set of inputs; it stands for all of `shapes`. A failure is a line too."""
        try:
            us, launches = timed(run, copies)
            found = dict(us=percentiles(us), launches_a_sample=launches)
        except Exception as error:  # out of memory, an unsupported shape: the next case may do
            found = dict(failed=(str(error).splitlines() or [repr(error)])[0])
            torch.cuda.empty_cache()
        for shape in shapes:
            self.write(peer=peer, op=op, shape=shape, **found)


def copies(num_bytes):
    return -(-ROTATE_BYTES // max(num_bytes, 1))


def percentiles(samples):
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p10": cuts[0], "p50": statistics.median(samples), "p90": cuts[-1]}


def timed(run, copies):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(copies, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    once = graph(run, copies, copies)
    sample(once)
    rounds = min(512, max(1, round(SAMPLE_MS / max(sample(once), 1e-3) + 0.5)))
    launches = copies * rounds
    many = graph(run, copies, launches)
    for _ in range(3):
        sample(many)
    return [sample(many) * 1e3 / launches for _ in range(SAMPLES)], launches


def graph(run, copies, launches):
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for i in range(launches):
            run(i % copies)
    return captured


def sample(captured):
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    captured.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
