"""Quick compilation: these tests compile far longer than they compute."""

import os

# Read when the CPU backend starts, which is after the tests are collected.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
