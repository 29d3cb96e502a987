"""boto3's client for SQS with its credentials, and the contract's error for all that SQS answers or boto3 raises."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import boto3.session
import botocore.exceptions as sdk
import botocore.session
from botocore.config import Config
from botocore.parsers import ResponseParserError

from .errors import (
    AnswerLost,
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

READ_TIMEOUT_S = 30
ENDPOINT = r"(?ai)(https://[a-z0-9.-]+|http://(localhost|127(\.\d{1,3}){3}|\[::1\]))(:\d{1,5})?(/[\w./-]*)?"
"""Without a password, and over plain HTTP only to loopback."""
WRITE = "write sqs://REGION, with ?endpoint=URL for a local server and profile=NAME for one of your AWS profiles"
HOW_TO_LOG_IN = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a local server takes any) or AWS_PROFILE, or write"
    " ~/.aws/credentials; AWS_EC2_METADATA_DISABLED=false takes those of the machine"
)
HINTS = {CredentialsError: f": {HOW_TO_LOG_IN}", QueueNotFound: ": create it with --create"}
BUSY_S = {"PurgeQueueInProgress": 60, "QueueDeletedRecently": 60}
SDK_ERRORS = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, RuntimeError)


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


def connect(address: str, region: str, endpoint: str | None, profile: str | None) -> Any:
    """boto3's client for the region, or the local server at `endpoint`; raises ConfigError or CredentialsError.

    address: of the queues, for people. profile: name of an AWS profile, None for the usual one.
    """
    if endpoint is not None:
        _check_endpoint(endpoint)
    try:
        core = _session(profile)
        if core.get_credentials() is None:
            raise CredentialsError(f"{address}: no AWS credentials: {HOW_TO_LOG_IN}")
        config = Config(
            connect_timeout=5,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=32,  # kept open, one for each thread that asks at the same time
            retries={"mode": "standard", "total_max_attempts": 1},  # our caller does: it knows of lost answers
            # What goes over plain HTTP goes to loopback, not to a proxy.
            proxies={} if (endpoint or "").startswith("http:") else None,
        )
        session = boto3.session.Session(region_name=region, botocore_session=core)
        client = session.client("sqs", endpoint_url=endpoint, config=config)
        client.meta.events.register("before-parse.sqs", _require_whole_answer)
    except SDK_ERRORS as error:
        raise problem(error, f"connect to {address}") from error
    except ValueError as error:
        raise ConfigError(f"{address}: the endpoint of your AWS settings is no URL") from error
    _check_endpoint(client.meta.endpoint_url)  # the user's AWS settings can name one too
    return client


def source(profile: str | None) -> str:
    """Where boto3 finds credentials for this profile, in its own words: `env`, `shared-credentials-file`, ..."""
    found = _session(profile).get_credentials()
    return str(found.method) if found else "nowhere"


def _session(profile: str | None) -> botocore.session.Session:
    session = botocore.session.Session(profile=profile)
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "false":
        # Away from EC2 nothing answers there, and it is slow to notice.
        session.get_component("credential_provider").remove("iam-role")
    return session


def problem(error: Exception, what: str) -> QueuesError:
    """The contract's error for one of SDK_ERRORS, which becomes its cause. what: was asked, and of whom."""
    response = error.response if isinstance(error, sdk.ClientError) else {}
    about = response.get("ResponseMetadata", {})
    code, status = _name(response.get("Error", {}).get("Code")), about.get("HTTPStatusCode", 0)
    names = [*(_name(base.__name__) for base in type(error).__mro__), code, str(status)]
    otherwise = QueueUnavailable if status >= HTTPStatus.INTERNAL_SERVER_ERROR else QueueError
    kind = next((KINDS[name] for name in names if name in KINDS), otherwise)
    said: object = error
    if code.isdecimal():  # no SQS error: boto3 would repeat the whole page
        said = f"HTTP {code}, not in SQS's words: look for a wrong region or endpoint, or for a proxy"
    elif isinstance(error, sdk.ClientError) and kind is CredentialsError:
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


def _require_whole_answer(response_dict: Mapping[str, Any], **_: Any) -> None:
    """Refuse an answer that is shorter than it says: cut in its head it would look like an empty queue."""
    headers, body = response_dict["headers"], response_dict["body"]
    length = headers.get("content-length", "")
    if "transfer-encoding" not in headers and not (length.isdecimal() and len(body) >= int(length)):
        raise ResponseParserError("the answer is cut short")


def _name(code: object) -> str:
    return re.split("[.#]", str(code))[-1].removesuffix("Exception")


def _check_endpoint(url: str) -> None:
    if not re.fullmatch(ENDPOINT, url):
        raise ConfigError(f"an endpoint of Amazon SQS is https://..., or http:// to this machine: {WRITE}")
