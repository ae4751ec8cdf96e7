"""Who may do what at a registry: every route with every kind of token, and what nobody may learn or keep there."""

import json
import subprocess
import sys

import httpx
import pytest
from crashed import LARGE, TENSORS, large, publish
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import HubError
from adapterhub.files import durable
from adapterhub.share.registry import push
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest
from adapterhub.store.partial import PartialBlob
from adapterhub.trust.keys import new_key, remove_key
from adapterhub.trust.signature import RELEASE, opened, sign, statement

TOKEN = "the-token-of-the-server"
MISSING = digest_of(b"not here")
KINDS = ("none", "unknown", "over", "reader", "acme", "other", "all")
OPEN = dict.fromkeys(KINDS, 200)
BY_TOKEN = OPEN | dict.fromkeys(("none", "unknown", "over"), 401)
NOBODY = {"none": 401, "unknown": 401, "over": 401, "reader": 403}


def blobs(code):
    return NOBODY | dict.fromkeys(("acme", "other", "all"), code)


def names(code):
    return NOBODY | {"acme": code, "other": 403, "all": code}


GOLDEN = {
    ("GET", "/openapi.json"): (OPEN, OPEN),
    ("HEAD", "/openapi.json"): (OPEN, OPEN),
    ("GET", "/v1/"): (OPEN, BY_TOKEN),
    ("GET", "/v1/adapters"): (OPEN, BY_TOKEN),
    ("GET", "/v1/adapters/{name:path}"): (OPEN, BY_TOKEN),
    ("GET", "/v1/manifests/{digest}"): (OPEN, BY_TOKEN),
    ("GET", "/v1/signatures/{digest}"): (OPEN, BY_TOKEN),
    ("GET", "/v1/blobs/{digest}"): (OPEN, BY_TOKEN),
    ("HEAD", "/v1/blobs/{digest}"): (OPEN, BY_TOKEN),
    ("POST", "/v1/missing"): (blobs(200), blobs(200)),
    ("POST", "/v1/uploads/{digest}"): (blobs(200), blobs(200)),
    ("PATCH", "/v1/uploads/{digest}"): (blobs(201), blobs(201)),
    ("DELETE", "/v1/uploads/{digest}"): (blobs(200), blobs(200)),
    ("PUT", "/v1/releases"): (names(422), names(422)),  # its blobs are missing: who may not write never learns that
    ("POST", "/v1/signatures/{digest}"): (names(200), names(200)),
    ("PUT", "/v1/tags/{name:path}"): (names(200), names(200)),
    ("PUT", "/v1/yanks/{name:path}"): (names(200), names(200)),
    ("DELETE", "/v1/yanks/{name:path}"): (names(200), names(200)),
}
"""Route -> the answer by the kind of token: while reading is open, and while it takes a token."""


@pytest.fixture
def there(tmp_path):
    return adapterhub.open(tmp_path / "there", create=True)


@pytest.fixture
def mine(tmp_path):
    return adapterhub.open(tmp_path / "mine", create=True)


@pytest.fixture
def tokens(there):
    """By kind."""
    add = there.index.accounts.add
    return {
        "none": "",
        "unknown": "ahub_" + "0" * 64,
        "over": add(["*"], until="2020-01-01")[1],
        "reader": add([], "reader")[1],
        "acme": add(["acme/*"], "acme", until="9999-12-31")[1],
        "other": add(["other/x", "acm/*", "acmex/*"], "other")[1],
        "all": TOKEN,
    }


def call(url, method, path, token="", **more):
    headers = {**({"authorization": f"Bearer {token}"} if token else {}), **more.pop("headers", {})}
    return httpx.request(method, url + path, headers=headers, **more)


