"""An HTTP proxy in front of a queue server, with the faults that a test decides.

    with FaultProxy("http://127.0.0.1:8888") as proxy:
        proxy.url                                                   # what the service under test is given
        proxy.answer = lambda request: Reply(503) if "/claims" in request.path else proxy.forward(request)
        proxy.answer = lambda request: (proxy.forward(request), Raw(end="reset"))[1]   # done, but the answer is lost
        proxy.requests, proxy.connections                           # what came over the wire

Reply and Raw are those of the scripted maker.
"""

import threading

import requests
from scripted_maker import Raw, Reply, Request, ScriptedMaker

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive"}


class FaultProxy(ScriptedMaker):
    """Forwards every request of any method to the server at `target`, unless `answer` says otherwise."""

    answers_all = True

    def __init__(self, target: str, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.target = target
        self.answer = self.forward
        self.url = self.url.removesuffix("/widgets")
        self._local = threading.local()

    def forward(self, request: Request) -> Reply:
        """What the server behind answers."""
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.trust_env = False
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        answer = session.request(
            request.method,
            self.target + request.path,
            headers=headers,
            data=request.body,
            allow_redirects=False,
            timeout=60,
        )
        found = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        return Reply(answer.status_code, answer.content, found)


__all__ = ["FaultProxy", "Raw", "Reply", "Request"]
