"""The rig as a fixture."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles.scripted_maker import ScriptedMaker
from rig import Rig

from claim_queues.sqlite import SqliteQueues


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with ScriptedMaker() as maker, SqliteQueues(tmp_path / "q.sqlite3") as queues:
        yield Rig(tmp_path, maker, queues)
