"""Small tiers of the campaigns with real processes, and proof that they bite."""

import pytest

from . import bitflips, kills, soak, stops, storage


def test_consumers_are_killed() -> None:
    result = kills.kill_consumers(0.02)
    assert result.violations == []
    assert result.figures["kills"] == 20
    assert result.figures["ok"] == result.figures["acknowledged"] == 2_020


def test_a_consumer_dies_at_each_step() -> None:
    result = kills.fail_at_steps(0.01)
    assert result.violations == []
    assert result.figures["kills"] == len(kills.STEPS)


def test_a_consumer_that_deletes_first_is_found_out() -> None:
    violations = kills.fail_at_steps(0.01, ("k3",), bug="delete-first").violations
    assert any("C1 lost" in line for line in violations)


def test_the_power_is_cut() -> None:
    result = storage.cut_power(3 / storage.CUTS)
    assert result.violations == []
    assert result.figures["n"] == 3
    assert int(result.figures["acknowledged"]) > 3


def test_a_queue_without_syncs_is_found_out() -> None:
    result = storage.cut_power(6 / storage.CUTS, bug="unsynced")
    # Where the consumers were quick, all that is undone has been made: then it is done twice, under ids given twice.
    assert [broken for broken in result.violations if broken.startswith("C")]


def test_a_consumer_endures() -> None:
    result = soak.soak(0.01)
    assert result.violations == []
    assert (result.figures["lost"], result.figures["twice"]) == (0, 0)


def test_a_consumer_that_leaks_is_found_out() -> None:
    memory, descriptors = soak.soak(0.01, bug="leak").violations
    assert memory.startswith("memory grew")
    assert descriptors.startswith("open descriptors grew")


def test_bits_flip_in_a_queue_file() -> None:
    result = bitflips.flip_bits(0.04)
    assert result.violations == []
    assert result.figures["n"] == 100
    assert all(int(result.figures[kind]) > 0 for kind in (bitflips.REFUSED, bitflips.LETTERS, bitflips.HARMLESS))


def test_a_queue_without_checksums_is_found_out() -> None:
    assert int(bitflips.flip_bits(0.04, bug="unchecked").figures[bitflips.CHANGED]) > 0


def test_consumers_are_stopped() -> None:
    result = stops.stop_consumers(0.02)
    assert result.violations == []
    assert (result.figures["n"], result.figures["POSTed twice"]) == (10, 0)


@pytest.mark.parametrize(
    ("bug", "found"),
    [("keeps", "messages are not free at once"), ("abandons", "messages POSTed again because of a stop")],
)
def test_a_stop_that_breaks_its_promise_is_found_out(bug: str, found: str) -> None:
    stopped = stops.Stops(backoffs=False)
    stops.stop_busy(stopped, 2, bug)
    assert any(found in line for line in stopped.violations), stopped.violations


def test_a_stop_that_takes_too_long_is_found_out() -> None:
    stopped = stops.Stops(backoffs=True)
    stops.stop_hanging(stopped, 0, 0, bug="lingers")
    assert any("exit code None after 5" in line for line in stopped.violations), stopped.violations


def test_a_consumer_stands_still_past_its_claim() -> None:
    result = stops.suspend_consumers(0.01, ("k3-look", "k8-asked", "k8"))
    assert result.violations == []
    assert result.figures["n"] == 3
    assert int(result.figures["taken over"]) > 0


@pytest.mark.parametrize(
    ("bug", "step", "found"),
    [("no-look", "k3-look", "K6"), ("no-fence", "k8-asked", "messages that another held were touched")],
)
def test_a_stale_holder_that_goes_on_is_found_out(bug: str, step: str, found: str) -> None:
    violations = stops.suspend_consumers(0.01, (step,), bug=bug).violations
    assert any(found in line for line in violations), violations


def test_what_a_dead_consumer_held_is_claimed_again() -> None:
    result = stops.recover(0.02)
    assert result.violations == []
    assert (result.figures["n"], result.figures["messages"]) == (2, 40)


def test_claims_that_outlive_their_ttl_are_found_out() -> None:
    violations = stops.recover(0.02, bug="long-claims").violations
    assert any("claimed again only after" in line for line in violations), violations


def test_the_maker_is_away() -> None:
    result = stops.outage(0.01)
    assert result.violations == []
    assert (result.figures["n"], result.figures["dead letters"]) == (200, 0)


def test_an_outage_that_is_charged_to_messages_is_found_out() -> None:
    violations = stops.outage(0.01, ("gone",), bug="never-excuses").violations
    assert any("dead letters" in line for line in violations), violations
    assert any("receives count against" in line for line in violations), violations


def test_a_message_kills_its_consumer() -> None:
    result = stops.poison(0.03, most_receives=3)
    assert result.violations == []
    assert result.figures["exactly as often as allowed"] == result.figures["n"] == 3


@pytest.mark.parametrize(("bug", "found"), [("never-charges", "POSTed ["), ("no-trial", "dead letters, 1 of them")])
def test_poison_that_is_miscounted_is_found_out(bug: str, found: str) -> None:
    violations = stops.poison(0.01, bug=bug, most_receives=3).violations
    assert any(found in line for line in violations), violations
