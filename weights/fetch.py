"""Bringing one url into a partial file: resume, bounded retries, time limits. Knows nothing of the cache.

The standard library's urllib does the talking. Ranges, validators and retries have to be written by hand on top of any
client, so another dependency would buy nothing; and urllib honours the usual proxy variables.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from .errors import DownloadError

CHUNK = 1 << 20  # bytes
ATTEMPTS = 4
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30.0  # seconds without a connection or without a byte; VIZOO_TIMEOUT overrides
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may go away by themselves

Report = Callable[[int, int | None], None]
"""Called with the bytes present and the bytes in all, which is None where the server does not say."""


def fetch(url: str, part: Path, *, anchored: bool, report: Report) -> None:
    """Download `url` into `part`, going on where an earlier call stopped.

    A part that cannot be trusted to be the start of the present file is thrown away. Whatever fails, `part` holds a
    true beginning of the file, or does not exist.

    Args:
        url: An http or https url.
        part: The partial file. What is known of it stands beside it, under the same name and `.json`.
        anchored: Whether the digest of the whole file is known, so that parts of two files would be noticed.
        report: Told about progress.

    Raises:
        DownloadError: If the server refuses, or keeps failing.
        OSError: If the disk refuses.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF * 2 ** (attempt - 1))
        try:
            return _attempt(url, part, anchored, report)
        except _TransientError as error:
            problem = error
    kept = _size(part)
    resume = f"; {kept} bytes are kept, and the next try goes on from there" if kept else ""
    raise DownloadError(f"download failed {ATTEMPTS} times, at last because {problem}{resume}") from problem


def fetch_from_hub(url: str, part: Path, *, offline: bool, force: bool) -> None:
    """Let huggingface_hub bring `hf://owner/repository/file@revision`, then puts the file at `part`.

    Raises:
        DownloadError: If the hub refuses.
        OSError: If the disk refuses.
    """
    from huggingface_hub import hf_hub_download  # takes a while to import

    repository, filename, revision = split_hub_url(url)
    try:
        source = hf_hub_download(
            repository, filename, revision=revision, force_download=force, local_files_only=offline
        )
    except Exception as error:  # it raises errors of its HTTP client too, which changed between its versions
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DownloadError(f"the Hugging Face hub failed: {str(error).strip().splitlines()[0]}") from error
    discard(part)
    try:
        os.link(os.path.realpath(source), part)  # no second copy on the disk
    except OSError:
        shutil.copyfile(source, part)


def split_hub_url(url: str) -> tuple[str, str, str | None]:
    """Repository, file and revision of an `hf://owner/repository/file@revision` url.

    Raises:
        DownloadError: If the url has another form.
    """
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)/([^@]+)(?:@(.+))?", url)
    if match is None:
        raise DownloadError(f"a hub url must read hf://owner/repository/file@revision, got {url!r}")
    return match[1], match[2], match[3]


def discard(part: Path) -> None:
    """Remove a partial file and what is known of it."""
    part.unlink(missing_ok=True)
    _notes_of(part).unlink(missing_ok=True)


class _TransientError(Exception):
    """Worth another attempt; the message ends the sentence 'failed because ...'."""


