"""For all tests: property tests are not timed, since cores are shared, and a failure prints how to see it again."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("baton", deadline=None, print_blob=True)
settings.load_profile("baton")

# Without a GPU our Triton kernels run in its interpreter. Triton asks when it is first imported, which transformers
# does, and torch, which would know of a GPU, is not for every test to load.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storm-minutes", type=float, default=0.0, help="how long each storm of real faults goes on")
    parser.addoption("--storm-seed", type=int, default=1, help="of the soak's storms of real faults")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What only a device can show (graphs, memory that it reaches by itself) is not to be shown without one. All else
    of the kernels runs in the interpreter."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and there is none")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny float32 checkpoint, made once a session: not to be changed."""
    from tests.checkpoints import build_checkpoint  # torch and transformers, for the tests that use them

    @cache
    def build(family: str) -> Path:
        return build_checkpoint(family, tmp_path_factory.mktemp("checkpoints") / family)

    return build
