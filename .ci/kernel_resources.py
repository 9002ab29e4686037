"""Compiles every kernel file for some architectures and lists what ptxas says: registers, shared memory, spills.

    python3 .ci/kernel_resources.py NVCC 80,90a [--table]

Fails where a hot kernel spills: those that run in every layer of a step. `--table` prints Markdown for the README.
"""

import argparse
import concurrent.futures
import pathlib
import re
import subprocess
import sys
import tempfile
import time

# Kernels of the decode and prefill path; the others run once a step or less.
HOT = [
    "add_rms_norm", "rope_append", "glu", "linear", "linear_w4", "linear_w8", "paged_attention", "row_stats",
    "entropy_probe", "kv_nearest",
]


def compile_one(nvcc, source, arch):
    """ptxas's report on one file."""
    with tempfile.TemporaryDirectory() as out:
        command = [nvcc, "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source), "-o", f"{out}/x.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source}: nvcc failed\n{done.stderr}")
    return done.stderr


def demangle(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


def entries(report):
    """(mangled name, registers, static shared bytes, spilled bytes) of each kernel in a report."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)", re.S)
    for m in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        yield m["name"], int(m["registers"]), int(shared[1]) if shared else 0, int(m["stores"]) + int(m["loads"])


def short(name):
    """`linear_kernel<bf16, 1, 2>` of a demangled kernel."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\(\w+\)$", "", name).replace("(int)", "").replace("(unsigned int)", "")


def main():
    args = argparse.ArgumentParser()
    args.add_argument("nvcc")
    args.add_argument("architectures")
    args.add_argument("--table", action="store_true")
    args = args.parse_args()
    start = time.monotonic()
    sources = sorted(pathlib.Path("cuda").glob("*.cu"))
    jobs = [(source, arch) for arch in args.architectures.split(",") for source in sources]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: compile_one(args.nvcc, *job), jobs))
    rows, spilled = {}, []
    for (source, arch), report in zip(jobs, reports):
        found = list(entries(report))
        for (_, registers, shared, spills), name in zip(found, demangle([f[0] for f in found])):
            name = short(name)
            base = name.split("<")[0].removesuffix("_kernel")
            rows.setdefault((source.name, base), {}).setdefault(arch, []).append((registers, shared, spills))
            if spills and any(base == hot or base.startswith(hot + "_") for hot in HOT):
                spilled.append(f"{name} on sm_{arch}: {spills} bytes")
    architectures = args.architectures.split(",")
    if args.table:
        print("| file | kernel | " + " | ".join(f"registers, sm_{a}" for a in architectures) + " | static shared | spills |")
        print("|---|---|" + "---|" * (len(architectures) + 2))
    for (source, base), by_arch in rows.items():
        span = lambda values: str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
        registers = [span([r for r, _, _ in by_arch[a]]) for a in architectures]
        everything = [x for a in architectures for x in by_arch[a]]
        shared, spills = span([s for _, s, _ in everything]), max(s for _, _, s in everything)
        line = [source, base, *registers, shared, str(spills)]
        print("| " + " | ".join(line) + " |" if args.table else "  ".join(line))
    print(f"{len(rows)} kernels, {len(jobs)} compilations, {(time.monotonic() - start) / 60:.1f} min", file=sys.stderr)
    if spilled:
        sys.exit("hot kernels spill registers:\n  " + "\n  ".join(spilled))


main()
