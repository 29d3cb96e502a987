"""The doubles of pyrax are shaped by the real library, which nothing imports before it is used."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from fake_pyrax import claim, client_error, exceptions, message, no_such_queue, posted, pyrax_client, pyrax_queue
from support import HERE

__all__ = ["pyrax_client", "pyrax_queue"]


def test_nothing_to_claim_is_none_and_a_list_without_messages_is_empty(pyrax_client: Mock, pyrax_queue: Mock) -> None:
    assert pyrax_client.claim_messages("requests", 60, 60, count=20) is None
    assert pyrax_client.list_messages("requests", include_claimed=True) == []
    assert pyrax_queue.claim_messages(60, 60) is None
    assert pyrax_queue.list(echo=True) == []


def test_a_call_that_pyrax_would_not_take_fails(pyrax_client: Mock, pyrax_queue: Mock) -> None:
    with pytest.raises(TypeError, match="limit"):
        pyrax_client.claim_messages("requests", 60, 60, limit=20)
    with pytest.raises(TypeError, match="ttl"):
        pyrax_client.post_message("requests", {"widget_id": "x"})
    with pytest.raises(TypeError, match="grace"):
        pyrax_queue.claim_messages(60)
    with pytest.raises(TypeError, match="unexpected"):
        message("m1", {}).delete(unexpected=1)
    with pytest.raises(AttributeError):
        pyrax_client.claim_all  # noqa: B018
    with pytest.raises(AttributeError):
        claim("c1", []).renew  # noqa: B018


def test_a_claim_holds_its_messages_as_pyrax_shows_them() -> None:
    (held,) = claim("c1", [message("m1", {"widget_id": "x"}, ttl=300, age=7, claim_id="c1")]).messages
    assert (held.id, held.claim_id, held.ttl, held.age, held.body) == ("m1", "c1", 300, 7, {"widget_id": "x"})


def test_the_ids_of_a_post_stand_in_its_resources() -> None:
    answer = posted("m1", "m2")
    assert answer.id is None
    assert [path.rsplit("/", 1)[-1] for path in answer.resources] == ["m1", "m2"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, exceptions.BadRequest),
        (401, exceptions.Unauthorized),
        (403, exceptions.Forbidden),
        (404, exceptions.NotFound),
        (413, exceptions.OverLimit),
        (429, exceptions.ClientException),
        (503, exceptions.ClientException),
    ],
)
def test_an_error_is_the_class_that_pyrax_gives_the_status(status: int, kind: type[Exception]) -> None:
    error = client_error(status, "why")
    assert (type(error), error.code) == (kind, status)
    assert "why" in str(error)


def test_a_missing_queue_asked_for_by_name_has_no_number_for_a_code() -> None:
    assert no_such_queue("requests").code == "The queue 'requests' does not exist."


def test_no_sdk_is_imported_before_its_service_is_used(tmp_path: Path) -> None:
    program = (
        "import sys, contextlib, widget_producer, widget_consumer, claim_queues.__main__\n"
        "with contextlib.suppress(claim_queues.ConfigError): claim_queues.open_queues('http://DFW')\n"
        "print(*sorted({'pyrax', 'openstack', 'boto3', 'keyring'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "\n"
