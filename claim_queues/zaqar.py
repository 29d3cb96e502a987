"""OpenStack Zaqar, API v2.

openstacksdk reads clouds.yaml and signs in. Its message resource is not used: in 4.22, create_claim fails after it has
claimed, and update_claim takes every refusal for success.
"""

import json
import uuid
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Self, cast
from urllib.parse import quote, unquote

from keystoneauth1 import exceptions
from keystoneauth1.session import Session
from openstack.config import OpenStackConfig

from . import errors
from .base import Limits, Stats, check_queue
from .remote import is_here, split_url, with_options
from .zaqar_api import PAGE, REQUEST_BYTES, Answer, HttpSession, ZaqarApi

USAGE = "write zaqar://CLOUD, a name in clouds.yaml, or zaqar://?endpoint=URL&project=NAME for a Zaqar without Keystone"
NO_KEYSTONE = (exceptions.DiscoveryFailure, exceptions.InvalidResponse)
BUSY = (exceptions.HttpServerError, exceptions.TooManyRequests, exceptions.RequestTimeout, *NO_KEYSTONE)


class ZaqarQueues(ZaqarApi):
    """Queues of one project. session: keystoneauth's. root: returns the service's URL. project: if without Keystone."""

    limits = Limits(service="OpenStack Zaqar", claim_limit=20, post_limit=100, message_bytes=REQUEST_BYTES - 38)
    around = '{"messages":[', "]}"

    def __init__(self, session: Session, root: Callable[[], str | None], *others: Any, project: str = "") -> None:
        super().__init__(*others)
        self._session, self._root = session, root
        self._headers = {"Client-ID": str(uuid.uuid4()), "Content-Type": "application/json"}
        self._headers |= {"X-Project-Id": project} if project else {}

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `zaqar://CLOUD[?region_name=&interface=]` or `zaqar://?endpoint=URL&project=NAME`.

        Nothing is asked of the service yet. Raises ConfigError for any other URL or an unknown cloud, CredentialsError
        where the cloud's credentials are incomplete.
        """
        http = HttpSession(trust_env=False)
        if url.startswith("zaqar://?"):
            options = split_url(url, "", ("endpoint", "project"), USAGE)[1]
            if len(options) < 2:
                raise errors.ConfigError(USAGE)
            is_here(endpoint := options["endpoint"])
            others = http, with_options("zaqar://", options), "none: a Zaqar without Keystone"
            return cls(Session(session=http), lambda: endpoint, *others, project=options["project"])
        name, options = split_url(url, "[^][/@:?#]+", ("region_name", "interface"), USAGE)
        cloud = unquote(name)
        address = with_options(f"zaqar://{quote(cloud)}", options)
        try:
            config = OpenStackConfig()
            region = config.get_one(cloud=cloud, **cast(Any, options))
            session = region.get_session()
        except Exception as error:  # reading clouds.yaml raises errors of files and YAML too
            kind = errors.CredentialsError if isinstance(error, exceptions.AuthPluginException) else errors.ConfigError
            raise kind(f"{address}: {error}; see the cloud in clouds.yaml") from error
        session.session = http
        root = cache(partial(region.get_session_endpoint, "messaging"))
        return cls(session, root, http, address, f"those of {cloud} in {config.config_filename}")

    def exists(self, queue: str) -> bool:
        """Whether it is in the list of queues: API v2 answers all other requests as if it existed."""

        def read(answer: Answer) -> list[str]:
            return [each["name"] for each in json.loads(answer.content)["queues"]]

        marker = f"{check_queue(queue)[:-1]}{chr(ord(queue[-1]) - 1)}~"  # no name lies between it and the queue's own
        while True:  # the Redis driver starts with the very first queue if it does not know the marker
            query = {"limit": PAGE, "marker": marker}
            names = self._ask("look for", queue, "GET /queues", read, params=query)
            if len(names) < PAGE or names[-1] >= queue:
                return queue in names
            marker = names[-1]

    def stats(self, queue: str) -> Stats:
        """A message in its queue's default delay counts as free."""
        found = super().stats(queue)
        if not found.total and not self.exists(queue):
            raise errors.QueueNotFound(f"count {queue} at {self.address}: it does not exist: create it with --create")
        return found

    def inspect(self, queue: str, *, is_posted_to: bool = False) -> list[str]:
        metadata = self._ask("read", queue, f"GET /queues/{queue}", lambda answer: dict(json.loads(answer.content)))
        most, letters = metadata.get("_max_claim_count"), metadata.get("_dead_letter_queue")
        moves = f"queue {queue}: Zaqar moves messages to {letters} after {most} claims, even while the maker is down"
        steals = "Zaqar's driver is not MongoDB's: the Redis driver hands out what others hold: use --claim-limit 1"
        is_mongodb = not self._delete_one(queue, "0" * 24, "none")  # no other driver checks the claim first
        return [moves] * bool(most and letters) + [steals] * (not is_mongodb)

    def _send(self, method: str, path: str, **options: Any) -> Answer:
        options |= {"headers": dict(self._headers), "raise_exc": False, "redirect": False}
        try:
            if root := self._root():
                return self._session.request(f"{root.rstrip('/').removesuffix('/v2')}/v2{path}", method, **options)
        except errors.QueuesError:
            raise
        except BUSY as error:
            raise errors.QueueUnavailable(f"{error}", retry_after=getattr(error, "retry_after", 0)) from error
        except Exception as error:  # from the sign-in: without a password keystoneauth raises no error of its own
            raise errors.CredentialsError(f"{error}; see the cloud's `auth` in clouds.yaml") from error
        raise errors.ConfigError("the cloud offers no `messaging` there: see its region_name and interface")
