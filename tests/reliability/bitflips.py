"""A campaign against decay: single bits of a queue file flip, or a part of it is gone, and then it is worked off."""

import random
import signal
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import apsw

from claim_queues import QueuesError
from claim_queues.base import Post, Settlement
from claim_queues.keeper import Held, HeldClaim
from claim_queues.sqlite import SqliteQueues
from delivery import Delivery
from receive_counts import Receives

from .campaign import Campaign, Result
from .checker import read_history
from .recorded import digest
from .trial import DEAD_LETTERS, REQUESTS, RESPONSES, Trial, scaled, trial, widget_ids

FLIPS, CUTS = 2_000, 500
BY_SCRIPT_EVERY = 50
"""Of so many trials one is left to the consumer's script."""
FILED, LOGGED = 50, 20
"""Requests in the file itself, and in its log alone."""
PAGE = 4096
EXIT_STORE = 5
REFUSED, LETTERS, HARMLESS = "refused with exit 5", "dead letters", "harmless"
VANISHED = "requests vanished"
CRASHED, CHANGED = "crashed", "POSTed otherwise than posted"
BROKEN = (CRASHED, CHANGED)
FIGURES = ("n", "by the consumer's script", REFUSED, LETTERS, HARMLESS, VANISHED, f"{VANISHED} (log)", *BROKEN)
"""The last seven count damaged files."""
PROMPTLY_S = 5.0
MOST_CLAIMS = 100


@dataclass
class Template:
    """A queue file and its log, as bytes, and the body of each request by message id."""

    file: bytes
    log: bytes
    bodies: dict[str, Any]

    def write(self, path: Path) -> None:
        path.write_bytes(self.file)
        path.with_name(f"{path.name}-wal").write_bytes(self.log)


@dataclass
class Became:
    """What became of a damaged file's requests. posted: digests of the bodies POSTed, by message id.

    dead: ids of those that became dead letters. error: why working it off ended, empty where it did not. seen: ids that
    the queue still shows. crash: what ended it that is no error of ours.
    """

    posted: dict[str, str] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    error: str = ""
    seen: set[str] = field(default_factory=set)
    crash: str = ""


def flip_bits(scale: float, bug: str = "") -> Result:
    """Damage a copy, work it off, and compare what was POSTed with what had been posted.

    bug: `unchecked`: messages without checksums.
    """
    chance = random.Random(1)
    figures: Counter[str] = Counter(dict.fromkeys(FIGURES, 0))
    violations: list[str] = []
    work = [_flip] * scaled(FLIPS, scale) + [_cut] * scaled(CUTS, scale)
    with trial() as made, made.maker():
        template = _template(made.queue, is_checked=bug != "unchecked")
        for number, damage in enumerate(work):
            damaged, where = damage(template, chance)
            is_for_script = number % BY_SCRIPT_EVERY == 0
            became = _by_script(damaged, made) if is_for_script else _in_process(damaged, made.directory)
            kinds = _kinds(template, became)
            figures.update(["n", *["by the consumer's script"] * is_for_script])
            figures.update(f"{kind} (log)" if kind == VANISHED and "log" in where else kind for kind in kinds)
            violations += [f"{where}: {kind} {became.crash}" for kind in kinds if kind in BROKEN]
    return Result(dict(figures), violations)


def _kinds(template: Template, became: Became) -> list[str]:
    """What happened to the file's requests, in the words of FIGURES and BROKEN."""
    if became.crash:
        return [CRASHED]
    right = set(map(digest, template.bodies.values()))
    told = right.intersection(became.posted.values())
    others = (became.dead | became.seen) - became.posted.keys()
    kinds = [REFUSED] if became.error else []
    kinds += [LETTERS] if became.dead else []
    kinds += [CHANGED] if not right.issuperset(became.posted.values()) else []
    kinds += [VANISHED] if not became.error and len(told) + len(others) < len(right) else []
    return kinds or [HARMLESS]