@dataclass(frozen=True)
class _Notes:
    """What the server said about the file whose beginning a part holds."""

    validator: str | None = None
    total: int | None = None

    @classmethod
    def read(cls, part: Path) -> _Notes:
        try:
            return cls(**json.loads(_notes_of(part).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, part: Path) -> None:
        _notes_of(part).write_text(json.dumps(asdict(self)))


def _attempt(url: str, part: Path, anchored: bool, report: Report) -> None:
    notes = _Notes.read(part)
    if not anchored and notes.validator is None:
        discard(part)  # nothing would tell whether the file has changed in between
        notes = _Notes()
    have = _size(part)
    if have and have == notes.total:
        return
    with _request(url, part, have, notes) as response:
        if response.status == 206:
            _check_range(response.headers, part, have, notes)
        else:  # the whole file, from its start
            discard(part)
            have, notes = 0, _Notes(_validator(response.headers), _length(response.headers))
            notes.write(part)
        _check_space(part, have, notes.total)
        _receive(response, part, have, notes.total, report)


def _request(url: str, part: Path, have: int, notes: _Notes) -> Any:
    """Open the url from byte `have` on, and refuse what cannot be a checkpoint."""
    headers = {"User-Agent": "vizoo", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if notes.validator is not None:
            headers["If-Range"] = notes.validator  # a changed file is then sent whole
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part is longer than the file, so it is not its beginning
            discard(part)
        if error.code in TRANSIENT or (error.code == 416 and have):
            raise _TransientError(f"the server answered {error.code} {error.reason}") from error
        raise DownloadError(f"the server answered {error.code} {error.reason}") from error
    except http.client.InvalidURL as error:
        raise DownloadError(f"the url is not valid: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _network_error(error) from error
    try:
        _check_kind(response.headers)
    except DownloadError:
        response.close()
        raise
    return response


def _network_error(error: Exception) -> Exception:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"the server's certificate is not valid: {reason.verify_message}")
    if isinstance(reason, TimeoutError):
        return _TransientError(f"nothing arrived for {timeout():g} s")
    return _TransientError(f"the connection failed ({reason})")


def _check_kind(headers: Message) -> None:
    if headers.get_content_type() == "text/html":
        raise DownloadError("the server sent a web page instead of the file; it may want a login or a confirmation")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(
            f"the server sent the file compressed by {headers['Content-Encoding']}, which was not asked"
        )


def _check_range(headers: Message, part: Path, have: int, notes: _Notes) -> None:
    """Some servers ignore If-Range, or answer another range than the one asked for."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    total = None if match is None or match[2] == "*" else int(match[2])
    same_start = match is not None and int(match[1]) == have
    same_file = total == notes.total and _validator(headers) in (None, notes.validator)
    if not (same_start and same_file):
        discard(part)
        raise _TransientError("the file changed on the server since the first part was fetched")


def _check_space(part: Path, have: int, total: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and free < total - have:
        raise DownloadError(f"no space left: {total - have} more bytes are needed, {free} are free")


def _receive(response: Any, part: Path, have: int, total: int | None, report: Report) -> None:
    """Append the body to the part."""
    with part.open("ab") as file:
        report(have, total)
        while total is None or have < total:
            try:
                # One read of the socket at a time, so that a stall loses nothing that had arrived.
                chunk = response.read1(CHUNK if total is None else min(CHUNK, total - have))
            except (OSError, http.client.HTTPException) as error:
                raise _network_error(error) from error
            if not chunk:
                break
            file.write(chunk)
            file.flush()  # what has arrived survives this process
            have += len(chunk)
            report(have, total)
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise _TransientError(f"the connection closed after {have} of {total} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https:",) if req.full_url.startswith("https:") else ("http:", "https:")
        if not newurl.startswith(allowed):
            raise DownloadError(
                f"the server redirects to {newurl}, and only {' or '.join(allowed)} is followed from here"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_308(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        return self.http_error_302(req, fp, 307, msg, headers)  # Python 3.10 does not know 308, which means the same


def _opener() -> urllib.request.OpenerDirector:
    """Without urllib's handlers for files, FTP and data urls."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def timeout() -> float:
    """Seconds to wait for a connection, and for each further byte.

    Raises:
        ValueError: If VIZOO_TIMEOUT is not a positive number.
    """
    text = os.environ.get("VIZOO_TIMEOUT", "").strip()
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"VIZOO_TIMEOUT must be a positive number of seconds, got {text!r}")
    return seconds


def _validator(headers: Message) -> str | None:
    """What identifies this version of the file. A weak ETag does not: it allows other bytes of the same meaning."""
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _length(headers: Message) -> int | None:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _notes_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")
