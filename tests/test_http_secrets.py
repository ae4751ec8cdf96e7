"""What a client of a registry, or of the Hub, never prints or sends on, and how much of an answer it takes."""

import datetime
import gzip
import ipaddress
import json
import ssl
import threading
import traceback
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from crashed import TENSORS, large, publish
from fault_server import Faults, faulty
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import HubError, IntegrityError, NotFound, Unreachable
from adapterhub.share.registry import push
from adapterhub.sources import http as http_module
from adapterhub.sources import tokens
from adapterhub.sources.http import Http
from adapterhub.sources.huggingface_transport import Repo
from adapterhub.sources.registry import Registry
from adapterhub.spec.address import address

TOKEN = "PLANTED-TOKEN"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = adapterhub.open(tmp_path / "mine", create=True)
    publish(hub, "me/x", TENSORS)
    monkeypatch.chdir(hub.root)
    monkeypatch.delenv("ADAPTERHUB_TOKEN", raising=False)
    return hub


@pytest.fixture
def quick(monkeypatch):
    pauses = []
    monkeypatch.setattr(http_module.time, "sleep", pauses.append)
    return pauses


@contextmanager
def answering(answer, tls=None):
    """A server whose every answer is written by `answer(handler)`; its address and the headers that it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self):
            seen.append({key.lower(): value for key, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("content-length") or 0))
            with suppress(OSError):
                answer(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://localhost:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def says(status, body=b"", **headers):
    def answer(handler):
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def endless(status, **headers):
    def answer(handler):
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * (1 << 20))

    return answer


# --- F7: the token is nowhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [307, 400, 401, 403, 404, 409, 418, 422, 500, 503, 507])
@pytest.mark.parametrize("before", [0, 275])
def test_f7_a_server_that_repeats_the_token_does_not_have_us_print_it(hub, status, before, quick, monkeypatch, capsys):
    """Also where the line is cut in the middle of it."""
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    body = json.dumps({"error": "x" * before + f" no such token: {TOKEN}"}).encode()
    with answering(says(status, body, location=f"https://{TOKEN}.example/{TOKEN}")) as (url, seen):
        for command in (["push", "me/x", url], ["push", "me/x", url, "--json"], ["tag", "me/x", "s", "--at", url],
                        ["yank", "me/x@0.1.0", "--reason", "r", "--at", url]):  # fmt: skip
            assert execute(command) != 0
        assert any(headers.get("authorization") == f"Bearer {TOKEN}" for headers in seen)
    told = capsys.readouterr()
    assert TOKEN[:8] not in told.out + told.err


@pytest.mark.parametrize(
    "token",
    [
        f"{TOKEN}\n",
        f" {TOKEN}\t",
        f"{TOKEN}\r\n",
        f"{TOKEN}\x1b",
        f"{TOKEN}é",
        f"\x00{TOKEN}",
        f"{TOKEN}\n\nx",
        f"{TOKEN} x",
    ],
)
def test_f7_a_token_that_is_odd_at_its_ends_works_and_any_other_is_not_printed(
    hub, token, monkeypatch, capsys, tmp_path
):
    there = adapterhub.open(tmp_path / "there", create=True)
    monkeypatch.setitem(http_module.__dict__, "TRIES", 1)
    with serving(there, token=TOKEN) as url:
        monkeypatch.setattr("os.environ", {**__import__("os").environ, "ADAPTERHUB_TOKEN": token})
        code = execute(["push", "me/x", url])
        more = execute(["push", "me/x", url, "--json"])
    assert (code, bool(there.releases())) == ((0, True) if token.strip() == TOKEN else (2, False)) and more != 1
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err


def test_f7_the_token_is_in_no_file_and_in_no_report_of_a_crash(hub, monkeypatch, tmp_path, capsys):
    there = adapterhub.open(tmp_path / "there", create=True)
    with serving(there, token=TOKEN) as url:
        tokens.keep(address(url), TOKEN)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        (hub.root / "adapterhub.toml").write_text(
            f'[adapters]\n"me/x" = "*"\n[sources.team]\nurl = "{url}"\nnamespaces = ["me"]\n'
        )
        for command in (["push", "me/x", "team"], ["lock"], ["sync"], ["tree"], ["dirs"], ["login", "--list"], ["doctor", "--json"],
                        ["list", "--json"], ["tag", "me/x", "a", "--at", "team"], ["outdated"], ["log", "me/x"]):  # fmt: skip
            assert execute(command) in (0, 1), command

        def broken(*_, **__):
            raise RuntimeError("a bug")

        monkeypatch.setattr("adapterhub.sources.registry.Candidate", broken)
        with pytest.raises(RuntimeError) as caught:
            execute(["update"])
        crash = "".join(traceback.format_exception(caught.value))
        assert "bug in adapterhub" in crash and TOKEN not in crash
        assert TOKEN not in repr(Registry(url).http.__dict__["_client"].headers)
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    files = [path for folder in (hub.root, there.root) for path in folder.rglob("*") if path.is_file()]
    assert (hub.root / "adapterhub.lock") in files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_proxy_that_is_none_is_named_without_its_password(hub, monkeypatch, capsys):
    for proxy in (f"nonsense://user:{TOKEN}@proxy.example", f"http://user:{TOKEN}@proxy.example:port"):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        assert execute(["repair", "--from", "https://a.example"]) == 2
    told = capsys.readouterr()
    assert "HTTPS_PROXY" in told.err and TOKEN not in told.err + told.out


def test_no_proxy_stands_between_this_machine_and_itself(hub, monkeypatch):
    with answering(says(404)) as (proxy, at_proxy), answering(says(404)) as (url, seen):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "")
        with pytest.raises(NotFound):
            Http(url, TOKEN).read("/v1/", 10)
        assert seen and not at_proxy


# --- F8: redirects --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A certificate of localhost that nobody vouches for: its file, and the server's side of it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName(names), False).sign(key, hashes.SHA256())
    file = tmp_path_factory.mktemp("tls") / "cert.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return file, context


def test_f8_no_redirect_takes_the_token_to_another_host_port_or_scheme(hub, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
    with answering(says(200, b"{}")) as (plain, at_plain), answering(says(200, b"{}"), tls[1]) as (safe, at_safe):
        for first, target, seen in (
            (None, plain, at_plain),  # another port
            (None, plain.replace("localhost", "127.0.0.1"), at_plain),  # another name
            (None, safe, at_safe),  # a better scheme
            (tls[1], plain, at_plain),  # a worse one
            (tls[1], safe.replace("localhost", "127.0.0.1"), at_safe),
        ):
            with answering(says(302, location=target + "/x"), first) as (url, at_first):
                assert Http(url, TOKEN).read("/x", 10) == b"{}"
                assert at_first[-1]["authorization"] == f"Bearer {TOKEN}"
            assert seen and "authorization" not in seen[-1]
            seen.clear()


def scripted(url, answers, **more):
    """A client whose requests are answered from a table, and what it sent."""
    http, sent = Http(url, TOKEN, **more), []

    def answer(request):
        sent.append((str(request.url), request.headers.get("authorization")))
        return answers[str(request.url)]

    http._client._mounts, http._client._transport = {}, httpx.MockTransport(answer)
    return http, sent


def to(url, status=302):
    return httpx.Response(status, headers={"location": url}, stream=httpx.ByteStream(b""))


def test_f8_the_default_ports_of_two_schemes_are_two_origins():
    answers = {
        "http://localhost/x": to("https://localhost/x"),
        "https://localhost/x": httpx.Response(200, stream=httpx.ByteStream(b"ok")),
    }
    http, sent = scripted("http://localhost", answers)
    assert http.read("/x", 10) == b"ok"
    assert sent == [("http://localhost/x", f"Bearer {TOKEN}"), ("https://localhost/x", None)]


def test_f8_back_at_its_own_origin_the_token_is_shown_again():
    answers = {"https://a.example/x": to("https://b.example/x"), "https://b.example/x": to("https://a.example/y"),
               "https://a.example/y": httpx.Response(200, stream=httpx.ByteStream(b"ok"))}  # fmt: skip
    http, sent = scripted("https://A.example:443/", answers)
    assert http.read("/x", 10) == b"ok"
    assert [token for _, token in sent] == [f"Bearer {TOKEN}", None, f"Bearer {TOKEN}"]


@pytest.mark.parametrize(
    "target",
    [
        "http://a.example/x",
        "http://b.example/x",
        "http://127.0.0.1/x",
        "ftp://a.example/x",
        "https://[::1/x",
        "nonsense:x",
    ],
)
def test_f8_no_redirect_leads_from_tls_to_plain_http_or_nowhere(target, quick):
    http, sent = scripted("https://a.example", {"https://a.example/x": to(target)})
    with pytest.raises(Unreachable):
        http.read("/x", 10)
    assert {url for url, _ in sent} == {"https://a.example/x"}


def test_f8_what_is_written_goes_to_the_address_that_was_given_or_nowhere():
    http, sent = scripted("https://a.example", {"https://a.example/x": to("https://b.example/x", 308)})
    with pytest.raises(HubError, match="it has moved"):
        http.request("PUT", "/x", content=b"private")
    assert len(sent) == 1


def test_f8_a_loop_ends_after_five_hops(quick):
    http, sent = scripted("https://a.example", {"https://a.example/x": to("https://a.example/x")})
    with pytest.raises(Unreachable):
        http.read("/x", 10)
    assert len(sent) == 6


def test_f8_a_certificate_that_nobody_vouches_for(hub, tls, quick, capsys):
    with answering(says(200, b"{}"), tls[1]) as (url, seen):
        tokens.keep(address(url), TOKEN)
        assert execute(["push", "me/x", url]) == 3
        assert not seen
    told = capsys.readouterr()
    assert "certificate" in told.err.lower() and TOKEN not in told.err


# --- how much is taken ----------------------------------------------------------------------------------------------


def test_answers_without_end_are_cut_off(hub, monkeypatch, quick):
    monkeypatch.setattr(http_module, "LARGEST_ANSWER", 4 << 20)
    with answering(endless(404)) as (url, _):
        with pytest.raises(NotFound):
            Http(url, TOKEN).read("/x", 10)
        with pytest.raises(NotFound), Http(url, TOKEN).stream("/x"):
            pass
    with answering(endless(302, location="/x")) as (url, seen):
        with pytest.raises(Unreachable, match="5 redirects"):
            Http(url, TOKEN).read("/x", 10)
        assert len(seen) == 6
    with answering(endless(200)) as (url, _):
        with pytest.raises(IntegrityError, match="more than"):
            Http(url, TOKEN).request("POST", "/x")
        assert Http(url, TOKEN).read("/x", 100, cut=True) == b"x" * 100


def test_an_answer_that_takes_for_ever_is_given_up(monkeypatch, quick):
    """Each byte comes in time, the whole never would."""
    monkeypatch.setattr(http_module, "LONGEST", 0.0)
    with answering(says(200, b"x" * 100)) as (url, _), pytest.raises(Unreachable, match="not complete"):
        Http(url).read("/x", 1000)
    assert quick == []  # nobody waits for that five times


def test_packed_answers_are_not_unpacked():
    """A thousand times their size would be taken before anybody could count it."""
    packed = gzip.compress(bytes(1 << 20))
    with answering(says(200, packed, content_encoding="gzip")) as (url, seen):
        assert Http(url).read("/x", 10_000) == packed
    assert seen[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"missing": {}}',
        b'{"missing": [[]], "offset": "x"}',
        b"[" * 100_000,
        b"\xff",
        b"null",
        b"1",
    ],
)
def test_answers_to_a_push_that_are_none(hub, body, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    for status in (200, 409, 422):
        with answering(says(status, body)) as (url, _), pytest.raises(HubError):
            push(hub, "me/x", url)


# --- what a server says in codes ------------------------------------------------------------------------------------


@pytest.fixture
def faults(hub, tmp_path, monkeypatch):
    there, faults = adapterhub.open(tmp_path / "there", create=True), Faults()
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    with serving(there, token=TOKEN) as origin, faulty(origin, faults) as url:
        faults.url, faults.hub = url, there
        yield faults


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_how_to_log_in(faults, hub, status, capsys):
    faults.status = [status]
    assert execute(["push", "me/x", faults.url]) == 3
    assert f"adapterhub login {faults.url}" in capsys.readouterr().err
    assert faults.seen.total() == 1  # it is no use to ask again


def test_a_full_disk_of_a_server_is_said_once_and_the_push_goes_on_later(faults, hub, quick, capsys):
    publish(hub, "me/y", large(1))
    faults.status = [507]
    assert execute(["push", "me/y", faults.url]) == 1
    told = capsys.readouterr().err
    assert "disk" in told and "full" in told and quick == [] and faults.seen.total() == 1
    assert execute(["push", "me/y", faults.url]) == 0 and faults.hub.verify() == []


def test_a_server_that_is_busy_while_a_blob_comes_is_asked_again(faults, hub, tmp_path, quick):
    push(hub, "me/x", faults.url)
    other = adapterhub.open(tmp_path / "other", create=True)
    source = Registry(faults.url)
    release = source.release("me/x", "0.1.0")
    blobs = [file for file in release.manifest.needs if not file.parts]
    faults.status = [503, 500]
    source.fetch(blobs[:1], other.store)
    assert other.store.fault(blobs[0]) is None and not faults.status


# --- the Hub of Hugging Face ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [f"hf_{TOKEN}\x1b", f"hf_{TOKEN}é", f"hf_{TOKEN}\x00", f"hf x {TOKEN}"])
def test_f7_a_token_for_the_hub_that_no_header_can_carry_is_not_printed(hub, token, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with answering(says(500, b"{}")) as (url, seen):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("os.environ", {**__import__("os").environ, "HF_TOKEN": token})
        for command in (
            ["push", "me/x", "hf:acme/sql"],
            ["install", "hf:acme/sql"],
            ["install", "hf:acme/sql", "--json"],
        ):
            assert execute(command) == 2
        assert not seen
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err


def test_f7_errors_of_the_hub_show_neither_its_token_nor_what_is_in_an_address(hub, monkeypatch):
    monkeypatch.setattr("adapterhub.sources.huggingface_transport._token", lambda: f"hf_{TOKEN}")
    repo = Repo("acme/sql")
    for error in (
        OSError(f"Illegal header value b'Bearer hf_{TOKEN}'"),
        httpx.ConnectError(f"no way to https://user:{TOKEN}@hub.example/api"),
        httpx.ReadError(f"https://cdn.example/x?X-Amz-Signature={TOKEN}&more ended"),
    ):
        with pytest.raises(Unreachable) as caught, repo._told():
            raise error
        assert TOKEN not in str(caught.value) + caught.value.hint and caught.value.__suppress_context__