def filled(there):
    """A release acme/x, and by route what a sensible request of it is."""
    release = publish(there, "acme/x", TENSORS)
    other = digest_of(LARGE)
    lacking = Manifest(
        name="acme/x",
        version="9.0.0",
        base=Base(name="t", architecture="llama", structure=digest_of(b"s"), sketch=File(digest=other, size=4)),
        method=Made(name="lora"),
    )
    places = {"{digest}": release.digest, "{name:path}": "acme/x"}
    log = release.manifest.files["log"].digest

    def request(method, path):
        where = log if "/blobs/" in path else digest_of(b"x") if "/uploads/" in path else None
        for place, value in (places | ({"{digest}": where} if where else {})).items():
            path = path.replace(place, value)
        more = {}
        if path == "/v1/missing":
            more = {"json": []}
        elif "/uploads/" in path and method == "POST":
            more = {"json": {"size": 1}}
        elif "/uploads/" in path and method == "PATCH":
            more = {"content": b"x", "headers": {"content-range": "bytes 0-0/1"}}
        elif path == "/v1/releases":
            more = {"content": lacking.encode()}
        elif "/signatures/" in path and method == "POST":
            more = {"content": sign(statement(release), RELEASE, fresh_key())}
        elif "/tags/" in path:
            path += "?tag=a&version=0.1.0"
        elif "/yanks/" in path:
            path += "?version=0.1.0" + ("&reason=r" if method == "PUT" else "")
        return method, path, more

    return request


def fresh_key():
    fresh_key.count = getattr(fresh_key, "count", 0) + 1
    return new_key(f"k{fresh_key.count}")


@pytest.mark.parametrize("by_token", [False, True], ids=["reading is open", "reading by token"])
def test_f6_every_route_with_every_kind_of_token(there, tokens, by_token):
    """The golden table; a route that has no row in it fails."""
    from adapterhub_registry.server import make_app

    routes = {(method, route.path) for route in make_app(there).routes for method in route.methods}
    assert routes == set(GOLDEN)
    request = filled(there)
    with serving(there, TOKEN, read_by_token=by_token) as url:
        for route, rows in GOLDEN.items():
            method, path, more = request(*route)
            for kind, code in rows[by_token].items():
                if method == "POST" and "/signatures/" in path:
                    more = request(*route)[2]
                answer = call(url, method, path, tokens[kind], **more)
                assert answer.status_code == code, (route, kind, answer.text)
                if code >= 400 and method != "HEAD":
                    assert answer.json()["error"] and (tokens[kind] or "ahub_") not in answer.text, route


def test_f6_without_any_token_nobody_writes_and_a_token_counts_at_once(there):
    request = filled(there)
    with serving(there) as url:
        for route in GOLDEN:
            if route[1] != "/openapi.json" and GOLDEN[route][0] is not OPEN:
                method, path, more = request(*route)
                assert call(url, method, path, "anything", **more).status_code == 403
        assert call(url, "GET", "/v1/").json()["writable"] is False
        token = there.index.accounts.add(["*"], "late")[1]
        assert call(url, "POST", "/v1/missing", token, json=[]).status_code == 200
        assert call(url, "GET", "/v1/").json()["writable"] is True
        there.index.accounts.remove("late")
        assert call(url, "POST", "/v1/missing", token, json=[]).status_code == 403


def test_a_namespace_is_pushed_by_its_token_and_no_other(there, mine, tokens, monkeypatch):
    publish(mine, "acme/x", large(1))
    publish(mine, "other/y", large(2))
    with serving(there, TOKEN) as url:
        monkeypatch.setenv("ADAPTERHUB_TOKEN", tokens["acme"])
        assert push(mine, "acme/x", url)[1]
        with pytest.raises(HubError, match="may write acme/"):
            push(mine, "other/y", url)
        monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
        assert push(mine, "other/y", url)[1]
        parent, child = mine.resolve("other/y"), None
        child = publish(mine, "acme/z", large(3), [parent])
        monkeypatch.setenv("ADAPTERHUB_TOKEN", tokens["acme"])
        assert push(mine, "acme/z", url) == (child, True)  # its parent is there already, whoever brought it
    assert there.verify() == [] and {row.name for row in there.releases()} == {"acme/x", "acme/z", "other/y"}


