"""`hf://` urls go through huggingface_hub itself, against a hub of a few lines on loopback."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from vizoo.weights.errors import DownloadError, HashMismatchError, OfflineError
from vizoo.weights.fetch import split_hub_url
from vizoo.weights.record import Weights
from vizoo.weights.store import download, path_of, verify


@pytest.fixture
def hub(server: Any, answer: Any, data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that holds owner/name/sub/model.pth at the revision v1, and a cache of its own for huggingface_hub."""
    real = huggingface_hub.hf_hub_download
    calls: list[dict[str, Any]] = []

    def on_loopback(repository: str, filename: str, **options: Any) -> str:
        calls.append(options)
        headers = {"X-Repo-Commit": "0" * 40}
        server.answers = [answer(ranges=False, headers=headers) for _ in range(4)]
        return real(repository, filename, endpoint=server.url, cache_dir=tmp_path / "hub", token=False, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", on_loopback)
    server.files["/owner/name/resolve/v1/sub/model.pth"] = data
    server.calls = calls
    return server


@pytest.fixture
def record(make_record: Any, data: bytes) -> Weights:
    return make_record("hf://owner/name/sub/model.pth@v1", sha256=hashlib.sha256(data).hexdigest())


def test_hub_file_comes_into_our_cache(hub: Any, record: Weights, data: bytes) -> None:
    path = download(record)
    assert path == path_of(record)
    assert path.read_bytes() == data
    assert verify(record).state == "verified"
    count = len(hub.requests)
    assert count > 0
    assert download(record) == path
    assert len(hub.requests) == count


def test_wrong_file_on_the_hub(hub: Any, record: Weights, data: bytes, left_behind: Any) -> None:
    with pytest.raises(HashMismatchError, match="not the published one"):
        download(replace(record, sha256="0" * 64))
    assert [call["force_download"] for call in hub.calls] == [False, True]
    assert left_behind(record) == set()
    assert download(record).read_bytes() == data


def test_damaged_file_in_the_hubs_own_cache(hub: Any, record: Weights, data: bytes, tmp_path: Path) -> None:
    download(record).unlink()
    for blob in (tmp_path / "hub").glob("**/blobs/*"):
        blob.write_bytes(b"damaged")
    assert download(record).read_bytes() == data


def test_missing_on_the_hub(hub: Any, record: Weights, left_behind: Any) -> None:
    hub.files.clear()
    with pytest.raises(DownloadError, match=r"the Hugging Face hub failed: .*\(url hf://owner/name/sub/model\.pth@v1"):
        download(record)
    assert left_behind(record) == set()


def test_offline_hub_file(hub: Any, record: Weights, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    with pytest.raises(OfflineError, match="the Hugging Face hub failed"):
        download(record)
    assert hub.requests == []
    monkeypatch.delenv("VIZOO_OFFLINE")
    path = download(record)
    path.unlink()
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    count = len(hub.requests)
    assert download(record).read_bytes() == data  # from the hub's own cache
    assert len(hub.requests) == count


@pytest.mark.parametrize("url", ["hf://owner/model.pth", "hf://owner/name", "hf://a/b/c@", "hf:///b/c"])
def test_hub_url_of_another_form(url: str) -> None:
    with pytest.raises(DownloadError, match="must read hf://owner/repository/file@revision"):
        split_hub_url(url)


def test_parts_of_a_hub_url() -> None:
    assert split_hub_url("hf://o/n/a/b.bin@refs/pr/1") == ("o/n", "a/b.bin", "refs/pr/1")
    assert split_hub_url("hf://o/n/b.bin") == ("o/n", "b.bin", None)
