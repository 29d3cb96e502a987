"""Claim-based queues: one contract for an embedded SQLite file and for cloud services.

`open_queues` is the only place that lists the services; everything else asks the contract (`Queues`) and its `Limits`.
"""

from importlib import import_module

from .base import JSON as JSON
from .base import Claim as Claim
from .base import Limits as Limits
from .base import Message as Message
from .base import Post as Post
from .base import Queues as Queues
from .base import Settled as Settled
from .base import Settlement as Settlement
from .base import Stats as Stats
from .errors import ClaimLost as ClaimLost
from .errors import ConfigError as ConfigError
from .errors import CredentialsError as CredentialsError
from .errors import MessageRefused as MessageRefused
from .errors import PostIncomplete as PostIncomplete
from .errors import QueueError as QueueError
from .errors import QueueForbidden as QueueForbidden
from .errors import QueueNotFound as QueueNotFound
from .errors import QueuesError as QueuesError
from .errors import QueueUnavailable as QueueUnavailable
from .errors import StoreError as StoreError

SERVICES = {
    "sqlite": ("sqlite", "SqliteQueues", "apsw"),
    "rackspace": ("cloud_queues", "CloudQueues", "pyrax and keyring"),
    "zaqar": ("zaqar", "ZaqarQueues", "openstacksdk"),
    "sqs": ("sqs", "SqsQueues", "boto3"),
}
"""By URL scheme: the module, its class, and the packages that it needs."""
FORMS = "sqlite:///PATH, rackspace://USER@REGION, zaqar://CLOUD or sqs://REGION"


def open_queues(url: str) -> Queues:
    """Open the queue service that the URL names; each service's module says what its URLs look like.

    `sqlite:///PATH` is relative to the working directory; `sqlite:////PATH` is absolute.
    Raises ConfigError for a URL that names no service or a package that is missing, StoreError for a file that cannot
    be used, CredentialsError where the service needs credentials and finds none.
    """
    scheme = url.partition(":")[0]
    if scheme not in SERVICES:
        raise ConfigError(f"this is not a queue URL: write {FORMS}")
    module, name, packages = SERVICES[scheme]
    try:
        service: type[Queues] = getattr(import_module(f".{module}", __name__), name)
    except ImportError as error:
        how = f"make setup, or pip install '.[{scheme}]' in an environment of its own"
        raise ConfigError(f"{scheme}:// needs {packages} ({error}): {how}") from error
    return service.from_url(url)
