"""What can go wrong with weights. Every message says what happened, to which url and file, and what to do about it."""

from __future__ import annotations


class WeightsError(RuntimeError):
    """Base of everything that this package raises about a checkpoint, except a local file that does not exist."""


class DownloadError(WeightsError):
    """The network, the server or the disk did not let the file through."""


class OfflineError(WeightsError):
    """Offline mode is on and the cache does not hold the file."""


class ManualDownloadError(WeightsError):
    """The host forbids scripted download; a person has to fetch the file and import it."""


class LicenseError(WeightsError):
    """The weights state no licence and nobody has accepted that."""


class HashMismatchError(WeightsError):
    """The bytes are not those of the published file."""


class CheckpointError(WeightsError):
    """The file cannot be read as a checkpoint, or lacks the part asked for."""


class UnsafeCheckpointError(CheckpointError):
    """The file asks for code to be run while it is read; none was."""


class UnverifiedWeightsWarning(UserWarning):
    """The publisher gives no digest, so nothing proves that the file is the published one."""
