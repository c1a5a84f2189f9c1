"""Getting checkpoint files: download, import by hand, and (from `cache`) where they lie and whether they are intact.

Nothing is visible under its final name before it is complete and checked: files are written beside it and renamed.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .cache import (
    Mark,
    Verification,
    cache_dir,
    digest_of,
    examine,
    is_cached,
    on_hub,
    path_of,
    ready,
    remember,
    verify,
)
from .errors import (
    CheckpointError,
    DownloadError,
    HashMismatchError,
    LicenseError,
    ManualDownloadError,
    OfflineError,
    UnverifiedWeightsWarning,
    WeightsError,
)
from .fetch import discard, fetch, fetch_from_hub
from .progress import progress_bar
from .reader import check_file, convert_trusted, read_state_dict
from .record import NOT_STATED, Weights

__all__ = ["Verification", "WeightsError", "cache_dir", "download", "import_file", "is_cached", "path_of", "verify"]

LOCK_TIMEOUT = 3600.0  # seconds to wait for another process that downloads the same file
BY_HAND = "fetch the file by hand and run `vizoo weights import NAME FILE`"

logger = logging.getLogger("vizoo.weights")


def download(weights: Weights, *, progress: bool = True, force: bool = False, accept_license: bool = False) -> Path:
    """Return the checked file of a record, downloading it if the cache lacks it or holds a damaged one.

    Several processes may call this at once: one downloads, the others wait and use its file.

    Args:
        weights: The record.
        progress: Shows a bar when standard error is a terminal.
        force: Downloads although the cached file is fine. That file stays until the new one has arrived.
        accept_license: Accepts weights that state no licence. Remembered with the file.

    Returns:
        Path of the file in the cache.

    Raises:
        LicenseError: If the weights state no licence, and neither the argument, an earlier call nor
            `VIZOO_ACCEPT_UNSTATED_LICENSES=1` accepts that.
        OfflineError: If the file is not there and `VIZOO_OFFLINE` or `HF_HUB_OFFLINE` is set.
        ManualDownloadError: If the file is not there and has to be fetched by hand.
        HashMismatchError: If the file is not the published one.
        DownloadError: If the network, the server or the disk refuses.

    Warns:
        UnverifiedWeightsWarning: If no digest is published for the file.
    """
    path = path_of(weights)
    _require_license(weights, path, accept_license)
    if force or not ready(weights, path, accept_license):
        with _locked(weights, path):
            if force or not ready(weights, path, accept_license):  # another process may have brought it meanwhile
                _refuse_unreachable(weights, path, _drop_damaged(weights, path))
                _obtain(weights, path, progress=progress, force=force, accepted=accept_license)
    if weights.sha256 is None:
        message = f"{path.name} is unverified: no sha256 is published for {weights.url or weights.repository}"
        warnings.warn(message, UnverifiedWeightsWarning, stacklevel=2)
    return path


def import_file(
    weights: Weights,
    file: str | Path,
    *,
    trust: bool = False,
    accept_license: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Put a file that was fetched by hand into the cache, after the checks that a download gets.

    Args:
        weights: The record that the file belongs to.
        file: The file; it is copied.
        trust: Converts the file to safetensors by running the code that it asks for. Only for a trusted author.
        accept_license: Accepts weights that state no licence. Remembered with the file.
        check: Called with the copy before it takes its place in the cache; what it raises keeps the file out.

    Returns:
        Path of the file in the cache.

    Raises:
        FileNotFoundError: If there is no such file.
        HashMismatchError: If it is not the published file.
        CheckpointError: If it cannot be read, or lacks what the record says it holds.
        LicenseError: As for `download`.
    """
    file, path = Path(file), path_of(weights)
    if not file.is_file():
        raise FileNotFoundError(f"no file to import at {file}")
    _require_license(weights, path, accept_license)
    source = digest_of(file)
    _require_digest(weights, source, path, f"{file} is not the published file")
    copy = path.with_name(path.name + ".import")
    with _locked(weights, path), _disk_errors(weights, path, copy):
        try:
            if trust:
                convert_trusted(file, copy, weights.container)
            else:
                read_state_dict(file, weights.container, weights.prefix)
                shutil.copyfile(file, copy)
            if check is not None:
                check(copy)
            _admit(copy, path, digest_of(copy) if trust else source, source, accepted=accept_license)
        finally:
            copy.unlink(missing_ok=True)
    return path


def _drop_damaged(weights: Weights, path: Path) -> str:
    """Remove a damaged file, and return what was wrong with it; empty when nothing was."""
    found = examine(weights, path)
    if found.state != "damaged":
        return ""
    path.unlink(missing_ok=True)
    Mark.place(path).unlink(missing_ok=True)
    logger.warning("removed the damaged file %s: %s", path, found.detail)
    return f"; the cached file was damaged and has been removed ({found.detail})"


def _obtain(weights: Weights, path: Path, *, progress: bool, force: bool, accepted: bool) -> None:
    """Download, check and admit a file. The lock is held."""
    part = path.with_name(path.name + ".part")
    with _disk_errors(weights, path, part):
        try:
            digest = _bring(weights, part, progress, force)
        except DownloadError as error:
            kind = OfflineError if _offline() else DownloadError
            raise kind(_explain(str(error), weights, path, f"Try again, or {BY_HAND}")) from error
        _check_download(weights, path, part, digest)
        _admit(part, path, digest, digest, accepted=accepted)
        discard(part)


