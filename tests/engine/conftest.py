from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.loader import LoadedModel, load_model
from tests.checkpoints import build_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny checkpoint, made once a session: not to be changed."""

    @cache
    def build(family: str) -> Path:
        return build_checkpoint(family, tmp_path_factory.mktemp("checkpoints") / family)

    return build


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    @cache
    def load(family: str) -> LoadedModel:
        return load_model(str(checkpoint(family)))

    return load
