"""The queues in a browser of this machine: numbers, messages, dead letters and their way back to the request queue."""

import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

from flask import redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException

from . import ConfigError, Message, Queues, QueuesError, Stats
from .cli import note, run_until_signal
from .letters import as_text, bring_back, bring_one_back, delete_oldest, find, is_letter, search
from .pages import Refused, as_clock, create_app, serving

LOOK_S, HISTORY_S = 2, 300
FOLLOW_S, NEWEST = 0.2, 10  # how long a look may read on to the newest messages of a queue; how many are kept
WAIT_S = 2.0  # for an action: longer ones go on, and the page says how they ended
NUMBERS = {"free": "Waiting", "claimed": "Claimed", "delayed": "Delayed", "oldest_age": "Oldest"}


class Watch:
    """Looks at the queues in a thread of its own, so that nobody waits for them; keeps the last five minutes.

    names: by kind. looks: when each was (monotonic), and what it found, by kind. trouble: why the last one failed.
    newest: the last messages seen, with the time of their post, by kind.
    """

    def __init__(self, queues: Queues, names: dict[str, str]) -> None:
        self.queues, self.names, self.trouble = queues, names, ""
        self.looks = deque[tuple[float, dict[str, Stats]]](maxlen=HISTORY_S // LOOK_S)
        kinds = [kind for kind in ("request", "response") if queues.limits.can_browse]
        self.newest = {kind: deque[tuple[float, Message]](maxlen=NEWEST) for kind in kinds}
        self._markers, self._looking = dict.fromkeys(kinds, ""), threading.Lock()

    def look(self) -> None:
        stats, trouble = dict[str, Stats](), ""
        with self._looking:
            try:
                stats = {kind: self.queues.stats(name) for kind, name in self.names.items()}
                for kind in self.newest:
                    self._follow(kind)
            except Exception as error:  # whatever it is, the page shows it
                trouble = str(error) or type(error).__name__
            self.looks.append((time.monotonic(), stats))
            self.trouble = trouble

    def run(self, stopped: threading.Event) -> None:
        while not stopped.wait(LOOK_S):
            self.look()

    def history(self, kind: str, field: str) -> list[tuple[float, float | None]]:
        """One number of a queue over time: seconds ago, and its value then, None where it is unknown."""
        now = time.monotonic()
        return [(now - at, getattr(found.get(kind), field, None)) for at, found in list(self.looks)]

    def _follow(self, kind: str) -> None:
        """Read on to the newest messages. Services show the oldest first, so the first time takes several looks."""
        until = time.monotonic() + FOLLOW_S
        while time.monotonic() < until:
            page, marker = self.queues.browse(self.names[kind], after=self._markers[kind], limit=1000)
            if not page:
                return
            self._markers[kind] = marker
            self.newest[kind].extend((time.time() - message.age, message) for message in page[-NEWEST:])


class Web:
    """The answer at each path, for browsers that opened the link. app: all of them.

    link: opens the page in one browser, and is then replaced. working: held while dead letters are redriven or
    deleted. said: the progress or result of that. ttl: of redriven requests.
    """

    def __init__(self, watch: Watch, origin: str, ttl: int | None) -> None:
        self._queues, self._watch, self._origin, self._ttl = watch.queues, watch, origin, ttl
        self._letters, self._requests = watch.names["dead-letter"], watch.names["request"]
        self._cookie_name = f"queues-{origin.rpartition(':')[2]}"  # browsers send a host's cookies to all of its ports
        self._token, self._cookie, self._form_token = (secrets.token_urlsafe() for _ in range(3))
        self.working, self.said = threading.Lock(), ""
        self.app = app = create_app(__package__, (), hint="open the link that the terminal shows")
        app.jinja_env.filters |= {"text": as_text, "path": as_path}
        app.jinja_env.filters["span"] = lambda seconds: timedelta(seconds=round(seconds))
        app.jinja_env.globals |= {"watch": watch, "numbers": NUMBERS}
        app.jinja_env.globals |= {"is_letter": is_letter, "form_token": self._form_token}
        app.before_request(self.let_in)
        app.register_error_handler(HTTPException, self.refuse)
        app.register_error_handler(QueuesError, self.refuse)
        app.get("/")(self.page)
        app.get("/<any(redrive, delete):action>")(self.confirm)
        app.post("/<any(redrive, delete):action>")(self.act)

    @property
    def link(self) -> str:
        return f"{self._origin}/?token={self._token}"

    def let_in(self) -> Any:
        """Exchange the link's token for a cookie. Refuse requests with neither, and POSTs that no form of ours sent."""
        if request.endpoint == "static":
            return None
        if is_same(request.args.get("token"), self._token):
            self._token = secrets.token_urlsafe()
            note(f"a browser has opened the link; for another browser: {self.link}")
            answer = redirect(url_for("page"), 303)
            answer.set_cookie(self._cookie_name, self._cookie, httponly=True, samesite="Strict")
            return answer
        if not is_same(request.cookies.get(self._cookie_name), self._cookie):
            raise Refused(403, "no_cookie", "open the link that the terminal shows: each is good for one browser")
        if request.method == "POST":
            is_ours = request.headers.get("Origin") in (None, request.host_url.rstrip("/"))
            if not is_ours or not is_same(request.form.get("form_token"), self._form_token):
                raise Refused(403, "foreign_form", "not sent by a form of these pages: go back to them, and try again")
        return redirect(url_for("page"), 303) if "token" in request.args else None

    def page(self) -> str:
        searched, after = request.args.get("search", "").strip(), request.args.get("after", "")
        letters, following, trouble = list[tuple[str, Message]](), "", self._watch.trouble
        if self._queues.limits.can_browse and not trouble:
            try:
                letters, following = search(self._queues, self._letters, searched, after)
            except QueuesError as error:
                trouble = str(error)
        around = {"searched": searched, "after": after, "following": following, "trouble": trouble, "said": self.said}
        return render_template("queues.html", letters=letters, **around)

    def confirm(self, action: str) -> str:
        letter, most = self._wanted(action), self._queues.stats(self._letters).total
        return render_template("confirm.html", action=action, letter=letter, most=most)

    def act(self, action: str) -> Any:
        """Do it in a thread of its own: bringing many back takes longer than browsers wait."""
        self._wanted(action)
        id_, after, most = (request.form.get(name, "") for name in ("id", "after", "most"))
        work = partial(self._do, action, id_, after, int(most) if most.isdecimal() else 0)
        if not self.working.acquire(blocking=False):
            raise Refused(409, "busy", "dead letters are being redriven or deleted: wait until that has ended")
        thread = threading.Thread(target=self._work, args=[work], daemon=True)
        thread.start()
        thread.join(WAIT_S)
        return redirect(url_for("page"), 303)

    def refuse(self, error: HTTPException | QueuesError) -> Any:
        if isinstance(error, QueuesError):
            error = Refused(400 if isinstance(error, ConfigError) else 503, "queues", str(error))
        return render_template("refused.html", name=error.name, message=error.description), error.code

    def _wanted(self, action: str) -> Message | None:
        """The message that the request names, None for all of them; raises Refused where that cannot be done."""
        id_, limits = request.values.get("id"), self._queues.limits
        if not limits.can_browse and (id_ or action == "delete"):
            advice = "redrive all, or delete all by `claim_queues purge dead-letter`"
            raise Refused(409, "cannot_browse", f"{limits.service} neither shows nor deletes single messages: {advice}")
        letter = find(self._queues, self._letters, id_, request.values.get("after", "")) if id_ else None
        if id_ and not letter:
            raise Refused(404, "not_found", "this dead letter is not there any more")
        if letter and action == "redrive" and not is_letter(letter.body):
            raise Refused(409, "no_letter", "this is not a dead letter, and holds no request: it can only be deleted")
        return letter

    def _work(self, work: Callable[[], None]) -> None:
        self.said = "Begun."
        try:
            work()
        except Exception as error:
            self.said += f" It failed: {error or type(error).__name__}"
        finally:
            self.said += f" ({as_clock(time.time())} UTC)"
            self._watch.look()
            self.working.release()

    def _do(self, action: str, id_: str, after: str, most: int) -> None:
        """Redrive or delete that message, or the oldest ones."""
        queues, names, done = self._queues, (self._letters, self._requests), count(1)

        def tell(old_id: str, new_id: str) -> None:
            self.said = f"Redriven: {next(done):,}. Request {old_id} is queued as {new_id}."

        if not id_ and action == "redrive":
            self.said = "Redriven: 0."
            if left := bring_back(queues, *names, limit=most, ttl=self._ttl, tell=tell):
                self.said += f" {left:,} messages stay: not dead letters, or taken by another meanwhile."
        elif not id_:
            delete_oldest(queues, self._letters, most)
            self.said = f"Deleted: up to {most:,}. Dead letters that a claim holds stay."
        elif not (letter := find(queues, self._letters, id_, after)):
            self.said = "The dead letter is not there any more."
        else:
            if action == "redrive":
                tell(letter.body["request_id"], bring_one_back(queues, letter, *names, ttl=self._ttl))
            else:
                queues.delete(self._letters, [id_])
                self.said = "Deleted."
            if find(queues, self._letters, id_, after):
                self.said += " But a claim holds the dead letter: it stays."


def is_same(given: str | None, secret: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest((given or "").encode(errors="replace"), secret.encode())


def as_path(values: Sequence[tuple[float, float | None]]) -> str:
    """The bars of a plot, HISTORY_S wide and 40 high, for seconds ago and values; none where there is no value."""
    top = max([value for _, value in values if value], default=1)
    return "".join(f"M{HISTORY_S - ago:.1f} 40V{40 - 40 * value / top:.1f}h2.5V40" for ago, value in values if value)


def serve(queues: Queues, names: dict[str, str], host: str, port: int, *, ttl: int | None) -> None:
    """Serve the page until SIGTERM or Ctrl-C; an action in progress then gets five seconds. Raises OSError."""
    stopped, watch = threading.Event(), Watch(queues, names)
    web = Web(watch, f"http://{f'[{host}]' if ':' in host else host}:{port}", ttl)
    watch.look()
    with serving(web.app, host, port):
        threading.Thread(target=watch.run, args=[stopped], daemon=True).start()
        note(f"serving until Ctrl-C; open this link once, in a browser on this machine: {web.link}")
        run_until_signal(stopped.wait, stopped.set)
        web.working.acquire(timeout=5)
