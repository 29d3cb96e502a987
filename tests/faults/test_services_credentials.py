"""What the scripts do with secrets, without a safe place for them, and without queues, on each service."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from in_process import call
from scripted_maker import Raw, ScriptedMaker
from service_scripts import ALL, Service, over_a_wire, parameters
from support import wait_until

import claim_queues.__main__
import widget_consumer
import widget_producer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for InfluxDB"  # openstacksdk 4.22 warns of it at every clouds.yaml
)
FAILS, IS_BACK = "the queue service fails", "the queue service is back"
EXIT_FAILED, EXIT_CREDENTIALS = 1, 4
rackspace = pytest.mark.parametrize("service", parameters("cloud-queues"), indirect=True)
tool = claim_queues.__main__.main
COMMANDS: dict[str, tuple[Callable[[], NoReturn], tuple[str, ...]]] = {
    "producer": (widget_producer.main, ()),
    "consumer": (widget_consumer.main, ()),
    "stats": (tool, ("stats",)),
    "peek": (tool, ("peek",)),
    "dead-letters": (tool, ("dead-letters",)),
    "redrive": (tool, ("redrive",)),
    "purge": (tool, ("purge", "request", "--yes")),
}


# Secrets: each one of the doubles begins with "canary"


def process_list() -> str:
    return "".join(path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())


@over_a_wire
def test_no_secret_is_in_a_log_an_error_the_process_list_a_queue_or_a_file(service: Service, tmp_path: Path) -> None:
    service.env["AWS_SECRET_ACCESS_KEY"] = "canary-4b1d09e7"
    service.create()
    (good,) = service.submit(1)
    submitted = service.run("widget_producer.py", "--widget-id", "this_is_not_a_valid_widget_id")
    service.queues.post(service.request_queue, ["no request"])
    with ScriptedMaker() as maker:
        with service.consumer(maker, "--log-level", "debug") as consumer:
            wait_until(lambda: service.count_responses() == 3 and service.left() == (0, 1))
            running = process_list()
            service.fail(ALL, Raw(end="reset"))
            wait_until(lambda: FAILS in consumer.err)
            service.mend()
            wait_until(lambda: IS_BACK in consumer.err)
            consumer.signal(signal.SIGTERM)
            assert consumer.exit_code() == 0
        checked = service.run("claim_queues", "check")
        service.fail(ALL, service.refused)
        with service.consumer(maker, "--log-level", "debug") as refused:
            assert refused.exit_code() == EXIT_CREDENTIALS
    service.mend()
    queued = service.take(service.dead_letter_queue), service.take(service.response_queue)

    assert (submitted.returncode, checked.returncode) == (0, 0)
    assert [letter["body"] for letter in queued[0]] == ["no request"]
    assert {response["widget_id"] for response in queued[1]} == {good, "this_is_not_a_valid_widget_id", None}
    assert f"widget_consumer.py\0--maker-url\0{maker.url}" in running
    said = [submitted.stdout, submitted.stderr, checked.stdout, checked.stderr]
    said += [consumer.out, consumer.err, refused.out, refused.err]
    kept = [path.read_text(errors="replace") for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert "canary" not in "".join([running, *said, *kept, json.dumps(queued)])


@rackspace
@pytest.mark.parametrize(
    ("backend", "hint"),
    [
        ("keyring.backends.fail.Keyring", "keyring has no usable backend"),
        ("keyring.backends.null.Keyring", "keyring has no usable backend"),
        ("keyring_double.PlainText", "keyring keeps secrets in plain text"),
        ("keyring_double.Broken", "keyring failed"),
    ],
)
def test_a_keyring_that_does_not_keep_the_key_safely_is_exit_4_and_what_to_do(
    service: Any, backend: str, hint: str
) -> None:
    env = {"PYTHON_KEYRING_BACKEND": backend}
    for words in (["widget_consumer.py"], ["widget_producer.py"], ["claim_queues", "check"]):
        ended = service.run(*words, env=env)

        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (EXIT_CREDENTIALS, "", 1), ended.stderr
        assert ended.stderr.startswith(f"error: {hint}")
        assert "keyring set pyrax tester" in ended.stderr
        assert "canary" not in ended.stderr
    assert service.identity.requests == service.wire.requests == []


# Queues that do not exist


@over_a_wire
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_queue_is_an_error_that_says_how_to_make_it(service: Service, command: str) -> None:
    main, words = COMMANDS[command]
    if command in ("peek", "dead-letters") and not service.queues.limits.can_browse:
        pytest.skip("the service cannot look without claiming")
    ended = call(main, *words)

    assert (ended.code, ended.out.partition("\n")[2], ended.err.count("\n")) == (EXIT_FAILED, "", 1), ended
    assert ended.err.startswith(f"error: queue {service.names[command == 'dead-letters' and 2]} does not exist")
    assert ended.err.endswith("create it with --create\n")
    assert not any(map(service.queues.exists, service.names))


@over_a_wire
def test_check_names_each_missing_queue_and_any_script_makes_them(service: Service) -> None:
    ended = call(tool, "check")
    assert (ended.code, ended.err) == (EXIT_FAILED, "")
    missing = [line for line in ended.lines if line.startswith("failure")]
    assert [(name in line, "--create" in line) for name, line in zip(service.names, missing, strict=True)] == [
        (True, True)
    ] * 3

    assert call(widget_producer.main, "--create").code == 0
    assert list(map(service.queues.exists, service.names)) == [True, False, False]
    assert call(tool, "check", "--create").code == 0
    assert all(map(service.queues.exists, service.names))
