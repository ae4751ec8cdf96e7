"""The plain registry server: a hub over HTTP (docs/guide/registry.md). Reading is open, or by token; writing needs a token."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from adapterhub.errors import IntegrityError, NotFound
from adapterhub.spec.digest import check_digest
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import TAG, check_name, check_version
from adapterhub.store.index import ANY
from adapterhub.store.naming import check_look_alike
from adapterhub.store.releases import Releases
from adapterhub.trust.keys import PrivateKey, PublicKey
from adapterhub.trust.policy import known_keys
from adapterhub.trust.signature import RELEASE, proven, statement
from adapterhub_registry.access import Access, check_may_write
from adapterhub_registry.accounts import Account
from adapterhub_registry.bodies import body
from adapterhub_registry.faults import add_faults
from adapterhub_registry.reading import add_reading
from adapterhub_registry.uploads import add_uploads

LARGEST_MANIFEST = 8 << 20
LARGEST_SIGNATURE = 16 << 10
"""Bytes of an envelope about one release; one with sixteen signatures has four thousand."""
MOST_SIGNATURES = 32
"""Envelopes that are kept with one release."""


def make_app(
    hub: Releases, token: str = "", key: PrivateKey | None = None, patience: float = 30, read_by_token: bool = False
) -> FastAPI:
    """The server of a hub.

    token: may write everything, beside the accounts that the index keeps; without any nobody writes. key: signs the lists of
    releases. patience: seconds that a sender may pause in a body. read_by_token: reading takes a token, too."""
    app = FastAPI(title="adapterhub registry", docs_url=None, redoc_url=None)
    app.state.patience, app.state.stopping = patience, False
    access = Access(hub.index.accounts, token, read_by_token)
    add_faults(app)
    add_reading(app, hub, key, access)
    add_uploads(app, hub, access)
    add_releases(app, hub, access)
    return app


def add_releases(app: FastAPI, hub: Releases, access: Access) -> None:
    """Add the routes that change what is listed: each only for accounts that may write the adapter's name."""
    index, writer = hub.index, Depends(access.writer)
    known = known_keys()  # of whoever runs it; a signature by another has to carry its key

    @app.put("/v1/releases")
    async def commit(request: Request, account: Account = writer) -> JSONResponse:
        data = await body(request, LARGEST_MANIFEST)
        return await run_in_threadpool(_commit, hub, data, account)

    @app.post("/v1/signatures/{digest}")
    async def signed(digest: str, request: Request, account: Account = writer) -> dict[str, Any]:
        envelope = await body(request, LARGEST_SIGNATURE)
        return await run_in_threadpool(_sign, hub, check_digest(digest), envelope, known, account)

    @app.put("/v1/tags/{name:path}")
    def tag(
        name: str,
        tag: str = Query(max_length=96),
        version: str = Query(max_length=40),
        expected: str | None = Query(None, max_length=40),
        account: Account = writer,
    ) -> dict[str, Any]:
        """expected: the version that the tag means now, `none` for nothing; without it whatever it means."""
        check_may_write(account, check_name(name))
        if not TAG.fullmatch(tag):
            raise HTTPException(400, f"{tag!r} is no tag")
        meant = {None: ANY, "none": None}[expected] if expected in (None, "none") else check_version(expected)
        index.set_tag(name, tag, check_version(version), meant)
        return {"tag": tag, "version": version}

    @app.put("/v1/yanks/{name:path}")
    def yank(
        name: str,
        version: str = Query(max_length=40),
        reason: str = Query(max_length=500),
        account: Account = writer,
    ) -> dict[str, Any]:
        check_may_write(account, check_name(name))
        if not reason.isprintable():
            raise HTTPException(400, "the reason holds control characters")
        index.yank(name, check_version(version), reason)
        return {"yanked": version}

    @app.delete("/v1/yanks/{name:path}")
    def unyank(name: str, version: str = Query(max_length=40), account: Account = writer) -> dict[str, Any]:
        check_may_write(account, check_name(name))
        index.yank(name, check_version(version), None)
        return {"yanked": None}


def _commit(hub: Releases, data: bytes, account: Account) -> JSONResponse:
    """Add a release whose blobs and needed parents are here: 201, or 200 when it is here already (whoever brings it)."""
    from adapterhub.files.safetensors_header import read_header
    from adapterhub.spec.parents import check_expressions

    release = Release.decode(data)
    check_expressions(release.manifest)
    with hub.store.shared():
        if hub.index.find(release.digest) is not None:
            return JSONResponse({"digest": release.digest})
        check_may_write(account, release.name)
        lacking = [str(problem.path.name) for _, problem in hub.store.verify(release.manifest.needs)]
        lacking += [p.label for p in release.manifest.required if hub.index.find(p.digest) is None]
        if lacking:
            return JSONResponse({"error": f"it lacks {', '.join(lacking[:5])}", "missing": lacking}, 422)
        if "tensors" in release.manifest.files:
            file = release.manifest.files["tensors"]
            read_header(hub.store.header(file), file.size)
        check_look_alike(hub.index, release.name)
        hub.add([release])
    return JSONResponse({"digest": release.digest}, 201)


def _sign(hub: Releases, digest: str, envelope: bytes, known: list[PublicKey], account: Account) -> dict[str, Any]:
    """Keep those signatures of an envelope that hold; one that is here already is fine, whoever brings it."""
    release = hub.index.find(digest)
    if release is None:
        raise NotFound(f"no release {digest}", "")
    try:
        payload, kept = proven(envelope, RELEASE, known)
    except IntegrityError as error:
        raise HTTPException(400, str(error)) from None
    if payload != statement(release):
        raise HTTPException(400, "it is a signature of another release")
    there = hub.index.signatures(digest)
    if kept not in there:
        check_may_write(account, release.name)
        if len(there) >= MOST_SIGNATURES:
            raise HTTPException(409, f"{release} has {len(there)} signatures already, and no more are kept")
        hub.sign(digest, kept)
    return {"signed": digest}
