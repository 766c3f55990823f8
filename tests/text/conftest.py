"""The tokenizers of tests/text, each loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from router.text import Tokenizer
from tests.text.checkpoints import KINDS, write_checkpoint

settings.register_profile("text", deadline=None)  # a busy machine is no defect of the code
settings.load_profile("text")


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root: Path = tmp_path_factory.mktemp("checkpoints")
    return {kind: Tokenizer.load(str(write_checkpoint(root / kind, kind))) for kind in KINDS}
