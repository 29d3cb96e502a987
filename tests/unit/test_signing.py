"""Signatures by Standard Webhooks, and the secrets that are taken for them."""

import base64
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyring_double import PlainText, keyring_of
from signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, secret_of, sign, signed, traces

from claim_queues import ConfigError, CredentialsError
from claim_queues.signing import BadSignature, Signer, load_signer

BODY = b'{"widget_id": "\xc3\xa9"}'


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


# Signatures


def test_the_double_signs_the_standards_own_example_as_it_says() -> None:
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_is_signed_is_id_time_and_body() -> None:
    headers = Signer([SECRET]).headers("m1", BODY.decode())
    timestamp = headers["webhook-timestamp"]
    assert abs(int(timestamp) - time.time()) < 5
    assert headers == {
        "webhook-id": "m1",
        "webhook-timestamp": timestamp,
        "webhook-signature": sign(KEY, "m1", timestamp, BODY),
    }


def test_while_a_secret_is_changed_both_sign_and_either_is_taken() -> None:
    both = Signer([SECRET, OLD_SECRET])
    headers = both.headers("m1", BODY.decode())
    assert [len(headers["webhook-signature"].split())] == [2]
    for secret in (SECRET, OLD_SECRET):
        Signer([secret]).check(headers, BODY)
    for key in (KEY, OLD_KEY):
        both.check(signed(BODY, key=key), BODY)


@pytest.mark.parametrize("seconds", [-290, 290])
def test_a_signature_is_taken_for_five_minutes_in_both_directions(seconds: int) -> None:
    Signer([SECRET]).check(signed(BODY, ahead_s=seconds), BODY)


def test_other_versions_beside_the_first_are_passed_over() -> None:
    headers = signed(BODY)
    Signer([SECRET]).check(headers | {"webhook-signature": f"v1a,AAAA v2,x {headers['webhook-signature']}"}, BODY)


def wrong() -> dict[str, dict[str, str]]:
    """Headers by what is wrong with them now."""
    good = signed(BODY)
    return {
        "no headers": {},
        "no id": {"webhook-timestamp": good["webhook-timestamp"], "webhook-signature": good["webhook-signature"]},
        "no signature": {"webhook-id": "m1", "webhook-timestamp": good["webhook-timestamp"]},
        "no timestamp": {"webhook-id": "m1", "webhook-signature": good["webhook-signature"]},
        "empty": dict.fromkeys(good, ""),
        "another id": good | {"webhook-id": "m2"},
        "another time": good | {"webhook-timestamp": str(int(good["webhook-timestamp"]) + 1)},
        "another key": signed(BODY, key=OLD_KEY),
        "another body": signed(BODY + b" "),
        "old": signed(BODY, ahead_s=-310),
        "from the future": signed(BODY, ahead_s=310),
        "cut": good | {"webhook-signature": good["webhook-signature"][:-5]},
        "odd base64": good | {"webhook-signature": good["webhook-signature"][:-2]},
        "not ASCII": good | {"webhook-signature": "v1,\xe9\xff"},
        "id not ASCII": good | {"webhook-id": "\xe9"},
        "no version": good | {"webhook-signature": good["webhook-signature"].removeprefix("v1,")},
        "version 2 alone": good | {"webhook-signature": good["webhook-signature"].replace("v1", "v2")},
        "commas": good | {"webhook-signature": "v1," * 9},
        "10,000 signatures": good | {"webhook-signature": " ".join(["v1," + "A" * 43 + "="] * 10_000)},
        **{
            f"time {text[:12]!r}": good | {"webhook-timestamp": text}
            for text in ("x", "nan", "inf", "-1", "1e400", "9" * 5_000, "\u0661", "0x1", " ", "1_0")
        },
    }


@pytest.mark.parametrize("name", wrong())
@pytest.mark.parametrize("secrets", [[SECRET], [SECRET, SECRET]], ids=["one", "two"])
def test_any_other_signature_is_refused(name: str, secrets: list[str]) -> None:
    with pytest.raises(BadSignature):
        Signer(secrets).check(wrong()[name], BODY)


def test_a_body_that_is_no_text_is_refused() -> None:
    with pytest.raises(BadSignature):
        Signer([SECRET]).check(signed(b"\xff"), b"\xff")


