"""Who asks, and what they may do: 401 for whom we do not know, 403 for what they may not."""

from __future__ import annotations

import hmac

from fastapi import HTTPException, Request

from adapterhub_registry.accounts import Account, Accounts

_ASK = {"www-authenticate": "Bearer"}


class Access:
    """accounts: those of the index. token: one more that may write everything. read_by_token: reading takes one, too."""

    def __init__(self, accounts: Accounts, token: str = "", read_by_token: bool = False):
        self._accounts = accounts
        self._token = token.encode()
        self._read_by_token = read_by_token

    @property
    def writable(self) -> bool:
        """Whether there is a token that may write."""
        return bool(self._token) or self._accounts.writers() > 0

    def reader(self, request: Request) -> None:
        """Let pass whoever may read. What is here and what is not are answered alike to all others."""
        if self._read_by_token:
            self._shown(request, "read")

    def writer(self, request: Request) -> Account:
        """Whoever may write at least something."""
        if not self.writable:
            raise HTTPException(403, "this registry is read-only")
        account = self._shown(request, "write")
        if not account.write:
            raise HTTPException(403, f"the token {account.name} may only read")
        return account

    def _shown(self, request: Request, what: str) -> Account:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise HTTPException(401, f"a token is needed to {what}", _ASK)
        if self._token and hmac.compare_digest(token.encode(), self._token):
            return Account("of the server", ("*",))
        account = self._accounts.holding(token)
        if account is None:
            raise HTTPException(401, f"a token is needed to {what}; this one is not known here", _ASK)
        if account.ended:
            raise HTTPException(401, f"the token {account.name} ended on {account.until}", _ASK)
        return account


def check_may_write(account: Account, name: str) -> None:
    if not account.may_write(name):
        raise HTTPException(
            403, f"the token {account.name} may write {', '.join(account.write)}, and {name} is not among them"
        )
