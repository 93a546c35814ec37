"""`python -m tests.fuzz --examples N [--kind programs|trees] [--seed S] [--only NAME ...]`.

Exits with 1 if anything was found. Example i of a run is the first of a run whose seed is higher by i.
"""

import argparse
import os
import sys
import time

import jax

# Small programs take far longer to compile than to run. Read when the CPU backend starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    # Later ones end the process, for they do not know it.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_num_cpu_devices", 2)
# A raw error is known by the file that raised it.
jax.config.update("jax_traceback_filtering", "off")
# No program comes twice.
jax.config.update("jax_enable_compilation_cache", False)


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--kind", choices=("programs", "trees"), nargs="*", default=("programs", "trees"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=(), help="methods of curvature, or transformations")
    options = parser.parse_args()
    from tests.fuzz.programs.search import search
    from tests.fuzz.trees.search import search_trees

    kinds = {"programs": search, "trees": search_trees}
    start, lines, found = time.perf_counter(), [], 0
    for kind in options.kind:
        tally = kinds[kind](options.seed, options.examples, options.only, lambda text: print(text, flush=True))
        found += len(tally.told)
        lines.append(tally.line())
    print(f"{'; '.join(lines)}; {time.perf_counter() - start:.0f} s")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
