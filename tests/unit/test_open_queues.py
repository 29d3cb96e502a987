"""Which service a queue URL opens."""

import sys
from pathlib import Path

import pytest
from backend_sqs import credentials
from keyring_double import USER, Keyring, keyring_of

from claim_queues import ConfigError, StoreError, open_queues


def test_without_a_url_it_is_this_users_own_file_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_queues() as queues:
        (id_,) = queues.post("q", [1])
        assert queues.address == f"sqlite:///{tmp_path}/state/itchy-octo-chainsaw/queues.sqlite3"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with open_queues() as queues:
        assert [message.id for message in queues.browse("q").messages] == [id_]


def test_the_users_directory_and_file_are_private(tmp_path: Path) -> None:
    open_queues().close()
    directory = tmp_path / "state" / "itchy-octo-chainsaw"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "queues.sqlite3").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///q.db", "q.db"),
        ("sqlite:///sub/../q.db", "q.db"),
        ("sqlite:///with%20blank%3F%23.db", "with blank?#.db"),
        ("sqlite:///ü.db", "ü.db"),
    ],
)
def test_three_slashes_are_a_path_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, path: str
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    open_queues(url).close()
    assert (tmp_path / path).is_file()


def test_four_slashes_are_an_absolute_path(tmp_path: Path) -> None:
    with open_queues(f"sqlite:///{tmp_path}/q.db") as queues:
        assert queues.address == f"sqlite:///{tmp_path}/q.db"
    assert (tmp_path / "q.db").is_file()


@pytest.mark.parametrize("path", ["", "//", "///", "q.db", "//host/q.db", "///q?x=1", "///q#x", "///a%00b"])
def test_a_sqlite_url_without_a_plain_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="write sqlite:///PATH"):
        open_queues(f"sqlite:{path}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "queue", "/tmp/queue", "http://example.org/", "redis://x", "SQLITE", ":", "://"])
def test_what_names_no_service_is_refused_with_what_would(url: str) -> None:
    with pytest.raises(
        ConfigError, match="write sqlite:///PATH, rackspace://USER@REGION, zaqar://CLOUD or sqs://REGION"
    ):
        open_queues(url)


def test_a_url_that_names_no_service_is_not_repeated_for_it_may_hold_a_secret() -> None:
    with pytest.raises(ConfigError) as refused:
        open_queues("rackpsace://me:canary@DFW")
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "service"),
    [
        ("sqlite:///q.db", "the embedded queue"),
        ("rackspace://me@DFW", "Rackspace Cloud Queues"),
        ("zaqar://?endpoint=http://127.0.0.1:1&project=p", "OpenStack Zaqar"),
        ("sqs://eu-west-1", "Amazon SQS"),
    ],
)
def test_a_scheme_names_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, service: str) -> None:
    monkeypatch.chdir(tmp_path)
    with credentials(), keyring_of(Keyring()), open_queues(url.replace("me@", f"{USER}@")) as queues:
        assert queues.limits.service == service


def test_a_state_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    with pytest.raises(StoreError, match="the directory cannot be made"):
        open_queues()


def test_zaqar_without_openstacksdk_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "claim_queues.zaqar", raising=False)
    monkeypatch.setitem(sys.modules, "openstack", None)
    monkeypatch.setitem(sys.modules, "openstack.connection", None)
    with pytest.raises(ConfigError, match=r"zaqar:// needs openstacksdk .*Credentials in docs/operating"):
        open_queues("zaqar://cloud")
