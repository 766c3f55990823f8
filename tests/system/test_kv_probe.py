"""The KV probe: the model in the box answers from the KV that was handed over, so that one wrong block of it shows as a
wrong answer. Here the block is damaged where nothing guards it any more, between verification and commit."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton import model_in_the_box
from tests.system.corrupting import NOISE, STALE, Damage
from tests.system.harness import System, system
from tests.system.recall import Recall, recall, recall_questions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def asked() -> list[Recall]:
    return recall_questions(25, 1, 100, 400, 1000, 1500)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    log = tmp_path_factory.mktemp("probe") / "log"
    flags = [f"--block-size={BLOCK_SIZE}", "--dtype=float32"]
    async with system(model_in_the_box.DIRECTORY, log, *flags, command="tests.system.corrupting") as started:
        yield started


async def test_what_was_handed_over_whole_is_recalled(running: System, asked: list[Recall]) -> None:
    recalled = await recall(running, asked)
    assert recalled.share >= 0.98, recalled.wrong
    assert recalled.blocks == sum(-(-len(one.token_ids) // BLOCK_SIZE) for one in asked), "every block was handed over"


@pytest.mark.parametrize("kind", [STALE, NOISE])
async def test_one_damaged_block_shows_as_wrong_answers(running: System, asked: list[Recall], kind: str) -> None:
    await recall(running, asked[:1])  # whose blocks are then the stale ones
    recalled = await recall(running, asked, lambda one: Damage(kind, one.code // BLOCK_SIZE))
    assert recalled.share < 0.5, f"{recalled.share:.0%} are right all the same"
    assert await running.metric("baton_kv_verify_failures_total") == 0, "no verification could see it"
    assert await running.metric("baton_requests_resumed_total") == 0, "the answers are those of the damaged blocks"