def _template(path: Path, *, is_checked: bool = True) -> Template:
    bodies = [
        {"widget_id": id_, "note": f"{number:04d} " * 60} for number, id_ in enumerate(widget_ids(FILED + LOGGED))
    ]
    with SqliteQueues(path) as queues:
        ids = queues.post(REQUESTS, bodies[:FILED])
        queues.post(RESPONSES, [{"outcome": "created"}] * 10, ttl=3_600)
        if not is_checked:
            queues._connection.execute("UPDATE messages SET checksum = NULL")
        queues._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        ids += queues.post(REQUESTS, bodies[FILED:])
        log = path.with_name(f"{path.name}-wal")
        return Template(path.read_bytes(), log.read_bytes(), dict(zip(ids, bodies, strict=True)))


def _flip(of: Template, chance: random.Random) -> tuple[Template, str]:
    at = chance.randrange(len(of.file) + len(of.log))
    data = bytearray(of.file + of.log)
    data[at] ^= 1 << chance.randrange(8)
    file, log = bytes(data[: len(of.file)]), bytes(data[len(of.file) :])
    name = f"byte {at} of the file" if at < len(of.file) else f"byte {at - len(of.file)} of the log"
    return replace(of, file=file, log=log), name


def _cut(of: Template, chance: random.Random) -> tuple[Template, str]:
    kind = chance.randrange(3)
    if kind == 0:
        size = chance.randrange(len(of.log))
        return replace(of, log=of.log[:size]), f"the log cut to {size} bytes"
    size = chance.randrange(len(of.file))
    if kind == 1:
        size -= size % PAGE
    return replace(of, file=of.file[:size]), f"the file cut to {size} bytes"


def _in_process(damaged: Template, directory: Path) -> Became:
    """Claim, judge and settle as the consumer does, without its threads."""
    became = Became()
    path = directory / "damaged"
    damaged.write(path)
    try:
        with SqliteQueues(path) as queues:
            _work_off(queues, became)
            became.seen = {message.id for message in queues.browse(REQUESTS, limit=1_000, claimed=True).messages}
    except QueuesError as error:
        became.error = str(error)
    except Exception:
        became.crash = traceback.format_exc()
    for found in directory.glob("damaged*"):
        found.unlink()
    return became


def _work_off(queues: SqliteQueues, became: Became) -> None:
    for _ in range(MOST_CLAIMS):
        claim = queues.claim(REQUESTS, ttl=300, grace=60, limit=20)
        if claim is None:
            return
        settlements = []
        for message in claim.messages:
            delivery = Delivery(Held(message, HeldClaim(claim, 0)), Receives(1, 0, 0, 0, 0))
            if delivery.widget_id is None:
                letter = Post(DEAD_LETTERS, delivery.dead_letter(REQUESTS, "no request"))
                became.dead.add(message.id)
                settlements.append(Settlement(message, (letter,)))
            else:
                became.posted[message.id] = digest(message.body)
                settlements.append(Settlement(message, (Post(RESPONSES, delivery.response("created", "")),)))
        queues.settle(claim, settlements)
    became.crash = "claims without end"


def _by_script(damaged: Template, of: Trial) -> Became:
    """The consumer itself. One that waits for messages hidden by the damage is stopped."""
    became = Became()
    with trial() as made:
        made.maker_url = of.maker_url
        damaged.write(made.queue)
        run = made.consumer("--slots", 2, drain=True)
        run.process.join(PROMPTLY_S)
        run.signal(signal.SIGTERM)
        code, said = run.wait(), run.err.read_text(errors="replace")
        if code not in (0, EXIT_STORE) or "Traceback" in said:
            became.crash = f"exit code {code}: {said[-1000:]}"
        elif code == EXIT_STORE:
            became.error = said
        for history in made.directory.glob("*.jsonl"):
            for event in read_history(history):
                became.posted.update(event.get("requests", ()))
        if not code:
            with SqliteQueues(made.queue) as queues:
                became.seen = {message.id for message in queues.browse(REQUESTS, limit=1_000, claimed=True).messages}
                letters = queues.browse(DEAD_LETTERS, limit=1_000).messages
                became.dead = {letter.body["request_id"] for letter in letters}
        return became


CAMPAIGNS = [
    Campaign(
        "bitflips",
        "a flipped bit in a queue file or its log, or a part of them cut off: nothing is POSTed otherwise than posted,"
        " no traceback",
        flip_bits,
    )
]
