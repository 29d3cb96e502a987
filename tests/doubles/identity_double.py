"""A double of Rackspace's identity service, v2.0, on a loopback port.

with IdentityDouble("http://127.0.0.1:8888/v1") as identity:
    identity.queue_url                            # of queues whose user signs in here
    identity.answer = lambda request: Reply(429)  # instead of a token; identity.sign_in is its own answer
    identity.tokens, identity.requests            # what it gave and accepts, what it was asked
"""

import ssl
import uuid

from .http_double import HttpDouble, Reply, Request
from .keyring_double import KEY, USER

REGION = "DFW"


class IdentityDouble(HttpDouble):
    """Gives a new token for each right user name and API key, with a catalog that has Cloud Queues at `queues_url`."""

    def __init__(self, queues_url: str, *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(self.sign_in, tls=tls)
        self.queue_url = f"rackspace://{USER}@{REGION}?identity={self.url}/v2.0"
        self.queues_url = queues_url
        self.tokens: list[str] = []

    def sign_in(self, request: Request) -> Reply:
        """What the real service answers to a sign-in with an API key."""
        if (request.method, request.path) != ("POST", "/v2.0/tokens"):
            return Reply(404, {"itemNotFound": {"code": 404, "message": "Resource not found."}})
        if request.json != {"auth": {"RAX-KSKEY:apiKeyCredentials": {"username": USER, "apiKey": KEY}}}:
            return Reply(401, {"unauthorized": {"code": 401, "message": "Unable to authenticate user."}})
        self.tokens.append(f"canary-token-{uuid.uuid4().hex}")
        return Reply(200, {"access": self._access(self.tokens[-1])})

    def admits(self, request: Request) -> bool:
        """Whether a request to the queue service carries a token of this service; tokens.clear() revokes them."""
        return request.headers.get("X-Auth-Token") in self.tokens

    def _access(self, token: str) -> dict[str, object]:
        endpoints = [{"region": REGION, "tenantId": "123", "publicURL": self.queues_url}]
        return {
            "token": {"id": token, "expires": "2099-12-01T00:00:00.000Z", "tenant": {"id": "123", "name": "123"}},
            "user": {"id": "7", "name": USER, "roles": [], "RAX-AUTH:defaultRegion": REGION},
            "serviceCatalog": [{"name": "cloudQueues", "type": "rax:queues", "endpoints": endpoints}],
        }