def test_f4_whether_a_blob_is_here_is_told_to_nobody_who_may_not_read(there, tokens):
    here = publish(there, "acme/x", TENSORS).manifest.files["log"]
    with serving(there, TOKEN, read_by_token=True) as url:
        for kind in ("none", "unknown", "over", "reader"):
            told = set()
            for digest in (here.digest, MISSING):
                asked = [
                    call(url, "GET", f"/v1/blobs/{digest}", tokens[kind]) if kind != "reader" else None,
                    call(url, "POST", "/v1/missing", tokens[kind], json=[[digest, here.size]]),
                    call(url, "POST", f"/v1/uploads/{digest}", tokens[kind], json={"size": here.size}),
                    call(url, "DELETE", f"/v1/uploads/{digest}", tokens[kind]),
                ]
                told.add(tuple((a.status_code, a.text) for a in asked if a is not None))
            assert len(told) == 1 and not there.index.leased(0), kind


def test_a_token_is_shown_once_and_kept_nowhere(there, monkeypatch, capsys):
    monkeypatch.chdir(there.root)
    assert execute(["registry", "token", "add", "--write", "acme/*", "--write", "me/x", "--name", "ci"]) == 0
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert token.startswith("ahub_") and len(token) == 69 and token not in shown.err
    assert execute(["registry", "token", "add", "--read", "--until", "2020-01-01"]) == 0
    capsys.readouterr()
    assert execute(["registry", "token", "list"]) == 0 and execute(["registry", "token", "list", "--json"]) == 0
    listed = capsys.readouterr().out
    assert "acme/*, me/x" in listed and "(over)" in listed and token not in listed
    assert not any(token.encode() in path.read_bytes() for path in there.root.rglob("*") if path.is_file())
    assert there.index.accounts.holding(token).name == "ci"
    assert execute(["registry", "token", "rm", "ci"]) == 0 and execute(["registry", "token", "rm", "ci"]) == 3
    assert there.index.accounts.holding(token) is None
    for wrong in (["add"], ["add", "--write", "acme/"], ["add", "--write", "*/x"], ["add", "--read", "--until", "soon"],
                  ["add", "--read", "--name", "A B"]):  # fmt: skip
        assert execute(["registry", "token", *wrong]) == 2
    assert "hint" in capsys.readouterr().err


# --- signatures -----------------------------------------------------------------------------------------------------


def test_junk_signatures_are_refused_and_what_holds_is_kept_without_the_rest(there):
    release = publish(there, "me/x", TENSORS)
    path, key = f"/v1/signatures/{release.digest}", fresh_key()
    good = json.loads(sign(statement(release), RELEASE, key))
    remove_key(key.name)  # so that who runs the registry does not know it
    (entry,) = good["signatures"]
    other = json.loads(sign(statement(release), RELEASE, fresh_key()))["signatures"][0]
    junk = {
        "none": good | {"signatures": []},
        "without its key": good | {"signatures": [{"keyid": entry["keyid"], "sig": entry["sig"]}]},
        "of another key": good | {"signatures": [entry | {"public": other["public"]}]},
        "of other bytes": good | {"signatures": [entry | {"sig": entry["sig"][:-8] + "AAAAAA=="}]},
        "no key": good | {"signatures": [entry | {"public": "ed25519:"}, entry | {"public": 7}]},
        "another release": json.loads(sign(statement(release) | {"name": "me/y"}, RELEASE, key)),
        "a list": [],
    }
    with serving(there, TOKEN) as url:
        for name, envelope in junk.items():
            answer = call(url, "POST", path, TOKEN, content=json.dumps(envelope))
            assert answer.status_code == 400 and answer.json()["error"], name
        large = good | {"more": "x" * (16 << 10)}
        assert call(url, "POST", path, TOKEN, content=json.dumps(large)).status_code == 413
        assert there.index.signatures(release.digest) == []
        mixed = good | {"signatures": [*junk["of another key"]["signatures"], entry], "junk": "x" * 1000}
        for _ in range(2):
            assert call(url, "POST", path, TOKEN, content=json.dumps(mixed)).status_code == 200
        (kept,) = there.index.signatures(release.digest)
        assert json.loads(kept) == good and opened(kept, RELEASE, [key.public])[1] is key.public


