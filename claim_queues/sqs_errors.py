"""The contract's error for all that SQS answers and boto3 raises. Quotations are from the SQS API reference."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import botocore.exceptions as sdk
from botocore.parsers import ResponseParserError

from .errors import (
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueuesError,
    QueueUnavailable,
)

HOW_TO_LOG_IN = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a local server takes any) or AWS_PROFILE, or write"
    " ~/.aws/credentials; AWS_EC2_METADATA_DISABLED=false takes those of the machine"
)
HINTS = {CredentialsError: f": {HOW_TO_LOG_IN}", QueueNotFound: ": create it with --create"}
BUSY_S = {"PurgeQueueInProgress": 60, "QueueDeletedRecently": 60}
SDK_ERRORS = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, RuntimeError)


class AnswerLost(QueueUnavailable):
    """Nobody knows whether SQS did what it was asked."""


KINDS: dict[str, type[QueuesError]] = {
    name: kind
    for kind, names in {
        QueueNotFound: "NonExistentQueue QueueDoesNotExist InvalidAddress",
        # RuntimeError: they are expired when they were just refreshed.
        CredentialsError: "ExpiredToken IncompleteSignature InvalidClientTokenId InvalidSecurity InvalidSignature"
        " MissingAuthenticationToken OptInRequired RequestExpired SignatureDoesNotMatch UnrecognizedClient 401"
        " CredentialRetrievalError LoginError NoAuthTokenError NoCredentialsError PartialCredentialsError"
        " ProfileNotFound RefreshWithMFAUnsupportedError RuntimeError SSOError TokenRetrievalError"
        " UnknownCredentialError",
        QueueForbidden: "AccessDenied NotAuthorized KmsAccessDenied KmsDisabled KmsInvalidKeyUsage KmsInvalidState"
        " KmsNotFound KmsOptInRequired 403",
        # ConnectionError: nothing was sent.
        QueueUnavailable: "InternalError InternalFailure KmsThrottled OverLimit PurgeQueueInProgress"
        " QueueDeletedRecently RequestAborted RequestThrottled RequestTimeout ServiceUnavailable Throttling 429"
        " ConnectionError MetadataRetrievalError",
        AnswerLost: "ChecksumError HTTPClientError IncompleteReadError ResponseParserError",
        # InvalidParameterValue: a body longer than its queue's own MaximumMessageSize, or a hold beyond 12 h; the
        # rest was checked before.
        MessageRefused: "BatchRequestTooLong InvalidMessageContents InvalidParameterValue RequestEntityTooLarge",
        ClaimLost: "InvalidIdFormat MessageNotInflight ReceiptHandleIsInvalid",
        ConfigError: "BotoCoreError",
    }.items()
    for name in names.split()
}
"""By the class that the SDK raises, or the nearest base of it that is named here; else by SQS's code; else by HTTP
status. Codes stand without what comes before their last dot and without "Exception"."""


def problem(error: Exception, what: str) -> QueuesError:
    """The contract's error for one of SDK_ERRORS, which becomes its cause. what: was asked, and of whom."""
    response = error.response if isinstance(error, sdk.ClientError) else {}
    about = response.get("ResponseMetadata", {})
    code, status = _name(response.get("Error", {}).get("Code")), about.get("HTTPStatusCode", 0)
    names = [*(_name(base.__name__) for base in type(error).__mro__), code, str(status)]
    otherwise = QueueUnavailable if status >= HTTPStatus.INTERNAL_SERVER_ERROR else QueueError
    kind = next((KINDS[name] for name in names if name in KINDS), otherwise)
    said: object = error
    if response and kind is CredentialsError:
        # What AWS says about a wrong signature repeats the session token.
        said = f"AWS refuses the credentials ({code}), or this clock is wrong"
    found = kind(f"{what}: {said}{HINTS.get(kind, '')}")
    found.__cause__ = None if kind is CredentialsError else error
    if isinstance(found, QueueUnavailable):
        asked = about.get("HTTPHeaders", {}).get("retry-after", "")
        found.retry_after_s = BUSY_S.get(code, int(asked) if asked.isdecimal() else None)
    return found


def entry_problem(entry: Mapping[str, Any], operation: str, what: str, refusal: type[QueueError]) -> QueuesError:
    """The error of one entry that failed in a batch. refusal: what SQS will never do."""
    status = HTTPStatus.BAD_REQUEST if entry.get("SenderFault") else HTTPStatus.INTERNAL_SERVER_ERROR
    found = problem(sdk.ClientError({"Error": entry, "ResponseMetadata": {"HTTPStatusCode": status}}, operation), what)
    return found if isinstance(found, QueueUnavailable | QueueForbidden) else refusal(str(found))


@contextmanager
def understanding(what: str) -> Iterator[None]:
    """For what is read out of an answer: what is missing there is no empty queue."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise QueueUnavailable(f"{what}: this is no answer of SQS: {error!r}") from error


def _name(code: object) -> str:
    return re.split("[.#]", str(code))[-1].removesuffix("Exception")
