"""The registry over real sockets: its protocol, its client, and what networks and strangers do to both."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from crashed import LARGE, TENSORS, large, publish
from fault_server import Faults, faulty, wait_until
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import HubError, IntegrityError, NameInUse, NotFound, Unreachable, UsageError
from adapterhub.share.registry import push
from adapterhub.sources import http as http_module
from adapterhub.sources.registry import Registry
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import File
from adapterhub.store import gc
from adapterhub.store.partial import PartialBlob
from adapterhub.trust.keys import new_key

TOKEN = "a-secret-token"


@pytest.fixture
def there(tmp_path):
    return adapterhub.open(tmp_path / "there", create=True)


@pytest.fixture
def url(there, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    with serving(there, token=TOKEN) as url:
        yield url


@pytest.fixture
def mine(tmp_path):
    return adapterhub.open(tmp_path / "mine", create=True)


@pytest.fixture
def team(tmp_path):
    return adapterhub.open(tmp_path / "team", create=True)


@pytest.fixture
def quick(monkeypatch):
    """Pauses between tries are short here; that they are made is counted."""
    pauses = []
    monkeypatch.setattr(http_module.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def faults(url):
    faults = Faults()
    with faulty(url, faults) as address:
        faults.url = address
        yield faults


def call(url, method, path, token=TOKEN, **more):
    headers = {**({"authorization": f"Bearer {token}"} if token else {}), **more.pop("headers", {})}
    return httpx.request(method, url + path, headers=headers, **more)


def bring(team, url, name, key=""):
    source = Registry(url, key=key, typed=True)
    (candidate, *_) = source.candidates(name)
    return team.bring(source, [source.release(name, candidate.version, candidate.digest)])


# --- round trip -----------------------------------------------------------------------------------------------------


def test_push_and_install(url, mine, team, there):
    parent = publish(mine, "me/parent", large(1))
    child = publish(mine, "me/child", large(2), [parent])
    assert push(mine, "me/child", url) == (child, True) and push(mine, "me/child", url) == (child, False)
    assert bring(team, url, "me/child") == [child, parent]
    for hub in (there, team):
        assert hub.verify() == []
        assert hub.store.read(child.manifest.files["tensors"]) == large(2)


def test_only_what_is_lacking_goes_over_the_wire(faults, mine, team, there):
    publish(mine, "me/first", large(1))
    push(mine, "me/first", faults.url)
    bring(team, faults.url, "me/first")
    publish(mine, "me/second", large(2))
    push(mine, "me/second", faults.url)
    faults.bytes = 0
    bring(team, faults.url, "me/second")
    assert faults.bytes < 5000  # the tensor of 70,000 bytes that both share was there


# --- the protocol ---------------------------------------------------------------------------------------------------


def upload(url, data, pieces, digest=None):
    """Send data in these pieces; the answers."""
    digest, size = digest or digest_of(data), len(data)
    answers = [call(url, "POST", f"/v1/uploads/{digest}", json={"size": size})]
    for begin, end in pieces:
        rng = {"content-range": f"bytes {begin}-{end - 1}/{size}"}
        answers.append(call(url, "PATCH", f"/v1/uploads/{digest}", content=data[begin:end], headers=rng))
    return answers


def test_F1_an_upload_in_pieces(url, there):
    data = LARGE[:300_000]
    answers = upload(url, data, [(0, 100_000), (100_000, 200_000), (200_000, 300_000)])
    assert [a.status_code for a in answers] == [200, 202, 202, 201]
    assert answers[0].json() == {"offset": 0} and answers[2].json() == {"offset": 200_000}
    blob = File(digest=digest_of(data), size=len(data))
    assert there.store.fault(blob) is None
    assert upload(url, data, [])[0].json() == {"there": True}


def test_F2_resumed_at_twenty_offsets(url, there):
    data = LARGE[:40_000]
    for cut in range(0, 40_000, 2000):
        mine = bytes([cut // 2000]) + data[1:]
        first = upload(url, mine, [(0, cut)] if cut else [])
        assert first[-1].status_code in (200, 202)
        begin = call(url, "POST", f"/v1/uploads/{digest_of(mine)}", json={"size": len(mine)}).json()["offset"]
        assert begin == cut
        assert upload(url, mine, [(begin, len(mine))])[-1].status_code == 201
        assert there.store.fault(File(digest=digest_of(mine), size=len(mine))) is None


def test_F3_pieces_that_do_not_follow_and_bytes_that_are_others(url, there):
    data = LARGE[:9000]
    digest = digest_of(data)
    assert upload(url, data, [(3000, 6000)])[-1].status_code == 416  # a gap
    assert upload(url, data, [(0, 3000), (0, 3000)])[-1].status_code == 416  # again
    assert upload(url, data, [(2000, 5000)])[-1].status_code == 416  # over what is there
    assert upload(url, data, [(3000, 9000)])[-1].status_code == 201
    wrong = upload(url, b"x" * 100, [(0, 100)], digest=digest_of(b"y" * 100))
    assert wrong[-1].status_code == 400 and not there.store.path(digest_of(b"y" * 100)).exists()
    assert PartialBlob(there.store, File(digest=digest_of(b"y" * 100), size=100)).offset == 0
    for bad in ("bytes 0-99/100", "bytes 5-1/100", "bytes x-y/z", "", f"bytes 0-{1 << 40}/{1 << 41}"):
        answer = call(url, "PATCH", f"/v1/uploads/{digest}", content=b"1", headers={"content-range": bad})
        assert 400 <= answer.status_code < 500
    for path in ("/v1/uploads/md5:00", "/v1/blobs/../x", "/v1/manifests/sha256:0", "/v1/adapters/..%2Fx", "/v1/none"):
        assert 400 <= call(url, "GET", path).status_code < 500


def test_F7_the_token_is_nowhere(url, faults, mine, capsys, monkeypatch, quick):
    publish(mine, "me/x", TENSORS)
    monkeypatch.chdir(mine.root)
    faults.status = [500] * 50
    assert (
        execute(
            [
                "push",
                "me/x",
                faults.url,
            ]
        )
        == 3
    )
    faults.status = [401]
    assert execute(["push", "me/x", faults.url]) == 3
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    with pytest.raises(UsageError):
        push(mine, "me/x", f"http://{TOKEN}@localhost")
    assert not any(TOKEN.encode() in path.read_bytes() for path in mine.root.rglob("*") if path.is_file())


def test_F10_ranges_and_tags_of_blobs(url, mine):
    file = publish(mine, "me/x", LARGE).manifest.files["log"]
    push(mine, "me/x", url)
    data, path = mine.store.read(file), f"/v1/blobs/{file.digest}"
    whole = call(url, "GET", path)
    assert whole.content == data and whole.headers["etag"] == f'"{file.digest}"'
    assert call(url, "GET", path, headers={"if-none-match": f'"{file.digest}"'}).status_code == 304
    for text, status, expected in (
        ("bytes=2-4", 206, data[2:5]), ("bytes=3-", 206, data[3:]), ("bytes=0-999999", 206, data),
        (f"bytes={len(data)}-", 416, b""), ("bytes=0-1,3-4", 200, data), ("bytes=" + "0-1," * 10_000 + "1-2", None, None),
    ):  # fmt: skip
        begin = time.monotonic()
        answer = call(url, "GET", path, headers={"range": text})
        assert time.monotonic() - begin < 2
        assert status is None or (answer.status_code, answer.content) == (status, expected)


def test_G7_bodies_that_are_too_large(url, there):
    assert call(url, "PUT", "/v1/releases", content=b"x" * (9 << 20)).status_code == 413
    assert call(url, "PUT", "/v1/releases", content=iter([b"x" * (1 << 20)] * 9)).status_code == 413
    assert call(url, "POST", "/v1/missing", json=[[digest_of(b""), 0]] * 100_001).status_code == 413
    assert there.releases() == []


def test_B6_two_pushes_of_one_version_with_other_content(url, tmp_path, there):
    hubs = [adapterhub.open(tmp_path / f"h{i}", create=True) for i in range(2)]
    for i, hub in enumerate(hubs):
        publish(hub, "me/x", large(i))

    def work(hub):
        try:
            return push(hub, "me/x", url)[1]
        except NameInUse:
            return "409"

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, hubs))
    assert sorted(map(str, found)) == ["409", "True"]
    winner = hubs[found.index(True)].resolve("me/x")
    assert [row.digest for row in there.releases()] == [winner.digest] and there.verify() == []


def test_B7_two_moves_of_a_tag_with_one_expectation(url, mine):
    for i in range(3):
        publish(mine, "me/x", large(i))
        push(mine, "me/x", url)
    assert call(url, "PUT", "/v1/tags/me/x?tag=stable&version=0.1.0&expected=none").status_code == 200
    paths = [f"/v1/tags/me/x?tag=stable&version=0.{i}.0&expected=0.1.0" for i in (2, 3)]
    with ThreadPoolExecutor(2) as pool:
        codes = sorted(pool.map(lambda path: call(url, "PUT", path).status_code, paths))
    assert codes == [200, 412]


def test_a_release_without_its_blobs_or_parents_is_not_taken(url, mine, there):
    parent = publish(mine, "me/parent", TENSORS)
    child = publish(mine, "me/child", large(1), [parent])
    answer = call(url, "PUT", "/v1/releases", content=child.manifest.encode())
    assert answer.status_code == 422 and "me/parent@0.1.0" in answer.json()["missing"]
    assert call(url, "PUT", "/v1/releases", content=b"{}").status_code == 400
    assert there.releases() == []


def test_gc_leaves_alone_what_a_push_has_announced(url, mine, there):
    publish(mine, "me/other", TENSORS)
    push(mine, "me/other", url)
    data = LARGE[:5000]
    call(url, "POST", "/v1/missing", json=[[digest_of(data), len(data)]])
    upload(url, data, [(0, 2000)])
    assert gc.gc(there) == []
    assert upload(url, data, [(2000, 5000)])[-1].status_code == 201
    assert gc.gc(there) == []


# --- bad networks and bad servers -----------------------------------------------------------------------------------


def test_C3_a_byte_flipped_once_is_fetched_again(faults, mine, team):
    release = publish(mine, "me/x", large(1))
    push(mine, "me/x", faults.url)
    for what in ("/v1/blobs/",):
        faults.flip = {what: 1}
        assert bring(team, faults.url, "me/x") == [release] and team.verify() == []


def test_C3_a_byte_flipped_every_time_is_never_kept(faults, mine, team, monkeypatch, capsys):
    publish(mine, "me/x", large(1))
    push(mine, "me/x", faults.url)
    faults.flip = {"/v1/blobs/": 10_000}
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", faults.url)
    monkeypatch.chdir(team.root)
    assert execute(["install", "me/x"]) == 4
    assert "sha256" in capsys.readouterr().err
    assert team.releases() == [] and not [p for p in team.store.folder.rglob("*") if p.is_file()]
    faults.flip = {"/v1/manifests/": 10_000}
    assert execute(["install", "me/x"]) == 4
    faults.flip = {}
    assert execute(["install", "me/x"]) == 0 and team.verify() == []


def test_a_transfer_that_breaks_goes_on_where_it_stopped(faults, mine, team, quick):
    publish(mine, "me/x", LARGE)
    push(mine, "me/x", faults.url)
    part = max(mine.store.parts(mine.resolve("me/x").manifest.files["tensors"]), key=lambda b: b.size)
    faults.cut = {part.digest: [100_000, 50_000, 150_000, 10]}
    faults.bytes = 0
    bring(team, faults.url, "me/x")
    assert team.verify() == [] and faults.bytes < part.size + 20_000  # hardly a byte twice


def test_a_transfer_that_was_killed_goes_on_where_it_stopped(faults, mine, team, quick):
    publish(mine, "me/x", LARGE)
    push(mine, "me/x", faults.url)
    part = max(mine.store.parts(mine.resolve("me/x").manifest.files["tensors"]), key=lambda b: b.size)
    with PartialBlob(team.store, part).held():
        PartialBlob(team.store, part).append([mine.store.read(part)[:300_000]])
    faults.bytes = 0
    bring(team, faults.url, "me/x")
    assert team.verify() == [] and faults.bytes < part.size - 290_000


def test_F8_a_redirect_to_another_origin_takes_no_token_along(url, mine, team, tmp_path):
    publish(mine, "me/x", TENSORS)
    push(mine, "me/x", url)
    seen = Faults()
    first = Faults()
    with faulty(url, seen) as other, faulty(url, first) as address:
        first.redirect = other
        bring(team, address, "me/x")
        assert any("authorization" in {k.lower() for k in h} for h in first.headers)
        assert seen.headers and not any("authorization" in {k.lower() for k in h} for h in seen.headers)
        first.redirect = address  # to itself, for ever
        with pytest.raises(Unreachable, match="redirect"):
            Registry(address).candidates("me/x")


def test_F9_a_server_that_is_busy_or_away(faults, mine, team, quick):
    publish(mine, "me/x", TENSORS)
    push(mine, "me/x", faults.url)
    faults.status, faults.retry_after = [503, 429, 500], "3"
    bring(team, faults.url, "me/x")
    assert sum(pause >= 3 for pause in quick) == 3 and team.verify() == []
    faults.status = [503] * 100
    with pytest.raises(Unreachable):
        Registry(faults.url).candidates("me/x")
    assert len(faults.status) >= 95
    faults.status, faults.retry_after = [503] * 100, "100000"
    with pytest.raises(Unreachable):
        Registry(faults.url).candidates("me/x")
    assert len(faults.status) == 99  # nobody waits for a day
    for nowhere in ("http://127.0.0.1:1", "https://no.such.host.invalid"):
        with pytest.raises(Unreachable):
            Registry(nowhere).candidates("me/x")


def test_offline_opens_no_socket(url, mine, monkeypatch):
    publish(mine, "me/x", TENSORS)
    push(mine, "me/x", url)

    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(Unreachable, match="--offline"):
        Registry(url, offline=True).candidates("me/x")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b'{"name": "me/x", "releases": [{}]}',
        b'{"name": "me/other", "releases": []}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_lists_that_are_none(answer, monkeypatch):
    source = Registry("http://127.0.0.1:1")
    monkeypatch.setattr(source, "_bytes", lambda path: answer)
    with pytest.raises(IntegrityError):
        source.candidates("me/x")


def test_a_registry_that_never_stops_talking_is_cut_off(monkeypatch):
    """A body without end takes no more memory than a list may."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Endless(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * (1 << 20))
            except OSError:
                pass

    monkeypatch.setattr("adapterhub.sources.registry.LARGEST", 4 << 20)
    server = HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(IntegrityError, match="more than"):
        Registry(f"http://127.0.0.1:{server.server_port}").candidates("me/x")
    server.shutdown()


