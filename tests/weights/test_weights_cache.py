"""What lies in the cache: damage, offline use, licences, files brought by hand."""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.weights import cache, store
from vizoo.weights.errors import (
    CheckpointError,
    DownloadError,
    HashMismatchError,
    LicenseError,
    ManualDownloadError,
    OfflineError,
    UnsafeCheckpointError,
    UnverifiedWeightsWarning,
)
from vizoo.weights.reader import read_state_dict
from vizoo.weights.record import NOT_STATED, Weights
from vizoo.weights.store import cache_dir, download, import_file, is_cached, path_of, verify

Names = Callable[[Weights], set[str]]


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(1, 1))  # a clock too coarse to see the change must not decide the test


@pytest.fixture
def unpublished(server: Any, data: bytes, make_record: Any) -> Weights:
    server.files["/u.pth"] = data
    return make_record(f"{server.url}/u.pth")


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "fetched by hand.pth"
    path.write_bytes(data)
    return path


@pytest.fixture
def manual(make_record: Any, data: bytes) -> Weights:
    page = "fetch swin.pth from https://host.invalid/page"
    return make_record("", manual=page, sha256=hashlib.sha256(data).hexdigest())


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIZOO_HOME", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("VIZOO_HOME")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "hub" / "vizoo"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/a/swin.pth", "swin.pth"),
        ("https://h/a/swin.pth?download=1", "swin.pth"),
        ("https://h/a%20b.pth", "a_20b.pth"),
        ("https://h/a/..", "checkpoint"),
        ("https://h/", "checkpoint"),
        ("hf://owner/name/sub/model.safetensors@refs/pr/1", "model.safetensors"),
        ("hf://owner/name/model.safetensors", "model.safetensors"),
    ],
)
def test_names_in_the_cache(make_record: Any, url: str, name: str) -> None:
    path = path_of(make_record(url))
    assert path.name == name
    assert path.parent.parent == cache_dir() / "weights"


def test_urls_and_hand_fetched_files_have_folders_of_their_own(make_record: Any) -> None:
    records = [make_record(f"https://h/{x}/m.pth") for x in "ab"]
    records += [make_record("", manual=f"fetch {x}") for x in "ab"]
    records += [make_record("hf://o/n/m.pth@v1"), make_record("hf://o/n/m.pth@v2")]
    assert len({path_of(each) for each in records}) == len(records)


def test_states(server: Any, record: Weights) -> None:
    assert verify(record).state == "missing"
    assert not verify(record).ok
    assert not is_cached(record)
    path = download(record)
    assert verify(record).state == "verified"
    assert verify(record).sha256 == record.sha256
    assert is_cached(record)
    flip_last_byte(path)
    assert verify(record).state == "damaged"
    assert "it changed since it was checked" in verify(record).detail
    assert not is_cached(record)
    assert path.exists()  # looking changes nothing


