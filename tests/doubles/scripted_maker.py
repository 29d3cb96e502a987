"""A widget maker whose every answer a test decides.

    with ScriptedMaker() as maker:
        maker.url                                                # http://127.0.0.1:PORT/widgets
        maker.answer = lambda post: 503                          # or Reply(503, headers={"Retry-After": "1"})
        maker.answer = lambda post: 500 if post.widget_id == bad else maker.make(post)
        maker.answer = lambda post: maker.hang()                 # no answer until the block ends
        maker.health = Reply(503)                                # what GET /healthz says
        with maker.down(): ...                                   # nothing listens; what was connected is cut off
        maker.posts, maker.made                                  # what it was asked for, the ids that it made

Left alone it makes whatever it is asked for. A batch is answered item by item, each by `answer`.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, Self

from .http_double import HttpDouble, Reply, Request


class Post(Request):
    """A POST of one request or of a batch."""

    @property
    def widget_id(self) -> Any:
        """Of a single request."""
        return self.json["widget_id"]

    @property
    def widget_ids(self) -> list[Any]:
        """Of a single request or of a batch."""
        return [item["request"]["widget_id"] for item in self.json] if self.is_batch else [self.widget_id]

    @property
    def is_batch(self) -> bool:
        return self.path.partition("?")[0].endswith("/batch")


class Silence(Enum):
    """No answer: the connection is closed; or the item is left out of the answer to its batch."""

    CUT = "cut"
    LEFT_OUT = "left out"


Answer = int | Reply | Silence
"""A number: that status, with an error object as the real maker's has."""


class ScriptedMaker:
    """Answers as a maker on a loopback port, a thread for each connection.

    answer: asked for each POST, in the connection's thread: it may block, or look at `posts`. says_maker: whether
    answers carry the header Widget-Maker. takes_batches: whether it knows the page /widgets/batch. batch: the answer to
    that page, instead of one item by item. gets: every GET. made: how often each widget id was answered with `make`.
    What `answer` raises is raised again when the block ends.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.answer: Callable[[Post], Answer] = self.make
        self.health: Answer = Reply(200, {"status": "ok"})
        self.says_maker = True
        self.takes_batches = True
        self.batch: Answer | None = None
        self.posts: list[Post] = []
        self.gets: list[Request] = []
        self.made: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._http = HttpDouble(self._reply, port=port)
        self.port, self.url = self._http.port, f"{self._http.url}/widgets"
        self.down, self.up = self._http.down, self._http.up

    @property
    def connections(self) -> int:
        return self._http.connections

    def make(self, post: Post) -> Reply:
        """201 for a new id, 200 for a known one."""
        with self._lock:
            self.made[post.widget_id] += 1
            status = 201 if self.made[post.widget_id] == 1 else 200
        return Reply(status, {"id": post.widget_id})

    def hang(self) -> Answer:
        """Wait until release()."""
        self._released.wait()
        return Silence.CUT

    def release(self) -> None:
        """Let everything that hangs end, now and from now on."""
        self._released.set()

    def posts_of(self, widget_id: str) -> list[Post]:
        return [post for post in list(self.posts) if widget_id in post.widget_ids]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.release()
        self._http.__exit__()
        if self.errors and kind is None:
            raise self.errors[0]

    def _reply(self, request: Request) -> Reply | None:
        try:
            answer = self._answer(request)
        except BaseException as error:
            self.errors.append(error)
            return None
        if isinstance(answer, Silence):
            return None
        reply = _whole(answer)
        return replace(reply, headers={"Widget-Maker": "1"} | dict(reply.headers)) if self.says_maker else reply

    def _answer(self, request: Request) -> Answer:
        if request.method == "GET":
            self.gets.append(request)
            return self.health if request.path == "/healthz" else 404
        post = Post(**vars(request))
        self.posts.append(post)
        return self._batch(post) if post.is_batch else self.answer(post)

    def _batch(self, post: Post) -> Answer:
        if not self.takes_batches:
            return Reply(404)
        if self.batch is not None:
            return self.batch
        answers = []
        for item in post.json:
            alone = replace(post, path="/widgets", body=json.dumps(item["request"]).encode())
            answer = self.answer(alone)
            if answer is Silence.CUT:
                return answer
            if answer is not Silence.LEFT_OUT:
                reply = _whole(answer)
                answers.append({"message_id": item["message_id"], "status": reply.status, "body": reply.body or {}})
        return Reply(200, {"answers": answers})


def _whole(answer: int | Reply) -> Reply:
    if isinstance(answer, int):
        return Reply(answer, {"error": {"code": "broken", "message": f"scripted {answer}"}})
    return answer
