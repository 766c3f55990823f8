"""Whatever production code draws at random, drawn from the seed: ids, incarnations, tie breakers, backoffs."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Ids are secrets in production and must not be guessed; here they must be the same again."""
    source = random.Random(f"ids {seed}")
    state = random.getstate()
    random.seed(f"globals {seed}")
    try:
        with (
            patch.object(secrets, "token_bytes", lambda nbytes=32: source.randbytes(nbytes)),
            patch.object(secrets, "token_hex", lambda nbytes=32: source.randbytes(nbytes).hex()),
            patch.object(secrets, "randbits", source.getrandbits),
        ):
            yield
    finally:
        random.setstate(state)
