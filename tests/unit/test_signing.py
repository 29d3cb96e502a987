"""Signatures by Standard Webhooks, and the secrets that are accepted for them."""

import base64
import time
from pathlib import Path

import pytest
from doubles.keyring_double import PlainText, keyring_of
from doubles.signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, secret_of, sign, signed, traces
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import WebhookVerificationError

from claim_queues import CredentialsError
from widgets.signing import Signer, load_signer

BODY = b'{"widget_id": "\xc3\xa9"}'


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def signer_of(*secrets: str) -> Signer:
    return Signer(" ".join(secrets), "a test")


def test_the_double_signs_the_standards_own_example_as_it_says() -> None:
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_is_signed_is_id_time_and_body() -> None:
    headers = signer_of(SECRET).headers("m1", BODY)
    timestamp = headers["webhook-timestamp"]
    assert abs(int(timestamp) - time.time()) < 5
    assert headers == {
        "webhook-id": "m1",
        "webhook-timestamp": timestamp,
        "webhook-signature": sign(KEY, "m1", timestamp, BODY),
    }


def test_while_a_secret_is_changed_both_sign_and_either_is_accepted() -> None:
    both = signer_of(SECRET, OLD_SECRET)
    headers = both.headers("m1", BODY)
    for secret in (SECRET, OLD_SECRET):
        signer_of(secret).check(headers, BODY)
    for key, seconds in ((KEY, 0), (OLD_KEY, 0), (KEY, -290), (KEY, 290)):
        both.check(signed(BODY, key=key, ahead_s=seconds), BODY)


def wrong() -> dict[str, dict[str, str]]:
    """Headers by what is wrong with them now."""
    good = signed(BODY)
    times = ("x", "nan", "inf", "-1", "1e400", "9" * 5_000)
    return {
        "no headers": {},
        "empty": dict.fromkeys(good, ""),
        "another id": good | {"webhook-id": "m2"},
        "another key": signed(BODY, key=OLD_KEY),
        "another body": signed(BODY + b" "),
        "old": signed(BODY, ahead_s=-310),
        "from the future": signed(BODY, ahead_s=310),
        "cut": good | {"webhook-signature": good["webhook-signature"][:-5]},
        "not ASCII": good | {"webhook-signature": "v1,\xe9\xff"},
        "id not ASCII": good | {"webhook-id": "\xe9"},
        "commas": good | {"webhook-signature": "v1," * 9},
        **{f"time {text[:12]!r}": good | {"webhook-timestamp": text} for text in times},
    }


@pytest.mark.parametrize("name", wrong())
@pytest.mark.parametrize("secrets", [[SECRET], [SECRET, SECRET]], ids=["one", "two"])
def test_any_other_signature_is_refused(name: str, secrets: list[str]) -> None:
    with pytest.raises(WebhookVerificationError, match=r".+"):
        signer_of(*secrets).check(wrong()[name], BODY)


@given(st.fixed_dictionaries({name: st.text(max_size=40) for name in signed(BODY)}), st.binary(max_size=40))
def test_whatever_is_sent_unsigned_is_refused_and_raises_nothing_else(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(WebhookVerificationError):
        signer_of(SECRET).check(headers, body)


@pytest.mark.parametrize(
    "content",
    [
        SECRET,
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
    for secret in content.split():
        key = base64.b64decode(secret.removeprefix("whsec_") + "==")
        signer.check(signed(BODY, key=key), BODY)


@pytest.mark.parametrize(
    "content",
    [
        *("", f"{SECRET} {SECRET} {SECRET}", secret_of(b"k" * 23), "whsec_" + "*" * 44, "whsec_" + "A" * 41),
        *(SECRET.removeprefix("whsec_"), SECRET.upper(), f"{SECRET}\nhunter2-canary", f"{SECRET}{OLD_SECRET}"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_weak_or_malformed_secret_is_refused_without_showing_it(secret_file: Path, content: str) -> None:
    secret_file.write_text(content)
    with pytest.raises(CredentialsError, match="24 to 64 random bytes") as raised:
        load_signer(str(secret_file), None)
    assert str(secret_file) in str(raised.value)
    for secret in content.split():
        assert secret.removeprefix("whsec_")[:8] not in str(raised.value)


class Entries(PlainText):
    """A keyring with one signing secret, in a backend that is safe by its name."""

    def get_password(self, service: str, username: str) -> str | None:
        return f"{SECRET}\n" if (service, username) == ("itchy-octo-chainsaw", "me") else None


def test_a_secret_comes_from_keyring_or_the_error_says_how_to_store_it() -> None:
    with keyring_of(Entries()):
        signer = load_signer(None, "me")
        assert signer is not None
        signer.check(signed(BODY), BODY)
        with pytest.raises(CredentialsError, match="keyring set itchy-octo-chainsaw other"):
            load_signer(None, "other")
    with keyring_of(PlainText()), pytest.raises(CredentialsError, match="plain text"):
        load_signer(None, "me")


def test_a_signer_never_shows_its_secrets() -> None:
    signer = signer_of(SECRET)
    assert not any(trace in text for trace in traces() for text in (repr(signer), str(signer), str(vars(signer))))