def test_a_release_keeps_so_many_signatures_and_no_more(there, monkeypatch):
    import adapterhub_registry.server as server

    monkeypatch.setattr(server, "MOST_SIGNATURES", 3)
    release = publish(there, "me/x", TENSORS)
    envelopes = [sign(statement(release), RELEASE, fresh_key()) for _ in range(4)]
    with serving(there, TOKEN) as url:
        path = f"/v1/signatures/{release.digest}"
        assert [call(url, "POST", path, TOKEN, content=e).status_code for e in envelopes] == [200, 200, 200, 409]
        assert call(url, "POST", path, TOKEN, content=envelopes[0]).status_code == 200


def test_a_signature_made_before_it_carried_its_key_is_pushed_with_it(there, mine, monkeypatch, recwarn):
    """Its owner's machine knows the key; a stranger's old signature is left behind, and said."""
    release, key = publish(mine, "me/x", TENSORS), fresh_key()
    envelope = json.loads(sign(statement(release), RELEASE, key))
    del envelope["signatures"][0]["public"]
    mine.sign(release.digest, json.dumps(envelope).encode())
    strange = json.loads(json.dumps(envelope))
    strange["signatures"][0]["keyid"] = MISSING
    mine.sign(release.digest, json.dumps(strange).encode())
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    with serving(there, TOKEN) as url:
        push(mine, "me/x", url)
    (kept,) = there.index.signatures(release.digest)
    assert opened(kept, RELEASE, [key.public])[1] is key.public
    assert "keeps no signature of me/x@0.1.0" in str(recwarn.pop(UserWarning).message)


# --- uploads, leases, a full disk, damage ---------------------------------------------------------------------------


def test_an_upload_is_cancelled_with_its_part_and_its_lease(there):
    data = LARGE[:5000]
    digest = digest_of(data)
    with serving(there, TOKEN) as url:
        call(url, "POST", f"/v1/uploads/{digest}", TOKEN, json={"size": 5000})
        piece = {"content": data[:2000], "headers": {"content-range": "bytes 0-1999/5000"}}
        assert call(url, "PATCH", f"/v1/uploads/{digest}", TOKEN, **piece).status_code == 202
        incoming = PartialBlob(there.store, File(digest=digest, size=5000))
        assert incoming.offset == 2000 and there.index.leased(0) == {digest}
        with incoming.held():
            assert call(url, "DELETE", f"/v1/uploads/{digest}", TOKEN).status_code == 409
        for _ in range(2):
            assert call(url, "DELETE", f"/v1/uploads/{digest}", TOKEN).status_code == 200
        assert incoming.offset == 0 and there.index.leased(0) == set()
        assert call(url, "PATCH", f"/v1/uploads/{digest}", TOKEN, **piece).status_code == 202
        whole = {"content": data[2000:], "headers": {"content-range": "bytes 2000-4999/5000"}}
        assert call(url, "PATCH", f"/v1/uploads/{digest}", TOKEN, **whole).status_code == 201
        assert call(url, "DELETE", f"/v1/uploads/{digest}", TOKEN).status_code == 200
        assert there.index.leased(0) == {digest}  # a whole blob is no upload: somebody's push needs it


