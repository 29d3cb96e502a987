"""Consumer and maker as processes that share a signing secret, or do not; and that nobody else learns it."""

import json
import signal
from pathlib import Path

import pytest
import requests
from doubles.signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, traces
from rig import Rig
from support import ANSWER_S, nth_id, run_script, wait_until, widget_maker, widgets

IDS = [nth_id(number) for number in range(5)]


def signing(rig: Rig, name: str, *secrets: str) -> list[object]:
    """The option for a file of these secrets."""
    (rig.directory / name).write_text("\n".join(secrets) + "\n")
    return ["--signing-secret-file", rig.directory / name]


@pytest.mark.parametrize("batch", [1, 5])
def test_who_shares_the_secret_gets_widgets_and_others_lose_nothing(rig: Rig, batch: int) -> None:
    rig.post(*IDS)
    with widget_maker(rig.directory, *signing(rig, "makers", SECRET)) as (url, _):
        options = ["--maker-url", f"{url}/widgets", "--post-batch", batch]
        for wrong in ([], signing(rig, "wrong", OLD_SECRET)):
            with rig.consumer(*options, *wrong) as consumer:
                wait_until(lambda consumer=consumer: "HTTP 401: Standard Webhooks: " in consumer.err)
                consumer.signal(signal.SIGTERM)
                assert consumer.exit_code() == 0
        assert (widgets(url), rig.outcomes(), rig.left()) == ([], {}, len(IDS))
        rig.drain(*options, *signing(rig, "right", SECRET))
        assert (sorted(widgets(url)), rig.outcomes()) == (IDS, dict.fromkeys(IDS, "created"))


def test_no_secret_is_in_a_log_an_error_a_process_list_a_queue_or_a_file(rig: Rig) -> None:
    rig.post(*IDS, "this_is_not_a_valid_widget_id")
    rig.post_bodies("no request")
    makers, consumers = signing(rig, "makers", SECRET), signing(rig, "consumers", SECRET, OLD_SECRET)
    with (
        widget_maker(rig.directory, *makers, "--log-level", "debug", "--fail-rate", 1) as (url, failing),
        rig.consumer("--maker-url", f"{url}/widgets", *consumers) as consumer,
    ):
        wait_until(lambda: rig.letters() and "rejected" in rig.outcomes().values())
        seen = [
            Path(f"/proc/{one.process.pid}/{what}") for one in (consumer, failing) for what in ("cmdline", "environ")
        ]
        said = [path.read_text(errors="replace") for path in seen]
        assert "widget_consumer.py\0--queue-url" in said[0]
        failing.kill()
        said += [consumer.out, consumer.err, failing.out, failing.err]
    with widget_maker(rig.directory, *signing(rig, "other", OLD_SECRET), "--log-level", "debug") as (url, maker):
        with rig.consumer("--maker-url", f"{url}/widgets", *makers) as consumer:
            rig.post(*IDS)
            wait_until(lambda: "HTTP 401" in consumer.err)
            said += [consumer.out, consumer.err]
        said += [requests.get(f"{url}{path}", timeout=ANSWER_S).text for path in ("/", "/metrics", "/openapi.json")]
        said += [maker.out, maker.err]
    weak = signing(rig, "weak", SECRET, SECRET[:30])
    for name in ("widget_maker.py", "widget_consumer.py"):
        for words, code in ((weak, 4), (["--signing-secret-file", SECRET], 2)):
            ended = run_script(name, *words, cwd=rig.directory)
            assert (ended.returncode, len(ended.stderr.splitlines())) == (code, 1)
            said += [ended.stdout, ended.stderr]
    kept = [path.read_text(errors="replace") for path in rig.directory.rglob("*") if "sqlite3" in path.name]
    assert len(kept) >= 3
    everything = "".join([*said, *kept, json.dumps(rig.letters() + rig.responses())])
    for trace in traces(KEY) + traces(OLD_KEY):
        assert trace[:20] not in everything