# --- E9 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(there, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    key = new_key("registry")
    with serving(there, token=TOKEN, key=key) as url:
        yield url, key.public.text


def test_E9_lists_are_signed_never_older_and_not_expired(signed, mine, team, there, monkeypatch):
    url, key = signed
    publish(mine, "me/x", large(0))
    push(mine, "me/x", url)
    old = call(url, "GET", "/v1/adapters/me/x").content
    publish(mine, "me/x", large(1))
    push(mine, "me/x", url)
    assert bring(team, url, "me/x", key)[0].version == "0.2.0"
    source = Registry(url, key=key)
    with monkeypatch.context() as patch:
        patch.setattr(source, "_bytes", lambda path: old)
        with pytest.raises(IntegrityError, match=r"serial number \d+, and \d+ was seen"):
            source.candidates("me/x")
    stranger = Registry(url, key=new_key("stranger").public.text)
    with pytest.raises(IntegrityError, match="not signed by the key"):
        stranger.candidates("me/x")
    import adapterhub_registry.reading as reading

    monkeypatch.setattr(reading, "FRESH", -reading.FRESH)
    with pytest.raises(IntegrityError, match="expired at 2"):
        Registry(url, key=key).candidates("me/x")
    with serving(there) as unsigned, pytest.raises(IntegrityError):
        Registry(unsigned, key=key).candidates("me/x")
    assert Registry(url).candidates("me/x")  # who has no key to hold it against takes it as it is


