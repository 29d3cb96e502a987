"""Receives are counted on disk before each POST, and charged when it has ended."""

import pytest

from receive_counts import ReceiveCounts

RECEIVE = 5  # fifths


@pytest.fixture
def open_counts(tmp_path):
    opened = []

    def open_them(source="queue"):
        opened.append(ReceiveCounts(tmp_path / "counts.sqlite3", source))
        return opened[-1]

    yield open_them
    for counts in opened:
        counts.close()


def seen(counts, id_):
    """Receives, fifths charged, how often left open."""
    return tuple(counts.of([id_]).get(id_, (0, 0, 0)))[:3]


def test_a_consumer_that_dies_leaves_its_receives_counted_charged_and_open(open_counts):
    begun = open_counts().begin(["a", "b"])
    again = open_counts().begin(["a"])

    assert [tuple(receives)[:3] for receives in begun] == [(1, RECEIVE, 1), (1, RECEIVE, 1)]
    assert [tuple(receives)[:3] for receives in again] == [(2, 2 * RECEIVE, 2)]
    assert (seen(open_counts(), "a"), seen(open_counts(), "b")) == ((2, 2 * RECEIVE, 2), (1, RECEIVE, 1))


def test_an_answer_closes_a_message_and_its_charge_takes_the_place_of_the_receive(open_counts):
    counts = open_counts()
    counts.begin(["a"])
    counts.charge({"a": 1 - RECEIVE}, left_open=0)

    assert seen(open_counts(), "a") == (1, 1, 0)


def test_a_broken_connection_leaves_a_message_as_open_as_it_was_and_charged_no_less_than_nothing(open_counts):
    counts = open_counts()
    counts.begin(["a"])
    counts.begin(["a"])
    counts.charge({"a": -RECEIVE}, left_open=2)
    counts.charge({"a": -RECEIVE - 1}, None)

    assert seen(counts, "a") == (2, 0, 2)


def test_charges_that_come_from_two_threads_add_up_in_any_order(open_counts):
    one, other = open_counts(), open_counts()
    one.begin(["a", "b"])
    other.charge({"a": -RECEIVE}, None)  # the row is taken back before the message's own charge of five is written
    one.charge({"a": 0}, left_open=0)
    one.charge({"b": 0}, left_open=0)
    other.charge({"b": -RECEIVE}, None)

    assert seen(one, "a") == seen(one, "b") == (1, 0, 0)


def test_the_first_and_the_last_receive_have_their_times(open_counts):
    counts = open_counts()
    (first,) = counts.begin(["a"])
    (second,) = counts.begin(["a"])

    assert second.first_at == first.first_at == first.last_at
    assert second.last_at >= first.last_at > 1_700_000_000


def test_a_settled_message_is_forgotten_by_all(open_counts):
    counts = open_counts()
    counts.begin(["a", "b"])
    counts.forget(["a"])

    assert list(open_counts().of(["a", "b"])) == ["b"]


def test_queues_that_share_the_file_count_apart(open_counts):
    open_counts("one queue").begin(["a"])

    assert open_counts("another queue").of(["a"]) == {}
