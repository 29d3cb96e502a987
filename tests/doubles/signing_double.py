"""Secrets and signatures for tests, made without the code under test."""

import base64
import hashlib
import hmac
import time

KEY, OLD_KEY = b"canary-signing-key-of-32-bytes-0", b"canary-signing-key-of-32-bytes-1"


def secret_of(key: bytes) -> str:
    """The key as a file or keyring has it."""
    return "whsec_" + base64.b64encode(key).decode()


SECRET, OLD_SECRET = secret_of(KEY), secret_of(OLD_KEY)


def traces(key: bytes = KEY) -> list[str]:
    """What a test looks for: the key and its base64, as they would leak."""
    return [key.decode(), base64.b64encode(key).decode().rstrip("=")]


def sign(key: bytes, message_id: str, timestamp: int | str, body: bytes) -> str:
    """One signature by the text of the standard: HMAC-SHA256 of id, timestamp and body, joined by dots."""
    content = b".".join([message_id.encode(), str(timestamp).encode(), body])
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()


def signed(body: bytes, *, key: bytes = KEY, message_id: str = "m1", ahead_s: int = 0) -> dict[str, str]:
    """The three headers of a POST that was signed `ahead_s` seconds from now."""
    timestamp = int(time.time()) + ahead_s
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(key, message_id, timestamp, body),
    }
