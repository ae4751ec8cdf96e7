"""A proxy that does what networks do: cuts, flips, stalls, refuses and redirects, as ordered."""

import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Faults:
    """What shall go wrong next. Each order counts down; paths are matched by what they hold."""

    def __init__(self):
        self.flip: dict[str, int] = {}
        self.cut: dict[str, list[int]] = {}
        """part of a path -> after how many bytes the next answers end, one after the other."""
        self.status: list[int] = []
        """Status codes of the next answers, instead of the server's."""
        self.retry_after = "0"
        self.redirect = ""
        """Where every GET is sent."""
        self.seen: Counter = Counter()
        self.headers: list[dict] = []
        self.bytes = 0


def _matching(orders, path):
    return next((key for key in orders if key in path and orders[key]), None)


@contextmanager
def faulty(origin, faults):
    """The address of a proxy for the server at `origin`."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def relay(self):
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            faults.seen[self.command] += 1
            faults.headers.append(dict(self.headers))
            if faults.status:
                status = faults.status.pop(0)
                return self.answer(status, b'{"error": "ordered"}', {"retry-after": faults.retry_after})
            if faults.redirect and self.command == "GET":
                return self.answer(302, b"", {"location": faults.redirect + self.path})
            request = urllib.request.Request(origin + self.path, data or None, method=self.command)
            for key, value in self.headers.items():
                if key.lower() not in ("host", "content-length", "connection", "accept-encoding"):
                    request.add_header(key, value)
            try:
                with urllib.request.urlopen(request) as found:
                    status, headers, body = found.status, dict(found.headers), found.read()
            except urllib.error.HTTPError as error:
                status, headers, body = error.code, dict(error.headers), error.read()
            if (key := _matching(faults.flip, self.path)) and body:
                faults.flip[key] -= 1
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            end = None
            if key := _matching(faults.cut, self.path):
                end = faults.cut[key].pop(0)
            self.answer(status, body, headers, end)

        def answer(self, status, body, headers, end=None):
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(key, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            sent = body if end is None else body[:end]
            if self.command != "HEAD":
                self.wfile.write(sent)
                faults.bytes += len(sent)
            if end is not None:
                self.wfile.flush()
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = relay

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
