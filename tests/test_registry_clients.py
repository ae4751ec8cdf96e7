"""Clients that stall, trickle, crowd or ask nonsense: each is ended with a reason, and others are served meanwhile."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import httpx
import pytest
from adapterhub_registry import bodies, serve
from adapterhub_registry.clients import Clients, who
from adapterhub_registry.server import make_app
from crashed import LARGE, publish
from fault_server import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import serving

import adapterhub
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import File
from adapterhub.store.partial import PartialBlob

TOKEN = "a-token"
WRITE = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def there(tmp_path):
    return adapterhub.open(tmp_path / "there", create=True)


def connected(url, data=b"", receive=None):
    one = socket.socket()
    if receive:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    host, port = url.removeprefix("http://").split(":")
    one.connect((host, int(port)))
    one.sendall(data)
    one.settimeout(20)
    return one


def ended(one):
    """All that comes before the other side closes."""
    got = b""
    try:
        while chunk := one.recv(1 << 20):
            got += chunk
    except ConnectionError:
        pass
    one.close()
    return got


# --- readers, bodies ------------------------------------------------------------------------------------------------


def test_g3_who_never_reads_is_closed(there, monkeypatch):
    monkeypatch.setattr(serve, "STALLED", 0.5)
    blob = there.store.put(os.urandom(32 << 20))
    with serving(there) as url:
        ask = f"GET /v1/blobs/{blob.digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        stalled = [connected(url, ask, receive=4096) for _ in range(20)]
        wait_until(lambda: any(t.name.startswith("AnyIO") for t in threading.enumerate()))
        assert httpx.get(f"{url}/v1/").status_code == 200  # others are served meanwhile
        time.sleep(1.5)
        for one in stalled:
            assert len(ended(one)) < blob.size  # what lay in the buffers, then the end
        assert httpx.get(f"{url}/v1/blobs/{blob.digest}").content == there.store.read(blob)


def test_g3_who_reads_slowly_gets_all_of_it(there, monkeypatch):
    """The deadline is for what waits to be sent, a chunk, and not for an answer."""
    monkeypatch.setattr(serve, "STALLED", 1.5)
    blob = there.store.put(os.urandom(12 << 20))
    with serving(there) as url:
        one = connected(
            url, f"GET /v1/blobs/{blob.digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(), 65536
        )
        got = b""
        while chunk := one.recv(32768):
            got += chunk
            time.sleep(0.01)
        assert got.endswith(there.store.read(blob))  # in several times the deadline


def test_a_body_that_trickles_is_ended_though_it_never_pauses(there, monkeypatch):
    """A byte now and then is slower than the least rate, and never longer than the patience without one."""
    monkeypatch.setattr(bodies, "RATE", 1000)
    with serving(there, TOKEN, patience=1) as url:
        head = f"PUT /v1/releases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 10000\r\n\r\n"
        one = connected(url, head.encode())
        answers = []
        reading = threading.Thread(target=lambda: answers.append(ended(one)))
        reading.start()
        sent = 0
        while reading.is_alive() and sent < 100:
            try:
                one.sendall(b" ")
            except OSError:
                break
            sent += 1
            time.sleep(0.1)
        reading.join(10)
        assert b" 408 " in answers[0] and b"slower than 1000 bytes a second" in answers[0] and sent < 40


def test_a_body_at_the_least_rate_is_taken(there, monkeypatch):
    monkeypatch.setattr(bodies, "RATE", 1000)
    with serving(there, TOKEN, patience=1) as url:

        def slowly():
            for _ in range(20):
                time.sleep(0.1)
                yield b" " * 150
            yield b"[]"

        assert httpx.post(f"{url}/v1/missing", content=slowly(), headers=WRITE).json() == {"missing": []}


# --- how much of the server one address holds -----------------------------------------------------------------------


def test_connections_of_one_address_are_bounded_in_words(there):
    with serving(there, clients=Clients(connections=5)) as url:
        held = [connected(url) for _ in range(5)]
        answer = ended(connected(url, b"GET /v1/ HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "your address holds 5 connections already"
        held.pop().close()
        wait_until(
            lambda: ended(connected(url, b"GET /v1/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))[9:12] == b"200"
        )


def test_requests_of_one_address_are_bounded_in_words(there):
    with serving(there, clients=Clients(requests=1)) as url, httpx.Client() as client:
        answers = [client.get(f"{url}/v1/") for _ in range(14)]
        codes = [answer.status_code for answer in answers]
        assert codes[:10] == [200] * 10 and 429 in codes
        refused = answers[codes.index(429)]
        assert "too many requests" in refused.json()["error"] and refused.headers["retry-after"] == "1"


def test_each_address_has_its_own_share_and_an_ipv6_network_one():
    clients = Clients(connections=1, requests=0.1)
    assert not clients.enter("1.2.3.4") and not clients.enter("1.2.3.5") and b" 503 " in clients.enter("1.2.3.4")
    clients.leave("1.2.3.4")
    clients.leave("1.2.3.4")
    assert not clients.enter("1.2.3.4")
    entered = [clients.enter(f"10.0.{i >> 8}.{i & 255}") for i in range(500)]
    assert not entered[0] and b"the registry holds" in entered[-1]  # many addresses share the server, too
    assert clients.wait("1.2.3.4") == 0 and clients.wait("1.2.3.4") == 1 and clients.wait("1.2.3.5") == 0
    assert who("2001:db8:1:2:3:4:5:6") == who("2001:db8:1:2::9") != who("2001:db8:1:3::9")
    assert who("::ffff:1.2.3.4") == "1.2.3.4"
    for i in range(30_000):
        clients.wait(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}")
    assert len(clients._budget) <= 10_000


# --- the end of a server --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_g4_a_server_that_is_ended_with_open_connections(there):
    """50 half heads, 50 stalled bodies, 20 who do not read: it ends all the same (after `serve.GRACE` seconds), and what was
    being sent goes on where it stopped."""
    blob = there.store.put(os.urandom(32 << 20))
    data = LARGE[:300_000]
    command = [sys.executable, "-m", "adapterhub", "registry", "serve", "--hub", str(there.root), "--port", "0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command[-1] = str(port)
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        command, env={**os.environ, "ADAPTERHUB_REGISTRY_TOKEN": TOKEN}, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: answers(url), 60)
        for _ in range(50):
            connected(url, b"GET /v1/ HTTP/1.1\r\nHost: x\r\nX: ").detach()
            head = f"PUT /v1/releases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\nab"
            connected(url, head.encode()).detach()
        for _ in range(20):
            connected(url, f"GET /v1/blobs/{blob.digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 4096).detach()
        head = f"PATCH /v1/uploads/{digest_of(data)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Range: bytes 0-{len(data) - 1}/{len(data)}\r\nContent-Length: {len(data)}\r\n\r\n"
        sending = connected(url, head.encode() + data[:100_000])
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        answer = ended(sending)
        assert b" 503 " in answer and b"the registry stops; go on later" in answer
        assert server.wait(30) in (0, 143, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
    offset = PartialBlob(there.store, File(digest=digest_of(data), size=len(data))).offset
    assert offset <= 100_000 and there.verify() == []
    with serving(there, TOKEN) as again:
        path = f"{again}/v1/uploads/{digest_of(data)}"
        assert httpx.post(path, json={"size": len(data)}, headers=WRITE).json() == {"offset": offset}
        rng = {"content-range": f"bytes {offset}-{len(data) - 1}/{len(data)}"}
        assert httpx.patch(path, content=data[offset:], headers=WRITE | rng).status_code == 201


def answers(url):
    try:
        return httpx.get(f"{url}/v1/").status_code == 200
    except httpx.HTTPError:
        return False


# --- F5 -------------------------------------------------------------------------------------------------------------

DIGEST = st.one_of(st.binary(max_size=4).map(digest_of), st.text(max_size=80))
TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["me/x", "0.1.0", "none", "a", "", "..", "%00", "%", "\x00", "9" * 40, "sha256:" + "0" * 64]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "signatures", "x"]), inner),
    max_leaves=8,
)
BODY = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.lists(st.tuples(DIGEST, st.integers())).map(lambda value: json.dumps(value).encode()),
    st.integers().map(lambda size: json.dumps({"size": size}).encode()),
    st.just(b"[" * 20_000),
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content-range": st.one_of(
            st.tuples(*[st.integers(0, 10)] * 3).map(lambda n: "bytes {}-{}/{}".format(*n)), st.just("bytes 1-2/x")
        ),
        "range": st.sampled_from(["bytes=0-", "bytes=5-1", "bytes=-1", "bytes=99999999999999999-", "x"]),
        "if-none-match": st.just("*"),
        "content-length": st.sampled_from(["-1", "x", "9" * 400, "3"]),
    },
)


def operations(app):
    for path, methods in app.openapi()["paths"].items():
        for method, what in methods.items():
            yield method.upper(), path, what


@settings(
    max_examples=int(os.environ.get("ADAPTERHUB_F5_EXAMPLES", 150)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_f5_no_request_makes_a_server_error(tmp_path_factory, data):
    """Any operation of the OpenAPI file with any values: an answer below 500, of a status and shape that we document."""
    app, spec = served_app(tmp_path_factory)
    method, path, what = data.draw(st.sampled_from(spec))
    query, headers = {}, data.draw(HEADERS)
    for parameter in what.get("parameters", ()):
        value = data.draw(DIGEST if parameter["name"] in ("digest", "structure") else TEXT, label=parameter["name"])
        if parameter["in"] == "path":
            path = path.replace("{" + parameter["name"] + "}", quote(value))
        elif parameter.get("required") or data.draw(st.booleans()):
            query[parameter["name"]] = value
    content = data.draw(BODY) if method != "GET" else b""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=WRITE) as client:
            return await client.request(method, path, params=query, headers=headers, content=content)

    answer = asyncio.run(ask())
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD" and answer.status_code != 416:
        assert {"error"} <= set(answer.json()) <= {"error", "hint", "missing"}, answer.text
        assert str(app.state.root) not in answer.text


def served_app(factory):
    if not hasattr(served_app, "found"):
        hub = adapterhub.open(factory.mktemp("f5") / "hub", create=True)
        publish(hub, "me/x")
        app = make_app(hub, TOKEN)
        app.state.root = hub.root
        served_app.found = app, sorted(operations(app), key=lambda one: one[:2])
    return served_app.found
