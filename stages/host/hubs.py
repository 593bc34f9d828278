"""The model hubs: Hugging Face's by huggingface_hub, ModelScope's by modelscope_hub. No other module uses these.

A download stays in the folder that it is written to, so that it goes on after a cut connection or a kill. Of
huggingface_hub, `http_get` does that and `hf_hub_download` does not: it deletes what it has of a file.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.contract.errors import InterruptedRunError, UsageError
from stages.contract.files import sha256_file


@dataclass(frozen=True)
class HubFile:
    """A file of a model on a hub."""

    name: str
    """Path in the model's folder."""
    size: int
    """Size in bytes."""
    sha256: str | None
    """sha256 (hex) of its content; None if the hub does not state it."""
    git_sha1: str | None = None
    """Git's object id (hex) of its content; None if the hub does not state it."""

    @property
    def digest(self) -> str:
        """The first 16 hex digits of its digest, or its size: another content has another."""
        return (self.sha256 or self.git_sha1 or f"size-{self.size}")[:16]

    def is_intact(self, path: Path) -> bool:
        """Whether the file at `path` has the content that the hub states."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_file(path) == self.sha256
        if self.git_sha1 is not None:
            content = path.read_bytes()  # the hub states only this digest of small files
            return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == (
                self.git_sha1
            )
        return True


class Hub(Protocol):
    """A hub of models. A model's name there is OWNER/NAME.

    Both functions raise a LorryError that names the cure: UsageError if the hub has no such model or revision, refuses
    this user or cannot be reached, InterruptedRunError if the connection is lost.
    """

    def files(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        """The revision to download, and all files of the model. `revision` None: the newest."""

    def download(self, model: str, revision: str, file: HubFile, folder: Path) -> Path:
        """Download a file below `folder`, which may have a part of it. Returns its path."""


class HuggingFace:
    """Hugging Face's hub, or a mirror of it that HF_ENDPOINT names. HF_TOKEN, or the token of `hf auth login`, opens
    gated and private models."""

    def __init__(self) -> None:
        self._endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def files(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        """The commit of a branch, tag or commit, and all files of the model there."""
        from huggingface_hub import HfApi

        with self._one_line_errors(model, revision):
            info = HfApi(endpoint=self._endpoint).model_info(model, revision=revision, files_metadata=True, timeout=20)
        found = [
            HubFile(
                one.rfilename,
                one.size or 0,
                one.lfs.sha256 if one.lfs else None,
                None if one.lfs else one.blob_id,
            )
            for one in info.siblings or []
        ]
        return info.sha or revision or "main", found

    def download(self, model: str, revision: str, file: HubFile, folder: Path) -> Path:
        """Download a file, or the rest of it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging  # type: ignore[attr-defined]

        disable_progress_bars()
        logging.set_verbosity_error()  # a connection that is lost and found again is no news
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > file.size:
            path.unlink()
        with self._one_line_errors(model, revision), path.open("ab") as part:
            http_get(
                hf_hub_url(model, file.name, revision=revision, endpoint=self._endpoint),
                part,
                resume_size=part.tell(),
                headers=build_hf_headers(library_name="lorry"),
                expected_size=file.size,
            )
        return path

    @contextmanager
    def _one_line_errors(self, model: str, revision: str | None) -> Iterator[None]:
        """Raise the errors of huggingface_hub as a LorryError."""
        import httpx
        from huggingface_hub import errors

        try:
            yield
        except errors.GatedRepoError as error:
            raise UsageError(
                f"{model}: gated on {self._endpoint}; accept its terms at {self._endpoint}/{model}, then set HF_TOKEN"
                " to a token of that account"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UsageError(
                f"--revision {revision}: {model} has no such revision on {self._endpoint}; name a branch, tag or commit"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UsageError(
                f"{model}: no such model on {self._endpoint}, or a private one; check the name, set HF_TOKEN to a"
                " token that may read it, or use --from modelscope"
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise UsageError(f"{model}: not fetched, as HF_HUB_OFFLINE is set; unset it") from error
        except errors.HfHubHTTPError as error:
            raise _refusal(model, self._endpoint, error.response.status_code, "HF_TOKEN") from error
        except (httpx.TransportError, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:  # of this machine's disk
                raise
            raise _lost(model, self._endpoint, error, "set HF_ENDPOINT to a mirror, use --from modelscope") from error


class ModelScope:
    """ModelScope's hub, or the site that MODELSCOPE_ENDPOINT names. MODELSCOPE_API_TOKEN, or the token of `modelscope
    login`, opens private models."""

    def __init__(self) -> None:
        from modelscope_hub import HubApi, HubConfig

        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # each retry is no news
        config = HubConfig()
        self._endpoint = str(config.endpoint)
        self._api = HubApi(config)

    def files(self, model: str, revision: str | None) -> tuple[str, list[HubFile]]:
        """The revision itself, by default `master`, and all files of the model there."""
        revision = revision or "master"
        with self._one_line_errors(model, revision):
            found = self._api.list_repo_files(model, "model", revision=revision)
        return revision, [HubFile(one.path, one.size, one.sha256) for one in found if not one.is_dir]

    def download(self, model: str, revision: str, file: HubFile, folder: Path) -> Path:
        """Download a file, or the rest of it. The library keeps its locks in `folder`, too."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._one_line_errors(model, revision):
            return Path(
                self._api.download_file(
                    model,
                    "model",
                    file.name,
                    revision=revision,
                    cache_dir=folder,
                    local_dir=folder,
                    expected_sha256=file.sha256,
                    file_size=file.size,
                )
            )

    @contextmanager
    def _one_line_errors(self, model: str, revision: str) -> Iterator[None]:
        """Raise the errors of modelscope_hub as a LorryError."""
        import requests
        from modelscope_hub import errors

        try:
            yield
        except errors.NotExistError as error:
            raise UsageError(
                f"{model}: no such model on {self._endpoint} with revision {revision}, or a private one; check both"
                " names, set MODELSCOPE_API_TOKEN, or use --from huggingface"
            ) from error
        except errors.APIError as error:
            raise _refusal(model, self._endpoint, error.status_code, "MODELSCOPE_API_TOKEN") from error
        except errors.FileIntegrityError as error:
            raise InterruptedRunError(
                f"{model}: arrived damaged from {self._endpoint}; run the same command again"
            ) from error
        except (errors.HubError, requests.RequestException, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:  # of this machine's disk
                raise
            raise _lost(model, self._endpoint, error, "use --from huggingface") from error


HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}
"""The hubs, by their names for `--from`."""


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on a hub, OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def _refusal(model: str, endpoint: str, status: int | None, token: str) -> UsageError:
    """The error for a hub that answers with an HTTP status of failure."""
    if status in (401, 403):
        return UsageError(
            f"{model}: {endpoint} refuses this user (HTTP {status}); set {token} to a token that may read the model"
        )
    return UsageError(f"{model}: {endpoint} answers with HTTP {status}; run the same command again later")


def _lost(model: str, endpoint: str, error: BaseException, others: str) -> InterruptedRunError:
    """The error for a hub that cannot be reached, or whose connection is lost. `others` says how to get the model
    elsewhere."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return InterruptedRunError(
        f"{model}: no connection to {endpoint} ({reason[:160]}); run the same command again once there is one, {others}"
        ", or copy the model's folder into the models folder"
    )
