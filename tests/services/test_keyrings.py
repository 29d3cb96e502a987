"""The API key comes from keyring, and from no backend of it that would not keep one."""

import keyring
import pytest
from doubles.keyring_double import KEY, USER, Broken, Chain, Encrypted, Keyring, PlainText, keyring_of
from keyring.backends import fail, null

from claim_queues import CredentialsError
from claim_queues.keyrings import secret


class Empty(Keyring):
    def get_password(self, service, username):
        return ""


@pytest.mark.parametrize("backend", [Keyring, Encrypted, lambda: Chain(null.Keyring(), Keyring())])
def test_a_key_in_a_safe_backend_is_found(backend):
    with keyring_of(backend()):
        assert secret("pyrax", USER, what="API key") == KEY


@pytest.mark.parametrize(
    ("backend", "user", "says"),
    [
        (fail.Keyring, USER, "keyring failed .NoKeyringError.* in PYTHON_KEYRING_BACKEND, then store the API key"),
        (null.Keyring, USER, "keyring .keyring.backends.null.Keyring. has no API key of tester"),
        (PlainText, USER, "plain text .keyrings.alt.file.PlainText.: choose another"),
        (lambda: Chain(Keyring(), PlainText()), USER, "plain text .keyrings.alt.file.PlainText.: choose another"),
        (Broken, USER, "keyring failed .RuntimeError: no D-Bus here.: "),
        (Keyring, "another", "has no API key of another"),
        (Empty, USER, "has no API key of tester"),
    ],
)
def test_a_key_that_keyring_does_not_keep_safely_is_exit_4_and_what_to_do(backend, user, says):
    with keyring_of(backend()), pytest.raises(CredentialsError, match=f"{says}.*keyring set pyrax {user}") as caught:
        secret("pyrax", user, what="API key")
    assert caught.value.exit_code == 4
    assert KEY not in str(caught.value)


def test_a_keyring_that_cannot_be_loaded_is_an_error_of_the_credentials(monkeypatch):
    monkeypatch.setattr(keyring.core, "_keyring_backend", None)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "no_such_module.Keyring")
    with pytest.raises(CredentialsError, match="ModuleNotFoundError"):
        secret("pyrax", USER, what="API key")