@given(st.fixed_dictionaries({name: st.text(max_size=40) for name in signed(BODY)}), st.binary(max_size=40))
def test_whatever_is_sent_unsigned_is_refused_and_raises_nothing_else(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(BadSignature):
        Signer([SECRET]).check(headers, body)


# Secrets


@pytest.mark.parametrize(
    "content",
    [
        SECRET,
        f"{SECRET}\n",
        f"\n  {SECRET}\r\n",
        SECRET.rstrip("="),
        f"{SECRET}\n{OLD_SECRET}\n",
        secret_of(b"k" * 24),
        secret_of(b"k" * 64),
    ],
)
def test_a_file_holds_one_secret_or_two(secret_file: Path, content: str) -> None:
    secret_file.write_text(content)
    signer = load_signer(str(secret_file), None)
    assert signer is not None
    key = base64.b64decode(content.split(maxsplit=1)[0].removeprefix("whsec_") + "==")
    signer.check(signed(BODY, key=key), BODY)


@pytest.mark.parametrize(("mode", "lines"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)])
def test_a_file_that_others_may_read_is_one_line_in_the_log(
    secret_file: Path, mode: int, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    secret_file.write_text(SECRET)
    secret_file.chmod(mode)
    load_signer(str(secret_file), None)
    assert [record.getMessage() for record in caplog.records] == [
        "others may read the signing secret: chmod 600"
    ] * lines


def test_without_a_secret_nothing_is_signed() -> None:
    assert load_signer(None, None) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds 0 signing secrets"),
        (f"{SECRET} {SECRET} {SECRET}", "holds 3 signing secrets"),
        (secret_of(b"k" * 23), "is weak: it has 23 bytes"),
        (secret_of(b"k" * 65), "has 65 bytes"),
        ("whsec_", "is no base64"),
        ("whsec_" + "*" * 44, "is no base64"),
        ("whsec_" + "A" * 41, "is no base64"),
        ("whsec_" + "\u0661" * 44, "is no base64"),
        (SECRET.removeprefix("whsec_"), "does not begin with whsec_"),
        (SECRET.replace("whsec_", "whsk_"), "does not begin with whsec_"),
        (SECRET.upper(), "does not begin with whsec_"),
        (f"{SECRET}\nhunter2-canary", "signing secret 2 does not begin"),
        ("whsec_" + "A" * 10_000, "has "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_secret_that_is_weak_or_none_is_refused_without_showing_it(
    secret_file: Path, content: str, says: str
) -> None:
    secret_file.write_text(content)
    with pytest.raises(CredentialsError, match=says) as raised:
        load_signer(str(secret_file), None)
    assert str(secret_file) in str(raised.value)
    for secret in content.split():
        assert secret.removeprefix("whsec_")[:8] not in str(raised.value) or secret == "whsec_"


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_secret_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CredentialsError, match=name):
        load_signer(str(tmp_path / name), None)


def test_a_secret_in_place_of_a_file_name_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="name a file") as raised:
        load_signer(SECRET, None)
    assert not any(trace in str(raised.value) for trace in traces())


def test_both_places_at_once_are_refused(secret_file: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load_signer(str(secret_file), "me")


class Entries(PlainText):
    """A keyring with one signing secret."""

    def get_password(self, service: str, username: str) -> str | None:
        return f"{SECRET}\n" if (service, username) == ("itchy-octo-chainsaw", "me") else None


Entries.__module__ = __name__


@pytest.fixture
def safe_keyring() -> Iterator[None]:
    with keyring_of(Entries()):
        yield


@pytest.mark.usefixtures("safe_keyring")
def test_a_secret_comes_from_keyring() -> None:
    assert keyring.get_keyring().get_password("itchy-octo-chainsaw", "me")
    signer = load_signer(None, "me")
    assert signer is not None
    signer.check(signed(BODY), BODY)


@pytest.mark.usefixtures("safe_keyring")
def test_a_keyring_without_the_secret_says_how_to_store_it() -> None:
    with pytest.raises(CredentialsError, match="keyring set itchy-octo-chainsaw other"):
        load_signer(None, "other")


def test_a_keyring_that_is_not_safe_is_refused() -> None:
    with keyring_of(PlainText()), pytest.raises(CredentialsError, match="plain text"):
        load_signer(None, "me")


def test_a_signer_never_shows_its_secrets_and_can_go_to_another_process() -> None:
    signer = Signer([SECRET])
    assert not any(trace in text for trace in traces() for text in (repr(signer), str(signer), str(vars(signer))))
    pickle.loads(pickle.dumps(signer)).check(signed(BODY), BODY)
