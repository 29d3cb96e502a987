"""The widgets in their file: each created once, there after a restart, counted by time; and a file that is gone."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import apsw
import pytest

from claim_queues import StoreError
from widgets.store import SELECT_COUNT, SELECT_FOUND, SELECT_PAGE, Origin, Widgets

ID, OTHER_ID = (f"31f37378-54f4-11e5-ad75-3c970e65f73{number}" for number in (1, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "widgets.sqlite3"


@pytest.fixture
def widgets(path: Path) -> Iterator[Widgets]:
    with closing(Widgets(path)) as found:
        yield found


@pytest.fixture
def other_process(widgets: Widgets, path: Path) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(path))) as connection:
        yield connection


def test_of_many_threads_that_ask_for_one_widget_one_creates_it(widgets: Widgets) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = [answer for (answer,) in pool.map(widgets.create, [[(ID, Origin())]] * 64)]
    assert sorted(is_new for _, is_new in found) == [False] * 63 + [True]
    assert {str(widget) for widget, _ in found} == {str(widgets.find(ID))}


def test_a_file_that_is_removed_while_a_widget_is_written_takes_none(
    widgets: Widgets, path: Path, other_process: apsw.Connection
) -> None:
    with ThreadPoolExecutor() as pool:
        other_process.execute("BEGIN IMMEDIATE")
        creating = pool.submit(widgets.create, [(ID, Origin())])
        time.sleep(0.2)  # it waits for the other process by then
        path.unlink()
        other_process.execute("ROLLBACK")
        assert isinstance(creating.exception(), StoreError)


def test_rates_count_what_is_new_in_the_five_seconds_that_run_at_once(widgets: Widgets, now: list[float]) -> None:
    assert widgets.rates() == [0] * 60
    widgets.create([(each, Origin()) for each in (ID, ID, OTHER_ID)])
    assert widgets.rates() == [0] * 59 + [0.4]
    now[0] += 5
    assert widgets.rates() == [0] * 58 + [0.4, 0]


def test_a_widget_knows_its_first_message_and_its_neighbours_also_in_a_file_of_an_older_version(path: Path) -> None:
    with closing(Widgets(path)) as widgets:
        widgets.create([(ID, Origin("message", 2, 7)), (OTHER_ID, Origin())])
        widgets.create([(ID, Origin("another", 9, 9))])
        assert widgets.origin(ID) == (Origin("message", 2, 7), None, OTHER_ID)
        assert widgets.origin(OTHER_ID) == (Origin(), ID, None)
    with closing(apsw.Connection(str(path))) as file:
        file.execute("DROP TABLE origin")
    with closing(Widgets(path)) as widgets:
        assert widgets.origin(OTHER_ID) == (Origin(), ID, None)


@pytest.mark.parametrize(
    ("query", "values"), [(SELECT_PAGE, (5, 20)), (SELECT_FOUND, ("0", "0g", 20)), (SELECT_COUNT, ())]
)
def test_no_query_reads_more_rows_than_it_shows(
    other_process: apsw.Connection, query: str, values: tuple[object, ...]
) -> None:
    plan = str(other_process.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall())
    assert "SEARCH widget" in plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


def test_times_are_utc_wherever_the_maker_is(widgets: Widgets, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        ((made, _),) = widgets.create([(ID, Origin())])
        assert abs(datetime.fromisoformat(made["created_at"]) - datetime.now(UTC)) < timedelta(minutes=1)
    time.tzset()
