"""Producer, consumers and the real maker together, as processes, on the embedded queue."""

from pathlib import Path

from rig import DEAD_LETTERS, RESPONSES, Rig
from support import free_port, run_script, script, widget_maker, widgets

from claim_queues import open_queues

KNOWN_ID = "31f37378-54f4-11e5-ad75-3c970e65f731"


def submit(rig: Rig, *options: object) -> list[str]:
    """Submit requests; gives their widget ids."""
    ended = run_script("widget_producer.py", "--queue-url", f"sqlite:///{rig.file}", *options, cwd=rig.directory)
    assert ended.returncode == 0, ended.stderr
    return [line.split()[1] for line in ended.stdout.splitlines()]


def test_two_consumers_and_a_maker_that_often_fails_make_each_widget_once(rig: Rig, tmp_path: Path) -> None:
    ids = submit(rig, "--count", 100)
    with widget_maker(tmp_path, "--fail-rate", 0.2) as (maker_url, _):
        options = ["--maker-url", f"{maker_url}/widgets", "--drain", "--poll-interval", 0.1, "--max-receives", 20]
        with rig.consumer(*options) as one, rig.consumer(*options) as other:
            rig.wait(lambda: None not in (one.process.poll(), other.process.poll()))
        made = widgets(maker_url)

    assert (one.exit_code(), other.exit_code()) == (0, 0)
    assert sorted(made) == sorted(ids)
    assert rig.outcomes() == dict.fromkeys(ids, "created")
    assert (rig.left(), rig.letters(), rig.counted()) == (0, [], 0)
    assert one.events("failed, comes back") + other.events("failed, comes back")


def test_a_dead_letter_is_brought_back_and_made_once_the_fault_is_gone(rig: Rig, tmp_path: Path) -> None:
    submit(rig, "--widget-id", KNOWN_ID, "--widget-id", "no_uuid")
    port = free_port()
    options = ["--maker-url", f"http://127.0.0.1:{port}/widgets", "--max-receives", 2]
    with widget_maker(tmp_path, "--fail-rate", 1, "--fault-id", KNOWN_ID, port=port):
        rig.drain(*options)
    [letter] = rig.letters()
    assert (letter["body"], letter["status"]) == ({"widget_id": KNOWN_ID}, 500)
    assert rig.outcomes() == {KNOWN_ID: "failed", "no_uuid": "rejected"}

    redriven = run_script("claim_queues", "redrive", "--queue-url", f"sqlite:///{rig.file}", cwd=tmp_path)
    assert redriven.stdout.split()[0] == letter["request_id"]
    with widget_maker(tmp_path, port=port) as (url, _):
        rig.drain(*options)
        assert widgets(url) == [KNOWN_ID]
    assert [each["outcome"] for each in rig.responses() if each["widget_id"] == KNOWN_ID] == ["failed", "created"]
    assert (rig.left(), rig.letters()) == (0, [])


def test_with_no_option_at_all_three_scripts_in_three_directories_work_together(tmp_path: Path) -> None:
    port = free_port()
    env = {"WIDGET_PORT": str(port), "WIDGET_MAKER_URL": f"http://127.0.0.1:{port}/widgets"}
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for directory in (one, two, three):
        directory.mkdir()

    with script("widget_maker.py", cwd=one, env=env), script("widget_consumer.py", cwd=two, env=env):
        ids = [f"--widget-id={KNOWN_ID}", "--widget-id=no_uuid"]
        ended = run_script("widget_producer.py", *ids, "--wait", cwd=three, env=env)

    said = sorted(line.split()[:2] for line in ended.stdout.splitlines())
    assert (ended.returncode, said) == (1, [[KNOWN_ID, "created"], ["no_uuid", "rejected"]])
    [file] = (tmp_path / "state").rglob("queues.sqlite3")
    assert file.parent.stat().st_mode & 0o777 == 0o700
    with open_queues(f"sqlite:///{file}") as queues:
        assert queues.stats(RESPONSES).total == queues.stats(DEAD_LETTERS).total == 0