def _check_download(weights: Weights, path: Path, part: Path, digest: str) -> None:
    """Remove a complete file that is not what it should be."""
    try:
        _require_digest(weights, digest, path, "the downloaded file is not the published one")
        if weights.sha256 is None:
            check_file(part)
    except HashMismatchError:
        discard(part)
        raise
    except CheckpointError as error:
        discard(part)
        raise DownloadError(_explain(f"what the server sent is no checkpoint: {error}", weights, path)) from error
    before = Mark.read(path)
    if weights.sha256 is None and before and before.source != digest:
        logger.warning("%s changed at its source: sha256 was %s, is %s", path, before.source, digest)


def _bring(weights: Weights, part: Path, progress: bool, force: bool) -> str:
    """Fetch the whole file into `part` and return its digest."""
    if not on_hub(weights):
        with progress_bar(weights.filename, enabled=progress) as report:
            fetch(weights.url, part, anchored=weights.sha256 is not None, report=report)
        return digest_of(part)
    fetch_from_hub(weights.url, part, offline=_offline(), force=force)
    digest = digest_of(part)
    if weights.sha256 not in (None, digest) and not force and not _offline():
        fetch_from_hub(weights.url, part, offline=False, force=True)  # the hub's own cache may hold a damaged file
        digest = digest_of(part)
    return digest


def _admit(file: Path, path: Path, digest: str, source: str, *, accepted: bool) -> None:
    """Give a complete and checked file its final name, so that it survives a crash, and mark it."""
    before = Mark.read(path)
    _sync(file)
    os.replace(file, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)
    remember(path, digest, source, accepted or (before is not None and before.license_accepted))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_digest(weights: Weights, digest: str, path: Path, problem: str) -> None:
    if weights.sha256 not in (None, digest):
        problem = f"{problem}: sha256 is {digest}, expected {weights.sha256}"
        raise HashMismatchError(_explain(problem, weights, path, "Fetch it again; nothing was kept"))


def _require_license(weights: Weights, path: Path, accepted: bool) -> None:
    if weights.license != NOT_STATED or accepted or _flag("VIZOO_ACCEPT_UNSTATED_LICENSES"):
        return
    mark = Mark.read(path)
    if mark is None or not mark.license_accepted:
        problem = f"{weights.repository} states no licence for these weights, so using them needs your explicit consent"
        advice = "If you may use them, pass accept_license=True or set VIZOO_ACCEPT_UNSTATED_LICENSES=1"
        raise LicenseError(_explain(problem, weights, path, advice))


def _refuse_unreachable(weights: Weights, path: Path, damage: str) -> None:
    """Raise where no download can succeed."""
    if weights.manual:
        advice = f"{weights.manual.rstrip('.')}; then run `vizoo weights import NAME FILE`"
        raise ManualDownloadError(_explain(f"this file has to be fetched by hand{damage}", weights, path, advice))
    scheme = weights.url.split(":", 1)[0].lower()
    if scheme not in ("http", "https", "hf"):
        raise WeightsError(_explain(f"weights come by http, https or hf, not by {scheme!r}{damage}", weights, path))
    if _offline() and not on_hub(weights):  # the hub has a cache of its own, which also works offline
        advice = f"Unset VIZOO_OFFLINE and HF_HUB_OFFLINE, or {BY_HAND}"
        raise OfflineError(
            _explain(f"offline mode is on and the file is not in the cache{damage}", weights, path, advice)
        )


def _explain(problem: str, weights: Weights, path: Path, advice: str = "") -> str:
    source = f"url {weights.url}" if weights.url else f"repository {weights.repository}"
    return f"{problem} ({source}, cache file {path})" + (f". {advice}" if advice else "")


def _offline() -> bool:
    return _flag("VIZOO_OFFLINE") or _flag("HF_HUB_OFFLINE")


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


@contextmanager
def _locked(weights: Weights, path: Path) -> Iterator[None]:
    """Hold the lock of a file. The system drops the lock of a process that dies, so none can go stale."""
    from filelock import FileLock, Timeout  # comes with torch; only needed here

    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning("another process is busy with %s; waiting for it", path)
            lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout as error:
        problem = f"another process has been busy with the file for {LOCK_TIMEOUT:g} s"
        raise WeightsError(_explain(problem, weights, path, "Try again when it has finished")) from error
    except OSError as error:
        problem = f"cannot write to the cache ({error.strerror or error})"
        raise WeightsError(
            _explain(problem, weights, path, "Set VIZOO_HOME to a folder that you may write to")
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(weights: Weights, path: Path, leftover: Path) -> Iterator[None]:
    """Turn a disk that refuses into a clear error, and free what had been written."""
    try:
        yield
    except OSError as error:
        discard(leftover)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "no space left on the disk" if full else f"cannot write the file ({error.strerror or error})"
        advice = "Free some space or set VIZOO_HOME to a folder on another disk"
        raise DownloadError(_explain(problem, weights, path, advice)) from error
