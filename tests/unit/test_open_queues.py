"""Which service a queue URL opens."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("url", ["queue", "/tmp/queue", "http://example.org/", "redis://x", "SQLITE", ":", "://"])
def test_what_names_no_service_is_refused_with_what_would(url: str) -> None:
    with pytest.raises(ConfigError, match="use sqlite:///PATH, rackspace://REGION, zaqar://CLOUD or sqs://REGION"):
        open_queues(url)


@pytest.mark.parametrize("scheme", ["rackspace", "zaqar", "sqs"])
def test_the_services_to_come_are_known_and_say_so(scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"the service {scheme}:// comes next"):
        open_queues(f"{scheme}://somewhere")


def test_a_state_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    with pytest.raises(StoreError, match="the directory cannot be made"):
        open_queues()