@pytest.mark.parametrize("harm", [flip_last_byte, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_damaged_file_is_fetched_again(server: Any, record: Weights, data: bytes, harm: Any, caplog: Any) -> None:
    harm(download(record))
    assert download(record).read_bytes() == data
    assert len(server.requests) == 2
    assert "removed the damaged file" in caplog.text


def test_unchanged_file_is_not_hashed_again(record: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download(record)
    monkeypatch.setattr(cache, "digest_of", lambda path: pytest.fail("hashed an unchanged file"))
    assert download(record) == path


def test_touched_file_is_hashed_once(record: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download(record)
    os.utime(path, ns=(1, 1))
    assert not is_cached(record)
    assert download(record) == path
    assert is_cached(record)


def test_file_put_there_without_a_mark_is_adopted(server: Any, record: Weights, data: bytes) -> None:
    path = path_of(record)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert download(record) == path
    assert is_cached(record)
    assert server.requests == []


def test_mark_that_cannot_be_written_only_costs_time(record: Weights, data: bytes, monkeypatch: Any) -> None:
    def refuse(self: object, path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.Mark, "write", refuse)
    assert download(record).read_bytes() == data
    assert download(record).read_bytes() == data


def test_garbled_mark_is_no_mark(server: Any, record: Weights) -> None:
    path = download(record)
    cache.Mark.place(path).write_text("[]")
    assert download(record) == path
    assert len(server.requests) == 1


def test_new_digest_of_a_record_fetches_the_new_file(server: Any, record: Weights, data: bytes) -> None:
    download(record)
    new = data + b"\0"
    server.files["/v1/model.pth"] = new
    assert download(replace(record, sha256=hashlib.sha256(new).hexdigest())).read_bytes() == new


def test_unverified_file_says_so_and_remembers_its_digest(unpublished: Weights, data: bytes) -> None:
    with pytest.warns(UnverifiedWeightsWarning, match=r"u\.pth is unverified: no sha256 is published for http"):
        path = download(unpublished)
    found = verify(unpublished)
    assert (found.state, found.sha256) == ("unverified", hashlib.sha256(data).hexdigest())
    assert json.loads(cache.Mark.place(path).read_text())["sha256"] == found.sha256


def test_later_change_of_an_unverified_file_is_noticed(server: Any, unpublished: Weights, data: bytes) -> None:
    with pytest.warns(UnverifiedWeightsWarning):
        flip_last_byte(download(unpublished))
    assert verify(unpublished).state == "damaged"
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(unpublished).read_bytes() == data
    assert len(server.requests) == 2


def test_unmarked_and_unreadable_file_is_damaged(unpublished: Weights) -> None:
    path = path_of(unpublished)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 half a file")
    assert verify(unpublished).state == "damaged"
    assert "truncated" in verify(unpublished).detail


@pytest.mark.parametrize("switch", ["VIZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server: Any, record: Weights, data: bytes, monkeypatch: Any, switch: str, left_behind: Names) -> None:
    monkeypatch.setenv(switch, "1")
    with pytest.raises(OfflineError, match=r"offline mode is on .*not in the cache \(url http.*Unset VIZOO_OFFLINE"):
        download(record)
    assert server.requests == []
    monkeypatch.setenv(switch, "0")
    path = download(record)
    monkeypatch.setenv(switch, "1")
    assert download(record) == path
    flip_last_byte(path)
    with pytest.raises(OfflineError, match="the cached file was damaged and has been removed"):
        download(record)
    assert left_behind(record) == set()
    monkeypatch.delenv(switch)
    assert download(record).read_bytes() == data
    assert len(server.requests) == 2


def test_unstated_licence_needs_consent_once(server: Any, record: Weights) -> None:
    record = replace(record, license=NOT_STATED)
    with pytest.raises(LicenseError, match=r"owner/name states no licence .*pass accept_license=True or set VIZOO_ACC"):
        download(record)
    assert server.requests == []
    download(record, accept_license=True)
    download(record)
    os.utime(path_of(record), ns=(1, 1))  # renews the mark
    download(record)
    download(record, force=True)
    download(record)
    assert len(server.requests) == 2


def test_consent_by_environment_is_not_remembered(record: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(record, license=NOT_STATED)
    monkeypatch.setenv("VIZOO_ACCEPT_UNSTATED_LICENSES", "1")
    download(record)
    monkeypatch.delenv("VIZOO_ACCEPT_UNSTATED_LICENSES")
    with pytest.raises(LicenseError, match="explicit consent"):
        download(record)
    download(record, accept_license=True)
    download(record)


def test_file_to_be_fetched_by_hand(manual: Weights, file: Path, data: bytes, left_behind: Names) -> None:
    with pytest.raises(
        ManualDownloadError, match=r"fetch swin\.pth from https://host\.invalid/page; then run `vizoo wei"
    ):
        download(manual)
    path = import_file(manual, file)
    assert path.read_bytes() == data
    assert file.exists()
    assert left_behind(manual) == {path.name, path.name + ".ok"}
    assert download(manual) == path
    assert verify(manual).state == "verified"


def test_url_that_only_people_may_fetch(server: Any, record: Weights, file: Path) -> None:
    record = replace(record, manual="log in and fetch it")
    with pytest.raises(ManualDownloadError, match=r"by hand \(url http.*log in and fetch it; then run"):
        download(record)
    assert server.requests == []
    path = import_file(record, file)
    assert download(record) == path


def test_import_for_a_url(server: Any, record: Weights, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    assert import_file(record, file) == download(record)
    assert server.requests == []


def test_import_of_a_missing_file(manual: Weights, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file to import at .*absent"):
        import_file(manual, tmp_path / "absent.pth")


def test_import_of_the_wrong_file(manual: Weights, file: Path, left_behind: Names) -> None:
    flip_last_byte(file)
    with pytest.raises(HashMismatchError, match=r"by hand\.pth is not the published file: sha256 is"):
        import_file(manual, file)
    assert left_behind(manual) == set()
    flip_last_byte(file)
    assert import_file(manual, file).exists()


@pytest.mark.parametrize(
    ("contents", "message"), [(b"<html>", "but a web page"), (b"PK\x03\x04...", "truncated"), (b"", "is empty")]
)
def test_import_of_no_checkpoint(
    unpublished: Weights, file: Path, contents: bytes, message: str, left_behind: Names
) -> None:
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message):
        import_file(unpublished, file)
    assert left_behind(unpublished) == set()


def test_import_lacking_the_container(unpublished: Weights, file: Path, left_behind: Names) -> None:
    with pytest.raises(CheckpointError, match="no container 'network'"):
        import_file(replace(unpublished, container="network"), file)
    assert left_behind(unpublished) == set()


def test_import_with_a_check_of_the_callers_own(unpublished: Weights, file: Path, left_behind: Names) -> None:
    seen: list[bytes] = []

    def refuse(copy: Path) -> None:
        seen.append(copy.read_bytes())
        raise ValueError("not what I want")

    with pytest.raises(ValueError, match="not what I want"):
        import_file(unpublished, file, check=refuse)
    assert seen == [file.read_bytes()]
    assert left_behind(unpublished) == set()
    assert import_file(unpublished, file, check=lambda copy: seen.append(copy.read_bytes())).exists()
    assert len(seen) == 2


def test_import_needs_the_same_consent(manual: Weights, file: Path) -> None:
    manual = replace(manual, license=NOT_STATED)
    with pytest.raises(LicenseError, match="explicit consent"):
        import_file(manual, file)
    import_file(manual, file, accept_license=True)
    assert download(manual).exists()


def test_import_onto_a_full_disk(manual: Weights, file: Path, monkeypatch: Any, left_behind: Names) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "copyfile", full)
        with pytest.raises(DownloadError, match="no space left on the disk"):
            import_file(manual, file)
    assert left_behind(manual) == set()
    assert import_file(manual, file).exists()


def test_trusted_import_is_explicit(unpublished: Weights, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    odd = tmp_path / "odd.pth"
    torch.save({"model": state, "odd": types.SimpleNamespace(a=1)}, odd)
    published = replace(unpublished, sha256=hashlib.sha256(odd.read_bytes()).hexdigest())
    with pytest.raises(UnsafeCheckpointError, match=r"types\.SimpleNamespace.*--trust"):
        import_file(published, odd)
    path = import_file(published, odd, trust=True)
    assert read_state_dict(path, "model").keys() == state.keys()
    found = verify(published)
    assert (found.state, found.detail) == ("verified", "it was converted from the file with the published sha256")
    assert is_cached(published)
    os.utime(path, ns=(1, 1))
    assert download(published) == path
    assert verify(published).ok
    flip_last_byte(path)
    assert verify(published).state == "damaged"
