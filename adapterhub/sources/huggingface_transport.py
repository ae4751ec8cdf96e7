"""What we ask of huggingface_hub, and its errors in the user's words. The only module that imports it for repos."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import HubError, IntegrityError, NotFound, Unreachable, UsageError
from adapterhub.files import durable
from adapterhub.sources.room import check_cap, check_disk
from adapterhub.spec.address import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
TAG = re.compile(r"v((?:0|[1-9]\d{0,8})\.(?:0|[1-9]\d{0,8})\.(?:0|[1-9]\d{0,8}))")


def check_repo(text: str) -> str:
    if not REPO.fullmatch(text) or ".." in text or "--" in text or len(text) > 96:
        raise UsageError(f"{text!r} is no repo on the Hub", "write hf:user/repo")
    return text


class Repo:
    """One repo of the Hub, with the token and cache that huggingface_hub uses."""

    def __init__(self, name: str, offline: bool = False, max_bytes: int | None = None):
        """max_bytes: of a file that is downloaded."""
        self.name, self.offline, self._most = check_repo(name), offline, max_bytes
        self._endpoint = os.environ.get("HF_ENDPOINT") or None

    def versions(self) -> dict[str, str]:
        """{version: commit} of its tags v1.2.0. Raises NotFound without the repo, Unreachable."""
        with self._told():
            refs = self._api().list_repo_refs(self.name)
        return {found[1]: ref.target_commit for ref in refs.tags if (found := TAG.fullmatch(ref.name))}

    def commit(self, revision: str | None = None) -> str:
        """The commit that a branch, tag or commit is; of the main branch without one."""
        if self.offline:
            return revision or "main"
        with self._told(revision):
            sha = self._api().model_info(self.name, revision=revision).sha
        if sha is None:
            raise NotFound(f"hf:{self.name} is empty", "push something first")
        return sha

    def file(self, path: str, commit: str, again: bool = False, most: int | None = None) -> Path:
        """A file of a commit, downloaded or from the cache; `again`: downloaded anew. Raises NotFound when there is none.

        most: bytes that it may have; IntegrityError for more. Its size, as the Hub lists it, is held against that and the
        disk before it is downloaded. Its bytes are not checked: huggingface_hub does not, over plain HTTP."""
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        if not self.offline and (
            again or not isinstance(try_to_load_from_cache(self.name, path, revision=commit), str)
        ):
            size = self._listed(path, commit).size
            if most is not None and size > most:
                raise IntegrityError(
                    f"hf:{self.name}: {path} has more than {most} bytes", "it is not what it should be"
                )
            check_cap(size, self._most, f"hf:{self.name}: {path}")
            check_disk(Path(constants.HF_HUB_CACHE), size)
        with self._told(f"{path} at {commit[:12]}"):
            found = hf_hub_download(
                self.name,
                path,
                revision=commit,
                force_download=again,
                local_files_only=self.offline,
                endpoint=self._endpoint,
            )
        return Path(found).resolve()

    def read(self, path: str, commit: str, most: int, again: bool = False) -> bytes:
        """A small file of a commit."""
        found = self.file(path, commit, again, most)
        with found.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise IntegrityError(f"hf:{self.name}: {path} has more than {most} bytes", "it is not what it should be")
        return data

    def checked(self, path: str, commit: str, most: int | None = None) -> Path:
        """A file whose hash is what the Hub lists for it, for repos without our manifest. Downloaded once more if it is not.

        most: bytes that it may have. Raises IntegrityError."""
        if self.offline:
            return self.file(path, commit)
        listed = self._listed(path, commit)
        for again in (False, True):
            found = self.file(path, commit, again, most)
            if _is_listed(found, listed):
                return found
        raise IntegrityError(
            f"hf:{self.name}: {path} is not what the Hub lists", "it was changed on the way: try again later"
        )

    def _listed(self, path: str, commit: str) -> RepoFile:
        """What the Hub lists of a file: its size and its hash. Raises NotFound."""
        with self._told(path):
            listed = self._api().get_paths_info(self.name, [path], revision=commit)
        file = next((one for one in listed if getattr(one, "size", None) is not None), None)
        if file is None:
            raise NotFound(f"hf:{self.name} has no {path}", "look at the repo")
        return file

    def has(self, path: str, commit: str) -> bool:
        with self._told(path):
            return bool(self._api().get_paths_info(self.name, [path], revision=commit))

    def files(self, commit: str) -> list[str]:
        with self._told():
            return self._api().list_repo_files(self.name, revision=commit)

    def create(self, private: bool) -> None:
        """Make the repo unless it is there."""
        with self._told():
            self._api().create_repo(self.name, private=private, exist_ok=True)

    def push(self, files: dict[str, bytes], gone: Sequence[str], message: str, parent: str | None) -> str:
        """One commit on the main branch that must follow `parent`; returns it. Raises HubError when another came first."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationAdd(path, data) for path, data in sorted(files.items())]
        operations += [CommitOperationDelete(path) for path in gone]
        with self._told():
            info = self._api().create_commit(self.name, operations, commit_message=message, parent_commit=parent)
        return info.oid

    def tag(self, name: str, commit: str) -> None:
        with self._told():
            self._api().create_tag(self.name, tag=name, revision=commit)

    def _api(self) -> HfApi:
        if self.offline:
            raise Unreachable(f"hf:{self.name} is not asked: --offline", "run it once without --offline")
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._endpoint)

    @contextmanager
    def _told(self, what: str | None = None) -> Iterator[None]:
        from huggingface_hub import errors

        place = f"hf:{self.name}" + (f" ({what})" if what else "")
        durable.announce("send", Path(self.name))
        token = ""
        try:
            token = "" if self.offline else _token()
            yield
        except errors.GatedRepoError:
            raise Unreachable(f"{place} is gated", "ask for access on its page, then: hf auth login") from None
        except errors.LocalEntryNotFoundError as error:
            if self.offline or "disabled" in str(error):
                raise Unreachable(f"{place} is not in the cache", "run it once online") from None
            raise Unreachable(f"{place} cannot be reached", "check the network, then try again") from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
            raise NotFound(f"there is no {place}", "check the name; a private repo needs hf auth login") from None
        except errors.OfflineModeIsEnabled:
            raise Unreachable(f"{place} is not asked: HF_HUB_OFFLINE is set", "unset it") from None
        except errors.HfHubHTTPError as error:
            code = error.response.status_code if error.response is not None else 0
            hints = {
                401: "hf auth login",
                403: "use a token that may write there",
                412: "somebody pushed meanwhile: push again",
            }
            kind = HubError if code in (400, 409, 412) else Unreachable
            raise kind(f"{place} answers {code}: {_line(error, token)}", hints.get(code, "try again later")) from None
        except HubError:
            raise
        except OSError as error:
            raise Unreachable(
                f"{place}: {_line(error, token)}", "check the network and the cache's disk, then try again"
            ) from None
        except Exception as error:  # httpx's errors, whichever of its versions the library uses
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "huggingface_hub"):
                raise
            raise Unreachable(
                f"{place} cannot be reached: {_line(error, token)}", "check the network, then try again"
            ) from None


def _is_listed(path: Path, listed: Any) -> bool:
    """LFS files are listed by their sha256, others by git's digest of a blob."""
    if path.stat().st_size != listed.size:
        return False
    with path.open("rb") as file:
        if listed.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == listed.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % listed.size + file.read()).hexdigest() == listed.blob_id


def _token() -> str:
    """The token that huggingface_hub sends. Raises UsageError, without it, for what no header can carry: the error of the
    library that refuses it would hold it."""
    from huggingface_hub import get_token

    token = get_token() or ""
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise UsageError(
            "the token for the Hub holds a space, a control character or a letter beyond ASCII",
            "set HF_TOKEN again, or: hf auth login",
        )
    return token


def _line(error: Exception, token: str) -> str:
    """An error in a line, without the token and without what may be secret in addresses."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = text.replace(token, "***") if token else text
    return re.sub(r"https?://\S+", lambda found: shown(found[0]), text)[:300]
