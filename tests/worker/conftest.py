from __future__ import annotations

import pytest

from decode_worker.admission import Admission
from prefill_worker.handoff import Handoff
from tests.worker.rig import Rig, make_rig
from tests.worker.sharing import TASKS


@pytest.fixture(params=[Admission, Handoff])
async def rig(request: pytest.FixtureRequest) -> Rig:
    """A worker of either role; modules about one of them have a `rig` of their own."""
    rig = make_rig(request.param)
    rig.task = TASKS[request.param]  # type: ignore[attr-defined]
    return rig