# --- clients that never end -----------------------------------------------------------------------------------------


def test_G3_half_heads_and_stalled_bodies_are_closed(there, monkeypatch):
    import adapterhub_registry.serve as serve

    monkeypatch.setattr(serve, "HEADERS", 0.5)
    with serving(there, token=TOKEN, patience=0.5) as url:
        host, port = url.removeprefix("http://").split(":")
        open_ones = []
        for i in range(60):
            one = socket.create_connection((host, int(port)))
            if i % 2:
                one.sendall(b"GET /v1/ HTTP/1.1\r\nHost: x\r\nX-A: ")
            else:
                one.sendall(
                    b"PUT /v1/releases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
                    + TOKEN.encode()
                    + b"\r\nContent-Length: 100\r\n\r\nab"
                )
            open_ones.append(one)
        assert call(url, "GET", "/v1/").status_code == 200  # others are served meanwhile
        for one in open_ones:
            one.settimeout(10)
            while one.recv(4096):
                pass
            one.close()
        idle = httpx.Client()
        assert idle.get(url + "/v1/").status_code == 200
        time.sleep(0.2)
        assert idle.get(url + "/v1/").status_code == 200  # a kept connection goes on within its time


assert HubError and NotFound and Path and json and os and wait_until


@pytest.mark.parametrize("command", ["registry serve", "serve"])
def test_serve_is_a_command_of_registry_and_its_old_name_warns(command, tmp_path, monkeypatch, capsys):
    import adapterhub_registry.serve as serve

    class Running:
        def run(self):
            print("it runs")

    given = []
    monkeypatch.setattr(serve, "server", lambda app, host, port, clients: given.append((host, port)) or Running())
    adapterhub.open(tmp_path / "hub", create=True)
    line = f"{command} --host 127.0.0.2 --port 8642 --read-by-token --hub"
    assert execute([*line.split(), str(tmp_path / "hub")]) == 0
    said = capsys.readouterr()
    assert said.out == "it runs\n" and given == [("127.0.0.2", 8642)]
    warned = "warning: " in said.err and "adapterhub registry serve" in said.err
    assert warned == (command == "serve") and "serving" in said.err
