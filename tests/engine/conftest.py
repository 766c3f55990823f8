from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.loader import LoadedModel, load_model
from tests.engine.driver import DEVICE
from tests.engine.scheduler_harness import Harness


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    @cache
    def load(family: str) -> LoadedModel:
        return load_model(str(checkpoint(family)), device=DEVICE)

    return load


@pytest.fixture(params=["one by one", "overlapped"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Harness, "overlap", request.param == "overlapped")
