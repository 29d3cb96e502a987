"""The three scripts on each queue service: the same outcomes and exit codes everywhere."""

import signal
import uuid
from pathlib import Path

from service_scripts import Service
from support import Script, wait_until, widget_maker, widgets

BAD_IDS = [f"this_is_not_a_valid_widget_id_{number}" for number in range(10)]
PATIENCE_S = 60.0


def test_of_200_requests_each_widget_is_made_once_and_each_request_answered(service: Service, tmp_path: Path) -> None:
    good = [str(uuid.uuid1()) for _ in range(190)]
    ids = [id_ for start in range(10) for id_ in (BAD_IDS[start], *good[start::10])]

    submitted = service.run("widget_producer.py", "--ids-file", "-", "--create", stdin="\n".join(ids))
    with widget_maker(tmp_path, "--fail-rate", 0.2) as (maker_url, _):
        options = ["--maker-url", f"{maker_url}/widgets", "--max-receives", 20, "--create"]
        is_exact = not service.queues.limits.stats_settle  # elsewhere a drain reads for a minute that nothing is left
        with service.script("widget_consumer.py", *options, *(["--drain"] if is_exact else [])) as consumer:
            if not is_exact:
                end_when_done(service, consumer, len(ids))
            assert consumer.exit_code(PATIENCE_S) == 0
        made = widgets(maker_url)

    assert (submitted.returncode, submitted.stderr) == (0, "")
    assert [line.split()[1] for line in submitted.stdout.splitlines()] == ids
    assert sorted(made) == sorted(good)
    assert service.left() == (0, 0)
    assert service.outcomes() == dict.fromkeys(good, "created") | dict.fromkeys(BAD_IDS, "rejected")
    assert "failed, comes back" in consumer.err
    assert "Traceback" not in consumer.err


def end_when_done(service: Service, consumer: Script, count: int) -> None:
    """SIGTERM once all that there was to do is done; or let the test see how the consumer ended by itself."""

    def is_done() -> bool:
        return consumer.process.poll() is not None or (service.count_responses() >= count and service.left() == (0, 0))

    wait_until(lambda: "consuming" in consumer.err)
    wait_until(is_done, PATIENCE_S)
    consumer.signal(signal.SIGTERM)
