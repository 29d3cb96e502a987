"""A real Zaqar for tests, in one process, in an environment of its own.

Usage: python zaqar_server.py PORT DRIVER [REDIS_PORT]

DRIVER: mongodb (on mongomock, in memory) or redis. Zaqar 18 serves API v1 and v2, later ones v2 alone.
One path is added: POST /test-clock with a number of seconds moves the server's clock on (mongodb driver alone).
"""

import datetime as dt
import logging
import sys
import tempfile
import time
import types
from importlib import metadata
from pathlib import Path

import waitress
from oslo_config import cfg
from oslo_log import log
from oslo_utils import timeutils

CONFIGURATION = """
[DEFAULT]
auth_strategy =
unreliable = True
admin_mode = True
pooling = False
enable_deprecated_api_versions = {versions}
[drivers]
transport = wsgi
message_store = {driver}
management_store = {driver}
[drivers:management_store:{driver}]
uri = {uri}
[drivers:message_store:{driver}]
uri = {uri}
[signed_url]
secret_key = test
"""

clock = types.SimpleNamespace(ahead_s=0.0)


def now():
    return time.time() + clock.ahead_s


def utcnow(*args, **kwargs):
    return dt.datetime.fromtimestamp(now(), dt.UTC).replace(tzinfo=None)


def use_mongomock():
    import bson.objectid
    import mongomock
    import pymongo

    class Client(mongomock.MongoClient):
        is_mongos = False
        nodes = frozenset([("mock", 27017)])
        write_concern = pymongo.WriteConcern(w=1)

        def get_database(self, name=None, **kwargs):
            return super().get_database(name)

    client = Client()
    pymongo.MongoClient = lambda *args, **kwargs: client
    mongomock.utcnow = utcnow
    bson.objectid.time = types.SimpleNamespace(time=now)


def zaqar_app(driver, redis_port):
    timeutils.utcnow_ts = lambda microsecond=False: now() if microsecond else int(now())
    timeutils.utcnow = utcnow
    # Zaqar ignores the URI's path, and its socket timeout of 0.1 s is too short for a busy machine.
    uri = "mongodb://mock" if driver == "mongodb" else f"redis://127.0.0.1:{redis_port}?dbid=0&socket_timeout=5"
    versions = "1,1.1" if metadata.version("zaqar").startswith("18.") else ""
    path = Path(tempfile.mkdtemp()) / "zaqar.conf"
    path.write_text(CONFIGURATION.format(driver=driver, uri=uri, versions=versions))
    from zaqar import bootstrap

    log.register_options(cfg.CONF)
    cfg.CONF(project="zaqar", prog="zaqar-server", args=["--config-file", str(path)])
    log.setup(cfg.CONF, "zaqar")
    # Switched off or not, it complains, with a traceback, that it has no message bus.
    logging.getLogger("osprofiler").setLevel(logging.CRITICAL)
    return bootstrap.Bootstrap(cfg.CONF).transport.app


def with_clock(app):
    def wrapped(environ, start_response):
        if environ["PATH_INFO"] != "/test-clock":
            return app(environ, start_response)
        clock.ahead_s += float(environ["wsgi.input"].read())
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(clock.ahead_s).encode()]

    return wrapped


port, driver, *redis_port = sys.argv[1:]
if driver == "mongodb":
    use_mongomock()
app = with_clock(zaqar_app(driver, *(redis_port or [None])))
# mongomock is not atomic as a MongoDB is: one request at a time.
try:
    waitress.serve(app, host="127.0.0.1", port=int(port), threads=4 if driver == "redis" else 1)
except OSError as error:  # stdout, where Zaqar logs, may lead nowhere
    sys.exit(f"cannot listen at port {port}: {error.strerror}")
