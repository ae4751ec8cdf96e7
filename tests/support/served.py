"""A registry over a hub, in a thread of this process."""

import threading
import time
from contextlib import contextmanager

from adapterhub_registry.serve import server
from adapterhub_registry.server import make_app


@contextmanager
def serving(hub, token="", key=None, patience=30, clients=None, **more):
    """Its address."""
    running = server(make_app(hub, token, key, patience, **more), "127.0.0.1", 0, clients)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join(10)
