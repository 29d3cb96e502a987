"""A double of Keystone, v3, on a loopback port, for a Zaqar that believes nobody's word for a project.

with KeystoneDouble("http://127.0.0.1:8888", project="widgets") as keystone:
    keystone.write_clouds(tmp_path / "clouds.yaml")   # a cloud `mine`, for OS_CLIENT_CONFIG_FILE
    keystone.refuse = Reply(429)                      # instead of a token
    keystone.tokens, keystone.requests                # what it gave, what it was asked
"""

import dataclasses
import json
import uuid
from pathlib import Path

from .http_double import HttpDouble, Reply, Request

SECRET = "canary-5d1c8e02b7f94a36"
"""The secret of the application credential; a test finds it wherever it leaks to."""


class KeystoneDouble(HttpDouble):
    """Gives a new token at each sign-in, with a catalog that has Zaqar at `zaqar_url`.

    refuse: the answer to each sign-in, None while it gives tokens.
    """

    def __init__(self, zaqar_url: str, *, project: str) -> None:
        super().__init__(self.sign_in)
        self.zaqar_url = zaqar_url
        self.project = project
        self.tokens: list[str] = []
        self.refuse: Reply | None = None

    def sign_in(self, request: Request) -> Reply:
        """What the real service answers to a sign-in with an application credential."""
        if request.path == "/v3":
            links = [{"rel": "self", "href": f"{self.url}/v3"}]
            return Reply(200, {"version": {"id": "v3.14", "status": "stable", "links": links}})
        if self.refuse:
            return self.refuse
        if request.json["auth"]["identity"]["application_credential"]["secret"] != SECRET:
            return Reply(401, {"error": {"code": 401, "message": "no", "title": "Unauthorized"}})
        self.tokens.append(f"{SECRET}-token-{uuid.uuid4().hex}")
        return Reply(201, {"token": self._token()}, {"X-Subject-Token": self.tokens[-1]})

    def admitted(self, request: Request) -> Request | None:
        """A request to Zaqar with its project, as Keystone's middleware passes it on; None without a token.

        tokens.clear() revokes all tokens.
        """
        if request.headers.get("X-Auth-Token") not in self.tokens:
            return None
        return dataclasses.replace(request, headers=dict(request.headers) | {"X-Project-Id": self.project})

    def write_clouds(self, path: Path) -> None:
        """Write a clouds.yaml with a cloud `mine` that signs in here."""
        secret = {"application_credential_id": "id", "application_credential_secret": SECRET}
        auth = {"auth_url": f"{self.url}/v3", **secret}
        cloud = {"region_name": "R", "auth_type": "v3applicationcredential", "auth": auth}
        path.write_text(json.dumps({"clouds": {"mine": cloud}}))

    def _token(self) -> dict[str, object]:
        endpoint = {"id": "e", "interface": "public", "region": "R", "region_id": "R", "url": self.zaqar_url}
        return {
            "methods": ["application_credential"],
            "issued_at": "2026-01-01T00:00:00Z",
            "expires_at": "2099-01-01T00:00:00Z",
            "user": {"id": "u", "name": "u", "domain": {"id": "d", "name": "d"}},
            "project": {"id": self.project, "name": self.project, "domain": {"id": "d", "name": "d"}},
            "catalog": [{"type": "messaging", "name": "zaqar", "id": "z", "endpoints": [endpoint]}],
        }