def test_what_came_of_a_piece_that_broke_stays(there):
    """Its sender goes on where it stopped; a body that says less than its head is no whole piece."""
    from adapterhub_registry.server import make_app

    data = LARGE[:200_000]
    digest = digest_of(data)
    incoming = PartialBlob(there.store, File(digest=digest, size=len(data)))
    with serving(there, TOKEN) as url:
        path, rng = f"/v1/uploads/{digest}", {"content-range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        answer = call(url, "PATCH", path, TOKEN, content=data[:150_000], headers=rng)
        assert answer.status_code == 400 and incoming.offset == 150_000
        assert call(url, "POST", path, TOKEN, json={"size": len(data)}).json() == {"offset": 150_000}
        rest = {"content-range": f"bytes 150000-{len(data) - 1}/{len(data)}"}
        assert call(url, "PATCH", path, TOKEN, content=data[150_000:], headers=rest).status_code == 201
    assert there.store.read(incoming.blob) == data and make_app


def test_a_part_with_all_its_bytes_is_finished_or_thrown_away_when_asked_about(there):
    """What a server that was killed after the last byte leaves; without that nobody could send the blob again."""
    data = LARGE[:5000]
    with serving(there, TOKEN) as url:
        for bytes_, told in ((data, {"there": True}), (data[::-1], {"offset": 0}), (data + b"x", {"offset": 0})):
            blob = File(digest=digest_of(data), size=5000)
            there.store.remove([blob.digest])
            PartialBlob(there.store, File(digest=blob.digest, size=len(bytes_))).append([bytes_])
            asked = call(url, "POST", f"/v1/uploads/{blob.digest}", TOKEN, json={"size": 5000})
            assert asked.json() == told and (there.store.fault(blob) is None) == ("there" in told)


def test_leases_that_ended_are_deleted_by_gc_and_by_the_next_push(there):
    import sqlite3
    import time

    from adapterhub.store import gc

    def count():
        with sqlite3.connect(there.root / "hub.db") as database:
            found = database.execute("SELECT count(*) FROM leases").fetchone()[0]
        database.close()
        return found

    many = [digest_of(b"%d" % i) for i in range(11_001)]
    there.index.lease(many, time.time() + 60)
    assert count() == 11_001 and there.index.leased(time.time()) == set(many)
    there.index.lease(many[:1000], 0)
    assert count() == 10_001
    there.index.lease(many, 1)
    gc.gc(there, force=True)
    assert count() == 0
    there.index.lease(many, 1)
    with serving(there, TOKEN) as url:
        assert call(url, "POST", "/v1/missing", TOKEN, json=[]).status_code == 200
    assert count() == 0


def test_many_leases_are_not_one_long_transaction(there):
    """Others get their turn between: no write transaction holds more than a few hundred of them."""
    import sqlalchemy

    seen, now = [], [0]
    engine = there.index._engine._engine
    sqlalchemy.event.listen(engine, "commit", lambda *_: (seen.append(now[0]), now.__setitem__(0, 0)))

    def executed(connection, cursor, statement, parameters, context, many):
        if statement.startswith("INSERT INTO leases"):
            now[0] += len(parameters) if many else cursor.rowcount

    sqlalchemy.event.listen(engine, "after_cursor_execute", executed)
    there.index.lease([digest_of(b"%d" % i) for i in range(10_000)], 1e12)
    assert sum(seen) == 10_000 and max(seen) <= 500


def test_a_half_upload_is_left_alone_while_it_goes_on_and_taken_by_gc_when_forced(there, monkeypatch):
    import adapterhub_registry.uploads as uploads

    from adapterhub.store import gc

    publish(there, "me/x", TENSORS)
    digest = digest_of(b"never")
    piece = {"content": b"1234", "headers": {"content-range": "bytes 0-3/8"}}
    with serving(there, TOKEN) as url:
        assert call(url, "PATCH", f"/v1/uploads/{digest}", TOKEN, **piece).status_code == 202
        assert gc.gc(there) == []
        assert any(stray.path.suffix == ".part" for stray in gc.gc(there, force=True))
        monkeypatch.setattr(uploads, "PART_LEASE", -1)
        assert call(url, "PATCH", f"/v1/uploads/{digest}", TOKEN, **piece).status_code == 202
        assert any(stray.path.suffix == ".part" for stray in gc.gc(there))  # nobody sent a piece of it for that long


@pytest.mark.parametrize("step", ["write", "rename", "commit"])
def test_a_full_disk_is_507_in_words_and_takes_the_next_push(there, mine, monkeypatch, step):
    """08: filled by a fault in `durable`, or in the index."""
    from failpoints import full

    publish(mine, "me/x", LARGE)
    publish(mine, "me/small", TENSORS)
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    with serving(there, TOKEN) as url:

        def fill(name, path, detail=None):
            if name == step and str(there.root) in str(path):
                full(name, path, detail)

        durable.watch = fill
        try:
            with pytest.raises(HubError, match="the registry's disk is full") as caught:
                push(mine, "me/x", url)
        finally:
            durable.watch = None
        assert str(there.root) not in str(caught.value)
        assert not [*(there.root / "incoming").glob("*.part")]  # what it took is given back
        push(mine, "me/small", url)
        push(mine, "me/x", url)
    assert there.verify() == []


def test_more_than_the_disk_has_is_refused_before_a_byte_comes(there, monkeypatch):
    import adapterhub_registry.uploads as uploads

    class Usage:
        free = 1000

    monkeypatch.setattr(uploads.shutil, "disk_usage", lambda path: Usage)
    with serving(there, TOKEN) as url:
        for size, code in ((1000, 200), (1001, 507)):
            assert call(url, "POST", f"/v1/uploads/{MISSING}", TOKEN, json={"size": size}).status_code == code


def test_the_servers_own_damage_is_its_fault_and_its_paths_stay_its_own(there, caplog):
    import sqlite3

    release = publish(there, "me/x", TENSORS)
    with sqlite3.connect(there.root / "hub.db") as database:
        database.execute("UPDATE manifests SET data = x'00'")
    database.close()
    with serving(there, TOKEN) as url:
        answers = [call(url, "GET", f"/v1/manifests/{release.digest}")]
        (there.root / "hub.db").write_bytes(b"this is no database" * 1000)
        answers += [
            call(url, "GET", "/v1/adapters/me/x"),
            call(url, "PUT", "/v1/releases", TOKEN, content=release.manifest.encode()),
        ]
        (there.root / "hub.db").unlink()
        answers += [call(url, "GET", "/v1/"), call(url, "POST", "/v1/missing", TOKEN, json=[])]
    for answer in answers:
        assert answer.status_code == 500 and set(answer.json()) == {"error", "hint"}
        assert str(there.root) not in answer.text and "hub.db" not in answer.text
    assert str(there.root) in caplog.text  # whoever runs it is told where


# --- F5, F11 --------------------------------------------------------------------------------------------------------


def test_f11_the_server_opens_no_outgoing_connection(tmp_path):
    """Whatever fields hold; an audit hook would see a socket, a look-up of a name or a program."""
    done = subprocess.run([sys.executable, "-c", OUTGOING, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip().endswith("seen []"), done.stdout + done.stderr
    assert "taken 201" in done.stdout


OUTGOING = """
import asyncio, json, sys
from pathlib import Path
import httpx, adapterhub
from adapterhub_registry.server import make_app
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, Made, Manifest
PLACES = ["http://127.0.0.1:9/", "https://169.254.169.254/latest", "file:///etc/passwd", "hf:some/repo", "//evil.invalid/x"]
hub = adapterhub.open(Path(sys.argv[1]) / "hub", create=True)
sketch = hub.store.put(b"rows")
app, seen = make_app(hub, "t"), []
names = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system", "os.exec", "urllib.Request")
sys.addaudithook(lambda event, args: seen.append((event, str(args))) if event in names else None)

async def main():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://x",
                                 headers={"authorization": "Bearer t"}) as client:
        for n, place in enumerate(PLACES):
            base = Base(name=place, architecture=place, structure=digest_of(b"s"), sketch=sketch)
            manifest = Manifest(name="me/x", version=f"0.{n}.0", base=base, licence=place, recipe={"data": place, "base_url": place},
                                metrics={"url": 1.0}, method=Made(name="lora", options={"url": place}))
            print("taken", (await client.put("/v1/releases", content=manifest.encode())).status_code)
            for method, path in (("GET", f"/v1/adapters?q={place}"), ("GET", f"/v1/adapters/{place}"), ("GET", f"/v1/blobs/{place}"),
                                 ("PUT", f"/v1/tags/{place}?tag=a&version={place}"), ("POST", f"/v1/uploads/{place}"),
                                 ("PUT", f"/v1/yanks/me/x?version=0.{n}.0&reason={place}"), ("GET", f"/v1/manifests/{place}")):
                await client.request(method, path, json={"size": 1, "url": place}, headers={"host": "evil.invalid",
                    "referer": place, "x-forwarded-host": "evil.invalid", "origin": place, "forwarded": f"for={place}"})
            await client.get("/v1/adapters/me/x")

seen.clear()
asyncio.run(main())
print("seen", seen)
"""
