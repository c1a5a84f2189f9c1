"""What can happen to a download: each failure has a clear error, leaves no bad file, and a second try succeeds."""

from __future__ import annotations

import hashlib
import io
import sys
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.weights import fetch, store
from vizoo.weights.errors import DownloadError, HashMismatchError, UnverifiedWeightsWarning, WeightsError
from vizoo.weights.record import Weights
from vizoo.weights.store import download, path_of, verify

Names = Callable[[Weights], set[str]]
Part = Callable[[Weights], Path]
DONE = {"model.pth", "model.pth.ok"}
PARTIAL = {"model.pth.part", "model.pth.part.json"}


def changed(data: bytes) -> bytes:
    """Another checkpoint, of the same length."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_downloads_once(server: Any, record: Weights, data: bytes, left_behind: Names) -> None:
    path = download(record)
    assert path == path_of(record)
    assert path.read_bytes() == data
    assert left_behind(record) == DONE
    assert download(record) == path
    assert len(server.requests) == 1
    assert verify(record).state == "verified"


def test_files_of_one_name_do_not_meet(server: Any, data: bytes, make_record: Any) -> None:
    other = changed(data)
    server.files |= {"/a/model.pth": data, "/b/model.pth": other}
    records = [
        make_record(f"{server.url}/{folder}/model.pth", sha256=hashlib.sha256(content).hexdigest())
        for folder, content in (("a", data), ("b", other))
    ]
    assert [download(each).read_bytes() for each in records] == [data, other]


def test_truncated_answers(server: Any, answer: Any, record: Weights, data: bytes, left_behind: Names) -> None:
    server.answers = [answer(cut=1000) for _ in range(fetch.ATTEMPTS)]
    with pytest.raises(DownloadError, match=rf"closed after 4000 of {len(data)} bytes; 4000 bytes are kept") as caught:
        download(record)
    assert record.url in str(caught.value)
    assert str(path_of(record)) in str(caught.value)
    assert "vizoo weights import NAME FILE" in str(caught.value)
    assert left_behind(record) == PARTIAL
    assert download(record).read_bytes() == data
    assert server.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-", "bytes=4000-"]
    assert left_behind(record) == DONE


def test_one_truncated_answer_is_resumed_unnoticed(server: Any, answer: Any, record: Weights, data: bytes) -> None:
    server.answers = [answer(cut=7000)]
    assert download(record).read_bytes() == data
    assert server.ranges == [None, "bytes=7000-"]


def test_stalling_server(server: Any, answer: Any, record: Weights, data: bytes, monkeypatch: Any) -> None:
    monkeypatch.setenv("VIZOO_TIMEOUT", "0.3")
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    server.answers = [answer(cut=1000, stall=True), answer(cut=0, stall=True)]
    with pytest.raises(DownloadError, match=r"nothing arrived for 0\.3 s; 1000 bytes are kept"):
        download(record)
    assert not path_of(record).exists()
    assert download(record).read_bytes() == data
    assert server.ranges[-1] == "bytes=1000-"


def test_missing_file(server: Any, record: Weights, data: bytes, left_behind: Names) -> None:
    del server.files["/v1/model.pth"]
    with pytest.raises(DownloadError, match=r"the server answered 404 Not Found \(url http.*model\.pth"):
        download(record)
    assert len(server.requests) == 1  # trying again would not help
    assert left_behind(record) == set()
    server.files["/v1/model.pth"] = data
    assert download(record).read_bytes() == data


def test_server_errors(server: Any, answer: Any, record: Weights, data: bytes, left_behind: Names) -> None:
    server.answers = [answer(status=500)] * fetch.ATTEMPTS
    with pytest.raises(DownloadError, match="failed 4 times, at last because the server answered 500"):
        download(record)
    assert left_behind(record) == set()
    server.answers = [answer(status=503)]  # one is survived
    assert download(record).read_bytes() == data


def test_server_error_in_between_keeps_the_part(server: Any, answer: Any, record: Weights, data: bytes) -> None:
    server.answers = [answer(cut=1000), answer(status=502)]
    assert download(record).read_bytes() == data
    assert server.ranges == [None, "bytes=1000-", "bytes=1000-"]


def test_nobody_listens(record: Weights, make_record: Any, server: Any) -> None:
    server.close()
    with pytest.raises(DownloadError, match="the connection failed"):
        download(record)


def test_wrong_file(server: Any, record: Weights, data: bytes, left_behind: Names) -> None:
    server.files["/v1/model.pth"] = changed(data)
    with pytest.raises(HashMismatchError, match=rf"not the published one: sha256 is .*expected {record.sha256}"):
        download(record)
    assert left_behind(record) == set()
    server.files["/v1/model.pth"] = data
    assert download(record).read_bytes() == data


def test_server_without_ranges(server: Any, answer: Any, record: Weights, data: bytes) -> None:
    server.answers = [answer(cut=1000), answer(ranges=False)]
    assert download(record).read_bytes() == data
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("if_range", [True, False])
def test_file_changes_between_attempts(server: Any, answer: Any, make_record: Any, data: bytes, if_range: bool) -> None:
    """Whether the server heeds If-Range or not, no mixture of two files comes out, even without a digest."""
    weights = make_record(f"{server.url}/m.pth")
    server.files["/m.pth"] = data
    server.answers = [answer(cut=1000), answer(status=404)]
    with pytest.raises(DownloadError, match="404"):
        download(weights)
    server.files["/m.pth"] = changed(data)
    server.answers = [answer(if_range=if_range)]
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights).read_bytes() == changed(data)
    assert server.ranges[2:] == (["bytes=1000-"] if if_range else ["bytes=1000-", None])


def test_file_gets_shorter_than_the_part(server: Any, answer: Any, make_record: Any, data: bytes) -> None:
    weights = make_record(f"{server.url}/m.pth")
    server.files["/m.pth"] = data + bytes(5000)
    server.answers = [answer(cut=len(data) + 10), answer(status=404)]
    with pytest.raises(DownloadError, match="404"):
        download(weights)
    server.files["/m.pth"] = data
    server.answers = [answer(if_range=False)]  # 416
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights).read_bytes() == data
    assert server.ranges[2:] == [f"bytes={len(data) + 10}-", None]


def test_without_validator_and_digest_nothing_is_resumed(
    server: Any, answer: Any, make_record: Any, data: bytes
) -> None:
    weights = make_record(f"{server.url}/m.pth")
    server.files["/m.pth"] = data
    server.answers = [answer(cut=1000, etag=False), answer(etag=False)]
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights).read_bytes() == data
    assert server.ranges == [None, None]


def test_last_modified_serves_where_the_etag_is_weak(server: Any, answer: Any, make_record: Any, data: bytes) -> None:
    weights = make_record(f"{server.url}/m.pth")
    server.files["/m.pth"] = data
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    headers = {"ETag": 'W/"1"', "Last-Modified": date}
    server.answers = [answer(cut=1000, headers=headers), answer(if_range=False, headers=headers)]
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights).read_bytes() == data
    assert server.requests[1][2]["If-Range"] == date


def test_complete_part_needs_no_request(server: Any, record: Weights, data: bytes, part_of: Part) -> None:
    """Killed between the last byte and the renaming."""
    download(record)
    path, part = path_of(record), part_of(record)
    path.rename(part)
    part.with_name(part.name + ".json").write_text(f'{{"validator": "x", "total": {len(data)}}}')
    assert download(record).read_bytes() == data
    assert len(server.requests) == 1


def test_garbled_notes_are_no_notes(server: Any, record: Weights, data: bytes, part_of: Part) -> None:
    part = part_of(record)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"from somewhere else")
    part.with_name(part.name + ".json").write_text("{")
    assert download(record).read_bytes() == data


def test_answer_without_length(server: Any, answer: Any, record: Weights, data: bytes) -> None:
    server.answers = [answer(length=False)]
    assert download(record).read_bytes() == data


def test_truncated_answer_without_length_and_digest(
    server: Any, answer: Any, make_record: Any, data: bytes, left_behind: Names
) -> None:
    weights = make_record(f"{server.url}/m.pth")
    server.files["/m.pth"] = data
    server.answers = [answer(length=False, cut=len(data) - 50)]
    with pytest.raises(DownloadError, match=r"what the server sent is no checkpoint: .* is truncated"):
        download(weights)
    assert left_behind(weights) == set()
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights).read_bytes() == data


def test_web_page_instead_of_the_file(
    server: Any, answer: Any, record: Weights, data: bytes, left_behind: Names
) -> None:
    server.answers = [answer(headers={"Content-Type": "text/html; charset=utf-8"})]
    with pytest.raises(DownloadError, match="sent a web page instead of the file; it may want a login"):
        download(record)
    assert left_behind(record) == set()
    assert download(record).read_bytes() == data


def test_web_page_under_a_false_name(server: Any, make_record: Any, left_behind: Names, data: bytes) -> None:
    weights = make_record(f"{server.url}/m.pth")
    server.files["/m.pth"] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match=r"no checkpoint: .* but a web page"):
        download(weights)
    assert left_behind(weights) == set()
    server.files["/m.pth"] = data
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights).read_bytes() == data


def test_compressed_answer_is_refused(server: Any, answer: Any, record: Weights, data: bytes) -> None:
    server.answers = [answer(headers={"Content-Encoding": "gzip"})]
    with pytest.raises(DownloadError, match="compressed by gzip"):
        download(record)
    assert download(record).read_bytes() == data


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_followed(server: Any, answer: Any, record: Weights, data: bytes, status: int) -> None:
    server.files["/mirror/x"] = data
    server.answers = [answer(status=status, headers={"Location": "/mirror/x"})]
    assert download(record).read_bytes() == data
    assert [path for _, path, _ in server.requests] == ["/v1/model.pth", "/mirror/x"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ftp://host.invalid/a", "redirects to ftp://host.invalid/a, and only http: or https: is followed"),
        ("file:///etc/hostname", "answered 302 .*file:///etc/hostname"),
    ],
)
def test_redirect_to_another_scheme_is_refused(
    server: Any, answer: Any, record: Weights, data: bytes, target: str, message: str
) -> None:
    server.answers = [answer(status=302, headers={"Location": target})]
    with pytest.raises(DownloadError, match=message):
        download(record)
    assert download(record).read_bytes() == data


def test_redirect_from_https_to_http_is_refused() -> None:
    request = urllib.request.Request("https://host.invalid/a")
    with pytest.raises(DownloadError, match="only https: is followed"):
        fetch._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", Message(), "http://host.invalid/b")


@pytest.mark.parametrize("url", ["ftp://host/m.pth", "file:///etc/m.pth", "model.pth"])
def test_other_schemes_are_refused(make_record: Any, url: str) -> None:
    with pytest.raises(WeightsError, match="weights come by http, https or hf, not by"):
        download(make_record(url))


def test_url_without_sense(make_record: Any, server: Any) -> None:
    with pytest.raises(DownloadError, match="the url is not valid"):
        download(make_record(f"{server.url}/a b.pth"))


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf", "nan"])
def test_impossible_timeout(record: Weights, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("VIZOO_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"VIZOO_TIMEOUT must be a positive number of seconds, got '{text}'"):
        download(record)


def test_disk_known_to_be_too_small(
    server: Any, answer: Any, record: Weights, data: bytes, monkeypatch: pytest.MonkeyPatch, left_behind: Names
) -> None:
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000})
        patch.setattr(fetch.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(DownloadError, match=f"no space left: {len(data)} more bytes are needed, 1000 are free"):
            download(record)
        assert "model.pth" not in left_behind(record)
    assert download(record).read_bytes() == data


def test_disk_fills_up(
    server: Any, record: Weights, data: bytes, monkeypatch: pytest.MonkeyPatch, left_behind: Names
) -> None:
    opened = Path.open

    class Full(io.BytesIO):
        def write(self, chunk: Any) -> int:
            raise OSError(28, "No space left on device")

    def open_on_full_disk(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full() if mode == "ab" else opened(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(DownloadError, match=r"no space left on the disk .*Free some space or set VIZOO_HOME"):
            download(record)
    assert left_behind(record) == set()
    assert download(record).read_bytes() == data


def test_progress_is_shown_on_a_terminal(server: Any, record: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    download(record)
    assert "model.pth" in terminal.getvalue()
    before = terminal.getvalue()
    download(record, force=True, progress=False)
    assert terminal.getvalue() == before


def test_progress_is_silent_elsewhere(record: Weights, capfd: pytest.CaptureFixture[str]) -> None:
    download(record)
    assert capfd.readouterr() == ("", "")


def test_force_keeps_the_good_file_until_the_new_one_is_there(server: Any, answer: Any, make_record: Any) -> None:
    weights = make_record(f"{server.url}/m.pth")
    old, new = (_checkpoint(value) for value in (0.0, 1.0))
    server.files["/m.pth"] = old
    with pytest.warns(UnverifiedWeightsWarning):
        download(weights)
    server.answers = [answer(status=403)]
    with pytest.raises(DownloadError, match="403"):
        download(weights, force=True)
    assert path_of(weights).read_bytes() == old
    server.files["/m.pth"] = new
    with pytest.warns(UnverifiedWeightsWarning):
        assert download(weights, force=True).read_bytes() == new


def test_change_at_the_source_is_told(server: Any, make_record: Any, caplog: pytest.LogCaptureFixture) -> None:
    weights = make_record(f"{server.url}/m.pth")
    for value in (0.0, 1.0):
        server.files["/m.pth"] = _checkpoint(value)
        with pytest.warns(UnverifiedWeightsWarning):
            download(weights, force=True)
    assert "changed at its source: sha256 was" in caplog.text


def test_another_process_is_busy_for_too_long(record: Weights, monkeypatch: Any, caplog: Any, data: bytes) -> None:
    from filelock import FileLock

    path = path_of(record)
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(store, "LOCK_TIMEOUT", 0.1)
    with (
        FileLock(path.with_name(path.name + ".lock")),
        pytest.raises(WeightsError, match=r"busy with the file for 0\.1"),
    ):
        download(record)
    assert "another process is busy with" in caplog.text
    assert download(record).read_bytes() == data


def test_cache_that_cannot_be_written(record: Weights, data: bytes, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"cannot write to the cache .*Set VIZOO_HOME to a folder"):
        download(record)
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path / "folder"))
    assert download(record).read_bytes() == data


def _checkpoint(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.full((3,), value)}}, buffer)
    return buffer.getvalue()
