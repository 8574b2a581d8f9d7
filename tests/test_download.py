"""Downloads: done once, continued after a break, checked; each failure has a message that says what to do."""

import contextlib
import functools
import hashlib
import http.server
import os
import random
import threading

import pytest

from data.download import download
from minidpo.settings import UserError


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` and honours Range; with `break_after` it sends only so many of the bytes it announced."""

    content, break_after, ranges, requests = b"", None, True, None

    def do_GET(self):
        start = 0
        self.requests.append(self.headers.get("Range"))
        if self.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = self.content[start:]
        if start and not body:  # as servers do
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.break_after])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(content, **settings):
    handler = type("Handler", (Server,), {"content": content, "requests": [], **settings})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.tar.gz", handler
        server.shutdown()


@pytest.fixture
def content():
    return random.Random(0).randbytes(300_000)


@pytest.fixture
def fetch(tmp_path, content, monkeypatch):
    """fetch(url): calls `download` to tmp_path/a.gz with the digest of `content`."""
    monkeypatch.setenv("no_proxy", "*")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return functools.partial(download, target=tmp_path / "a.gz", digest=digest, otherwise="pass --archive FILE")


def test_download_once(tmp_path, content, fetch):
    with serving(content) as (url, server):
        assert fetch(url) == tmp_path / "a.gz"
        assert (tmp_path / "a.gz").read_bytes() == content
        fetch(url)
        assert server.requests == [None], "a correct file is not downloaded again"


def test_a_wrong_file_is_downloaded_again(tmp_path, content, fetch):
    (tmp_path / "a.gz").write_bytes(b"something else")
    with serving(content) as (url, _):
        fetch(url)
    assert (tmp_path / "a.gz").read_bytes() == content


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_download_is_continued(tmp_path, content, fetch, ranges):
    with serving(content, break_after=100_000, ranges=ranges) as (url, server):
        with pytest.raises(UserError, match="100,000 of 300,000 bytes.*again to continue"):
            fetch(url)
        assert not (tmp_path / "a.gz").exists()
        server.break_after = None
        fetch(url)
    assert server.requests == [None, "bytes=100000-"]
    assert (tmp_path / "a.gz").read_bytes() == content
    assert os.listdir(tmp_path) == ["a.gz"]


def test_complete_but_not_renamed(tmp_path, content, fetch):
    (tmp_path / "a.gz.part").write_bytes(content)
    with serving(content) as (url, server):
        fetch(url)
        assert server.requests == []
    assert os.listdir(tmp_path) == ["a.gz"]


@pytest.mark.parametrize("name", ["md5", "sha256"])
def test_wrong_digest_is_reported_and_the_file_deleted(tmp_path, content, fetch, name):
    digest = f"{name}:{hashlib.new(name, content).hexdigest()}"
    with serving(b"x" + content[1:]) as (url, _):
        with pytest.raises(UserError, match=digest):
            fetch(url, digest=digest)
    assert os.listdir(tmp_path) == []


def test_a_part_file_that_is_too_long_is_discarded(tmp_path, content, fetch):
    (tmp_path / "a.gz.part").write_bytes(content + b"more")
    with serving(content) as (url, _):
        with pytest.raises(UserError, match="416.*again"):
            fetch(url)
        fetch(url)
    assert (tmp_path / "a.gz").read_bytes() == content


def test_without_a_digest_the_length_counts(tmp_path, content, fetch):
    with serving(content, break_after=100_000) as (url, server):
        with pytest.raises(UserError, match="100,000 of 300,000 bytes"):
            fetch(url, digest="")
        server.break_after = None
        fetch(url, digest="")
        fetch(url, digest="")
    assert server.requests == [None, "bytes=100000-"]
    assert (tmp_path / "a.gz").read_bytes() == content


def test_no_server(fetch):
    with serving(b"") as (url, _):
        pass
    with pytest.raises(UserError, match="--archive FILE"):
        fetch(url)
