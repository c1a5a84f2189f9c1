"""Where checkpoint files lie, and whether they still are what was downloaded.

A mark beside each file (`.ok`) keeps its size, time of change and digest, so that it is hashed again only when it
changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from .errors import CheckpointError
from .fetch import split_hub_url
from .reader import check_file
from .record import Weights

logger = logging.getLogger("vizoo.weights")


@dataclass(frozen=True)
class Verification:
    """What the cache holds for a record.

    Attributes:
        path: Where the file is, or would be.
        state: `verified` by the published digest; `unverified`, where none is published but the file is still the one
            that was downloaded; `damaged`; or `missing`.
        sha256: Digest of the file; None when it is missing.
        detail: One sentence for people.
    """

    path: Path
    state: Literal["verified", "unverified", "damaged", "missing"]
    sha256: str | None
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the file may be used."""
        return self.state in ("verified", "unverified")


def cache_dir() -> Path:
    """Folder of everything that vizoo keeps: `VIZOO_HOME`, else `vizoo` in the folder of torch.hub."""
    home = os.environ.get("VIZOO_HOME")
    return Path(home).expanduser() if home else Path(torch.hub.get_dir()) / "vizoo"


def path_of(weights: Weights) -> Path:
    """Where the cache keeps a file, whether it is there or not. Each url has a folder of its own."""
    origin = weights.url or f"{weights.repository} {weights.manual}"
    folder = hashlib.sha256(origin.encode()).hexdigest()[:12]
    name = split_hub_url(weights.url)[1].split("/")[-1] if on_hub(weights) else weights.filename
    return cache_dir() / "weights" / folder / (re.sub(r"[^\w.-]", "_", name)[-100:].lstrip(".") or "checkpoint")


def is_cached(weights: Weights) -> bool:
    """Whether the cache holds the file, unchanged since it was checked. Reads only the mark, not the file."""
    path = path_of(weights)
    mark = Mark.read(path)
    return mark is not None and mark.fits(path) and weights.sha256 in (None, mark.source)


def verify(weights: Weights) -> Verification:
    """Hash the cached file, whatever its mark says. Changes nothing."""
    return examine(weights, path_of(weights), rehash=True)


@dataclass(frozen=True)
class Mark:
    """What was true of a file when it was checked.

    `source` is the digest of the published file, which differs from that of the cached one after a trusted conversion.
    """

    size: int
    mtime_ns: int
    sha256: str
    source: str
    license_accepted: bool = False

    @staticmethod
    def place(path: Path) -> Path:
        """Where the mark of a file lies."""
        return path.with_name(path.name + ".ok")

    @classmethod
    def read(cls, path: Path) -> Mark | None:
        """The mark of a file; None where there is none that can be read."""
        try:
            return cls(**json.loads(cls.place(path).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the mark of a file in one step."""
        place = self.place(path)
        fresh = place.with_name(f"{place.name}.{os.getpid()}")
        fresh.write_text(json.dumps(asdict(self)))
        os.replace(fresh, place)

    def fits(self, path: Path) -> bool:
        """Whether the file still has the size and time of change that it was marked with."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


def examine(weights: Weights, path: Path, *, rehash: bool = False) -> Verification:
    """Compare a file with its mark and with the record; hash it only if it changed, or on request."""
    if not path.is_file():
        return Verification(path, "missing", None, f"{path} is not there")
    mark = Mark.read(path)
    digest = mark.sha256 if mark and mark.fits(path) and not rehash else digest_of(path)
    if digest == weights.sha256:
        return Verification(path, "verified", digest, "its sha256 is the published one")
    if mark and digest != mark.sha256:
        return Verification(
            path, "damaged", digest, f"it changed since it was checked: sha256 {digest}, was {mark.sha256}"
        )
    if weights.sha256 is None:
        return _examine_unpublished(path, digest, marked=mark is not None)
    if mark and mark.source == weights.sha256:
        return Verification(path, "verified", digest, "it was converted from the file with the published sha256")
    return Verification(path, "damaged", digest, f"its sha256 is {digest}, the published one is {weights.sha256}")


def _examine_unpublished(path: Path, digest: str, *, marked: bool) -> Verification:
    """Without a published digest, a file that nobody has checked must at least be a checkpoint."""
    try:
        if not marked:
            check_file(path)
    except CheckpointError as error:
        return Verification(path, "damaged", digest, str(error))
    return Verification(path, "unverified", digest, f"no sha256 is published; that of the file is {digest}")


def ready(weights: Weights, path: Path, accepted: bool) -> bool:
    """Whether the cached file may be used. Renews its mark, with `accepted` added to it."""
    found = examine(weights, path)
    if not found.ok or found.sha256 is None:
        return False
    mark = Mark.read(path)
    if mark is None or not mark.fits(path) or (accepted and not mark.license_accepted):
        source = mark.source if mark and mark.sha256 == found.sha256 else found.sha256
        remember(path, found.sha256, source, accepted or (mark is not None and mark.license_accepted))
    return True


def remember(path: Path, sha256: str, source: str, accepted: bool) -> None:
    """Mark a file as checked."""
    stat = path.stat()
    try:
        Mark(stat.st_size, stat.st_mtime_ns, sha256, source, accepted).write(path)
    except OSError as error:  # a shared cache may be read-only, and no mark only costs time
        logger.info("cannot write the mark of %s: %s", path, error)


def on_hub(weights: Weights) -> bool:
    """Whether the Hugging Face hub holds the file."""
    return weights.url.startswith("hf://")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
