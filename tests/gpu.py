"""`make test-gpu`: the tests that run on a GPU where there is one. Without one `make test` has them on the CPU, and
kernels in Triton's interpreter."""

from __future__ import annotations

import sys

import pytest
import torch

_TESTS = ("tests/engine", "tests/worker", "tests/system/test_exactness.py", "tests/kernels")


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "test-gpu: this machine has no CUDA device that torch can use; `make test` runs the same tests without one",
            file=sys.stderr,
        )
        return 1
    print(f"test-gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}: pytest", flush=True)
    return int(pytest.main([*_TESTS, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
