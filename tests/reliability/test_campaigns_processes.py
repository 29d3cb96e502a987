"""Small tiers of the campaigns with real processes, and proof that they bite."""

from . import bitflips, kills, soak, storage


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
    result = storage.cut_power(3 / storage.CUTS, bug="unsynced")
    assert int(result.figures["lost"]) > 0


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
