"""The child processes of `benchmarks.swapping`."""

from __future__ import annotations

from benchmarks import harness, swapping

if __name__ == "__main__":
    harness.serve(swapping.act)
