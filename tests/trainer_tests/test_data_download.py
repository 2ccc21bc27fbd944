"""Downloads against a server on the loopback, with the ways in which they go wrong."""

import hashlib
import http.server
import threading

import pytest

from db.errors import DataError
from trainer.data import download
from trainer.data.download import PUBLIC_DATASETS, PublicDataset, locate
from trainer.data.sources import FORMATS

CONTENT = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if self.path.endswith(".md5"):
            return self._send(200, server.md5.encode())
        begin = 0
        if (asked := self.headers.get("Range")) and server.ranges:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(CONTENT):
                return self._send(416, b"")
        body = CONTENT[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut] if server.cut else body)
        return None

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.cut, server.ranges = [], None, True
    server.md5 = f"MD5 (set.zip) = {hashlib.md5(CONTENT).hexdigest()}\n"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/set.zip"
    dataset = PublicDataset(
        source="movielens",
        file="set.zip",
        page="https://example.org/set",
        terms="research use",
        url=url,
        checksum_url=url + ".md5",
    )
    monkeypatch.setitem(PUBLIC_DATASETS, "set", dataset)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_checks_and_keeps_the_file(server, tmp_path):
    told = []
    path = locate("set", tmp_path / "raw", progress=lambda *numbers: told.append(numbers))
    assert path == tmp_path / "raw/set.zip"
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    server.requests.clear()
    assert locate("set", tmp_path / "raw") == path
    assert server.requests == []


def test_a_download_that_was_cut_off_goes_on(server, tmp_path):
    server.cut = 300_000
    with pytest.raises(DataError, match=r"cannot download .*set\.zip \(.*goes on where it stopped"):
        locate("set", tmp_path)
    assert not (tmp_path / "set.zip").exists()
    have = (tmp_path / "set.zip.partial").stat().st_size
    assert 0 < have < len(CONTENT)
    server.cut = None
    server.requests.clear()
    assert locate("set", tmp_path).read_bytes() == CONTENT
    assert server.requests[0] == ("/set.zip", f"bytes={have}-")
    assert not (tmp_path / "set.zip.partial").exists()


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "set.zip.partial").write_bytes(b"something else")
    assert locate("set", tmp_path).read_bytes() == CONTENT


def test_a_complete_partial_file_is_taken(server, tmp_path):
    (tmp_path / "set.zip.partial").write_bytes(CONTENT)
    assert locate("set", tmp_path).read_bytes() == CONTENT


def test_wrong_checksum_is_thrown_away(server, tmp_path):
    server.md5 = f"{'0' * 32}  set.zip\n"
    with pytest.raises(
        DataError, match=rf"its publisher states {'0' * 32}; the download was thrown"
    ):
        locate("set", tmp_path)
    assert not list(tmp_path.iterdir())


def test_offline_says_what_to_fetch_and_where_to_put_it(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError) as error:
        locate("set", tmp_path)
    assert f"fetch set.zip from https://example.org/set and put it at {tmp_path}" in str(
        error.value
    )


def test_without_a_direct_address(tmp_path):
    with pytest.raises(DataError, match=r"zvuk has no direct download; fetch zvuk-interactions"):
        locate("zvuk", tmp_path)
    (tmp_path / "zvuk-interactions.parquet").touch()
    assert locate("zvuk", tmp_path).name == "zvuk-interactions.parquet"


def test_every_public_dataset_has_a_known_format_page_and_terms():
    for name, dataset in PUBLIC_DATASETS.items():
        assert dataset.source in FORMATS, name
        assert dataset.page.startswith("http"), name
        assert dataset.terms, name
    assert download.PUBLIC_DATASETS["ml-20m"].rating_above == 3.0
