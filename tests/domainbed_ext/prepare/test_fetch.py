"""Downloads, from a server on this machine that misbehaves as asked."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from torchvision.datasets import MNIST

from domainbed_ext.datasets import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare import fetch
from domainbed_ext.prepare.command import main
from domainbed_ext.prepare.downloads import DOWNLOADS, Download
from domainbed_ext.prepare.fetch import DownloadError, download
from tests.domainbed_ext.small_archives import PACS, TWO, know, tree, write_zip

CONTENT = bytes(range(256)) * 8000  # more than the library takes in at a time
QUESTION = """<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title><body>
<form id="download-form" action="https://drive.google.com/drive/download" method="get">
<input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="KEY"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a-b-c">
</form></body></html>""".replace("\n", "")  # one line, as Google writes it
QUOTA = "<html><title>Google Drive - Quota exceeded</title><p>Too many users have viewed this file recently."


class Handler(BaseHTTPRequestHandler):
    """/file, /cut/<n> (a response ends after n bytes), /busy (the first answer), /old (ignores ranges), ..."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        server.asked.append((url.path, self.headers.get("Range")))
        if url.path in server.pages:
            return self.reply(200, server.pages[url.path].encode(), "text/html; charset=utf-8")
        if url.path == "/drive/download":
            query = parse_qs(url.query)
            right = query.get("confirm") == ["t"] and query["uuid"] == ["a-b-c"] and "seen=1" in self.headers["Cookie"]
            return self.content(attached=True) if right else self.reply(403, b"", "text/plain")
        if url.path == "/missing":
            return self.reply(404, b"<html>not found</html>", "text/html")
        if url.path == "/busy" and len(server.asked) == 1:
            return self.reply(503, b"", "text/plain")
        return self.content(int(url.path.split("/")[2]) if url.path.startswith("/cut") else None, url.path == "/old")

    def content(self, cut=None, whole=False, attached=False):
        data, wanted = self.server.data, self.headers.get("Range")
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and not whole else 0
        if start >= len(data):
            return self.reply(416, b"", "text/plain", {"Content-Range": f"bytes */{len(data)}"})
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        ranged |= {"Content-Disposition": 'attachment; filename="x.zip"'} if attached else {}
        return self.reply(206 if start else 200, data[start:], "application/zip", ranged, cut)

    def reply(self, code, body, kind, headers=None, cut=None):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Set-Cookie": "seen=1"}.items():
            self.send_header(name, str(value))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSE", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.asked, server.pages = CONTENT, [], {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetched(server, path, tmp_path, **known):
    told = []
    download(Download("x.zip", (server.url + path,), **known), tmp_path / "x.zip", lambda *now: told.append(now))
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
    assert (tmp_path / "x.zip").read_bytes() == server.data
    return told


def test_a_download_tells_how_far_it_is(server, tmp_path):
    md5 = hashlib.md5(CONTENT).hexdigest()
    told = fetched(server, "/file", tmp_path, md5=md5, size=len(CONTENT))
    assert told and told[-1] == (len(CONTENT), len(CONTENT))
    fetched(server, "/file", tmp_path, md5="never looked at, for it is there")
    assert len(server.asked) == 1


def test_a_connection_that_is_cut_is_taken_up_again(server, tmp_path):
    told = fetched(server, "/cut/700000", tmp_path)
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, wanted in server.asked if wanted]
    assert len(starts) > 1 and starts == sorted(set(starts)) and starts[0] > 0
    assert {total for _, total in told} == {len(CONTENT)} and set(starts) <= {arrived for arrived, _ in told}


def write_part(server, tmp_path, content):
    """Leaves a part as a start that was interrupted does."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(Download("x.zip", (f"{server.url}/file",)), tmp_path / "x.zip", interrupt)
    (part,) = tmp_path.iterdir()
    part.write_bytes(content)
    server.asked.clear()


def test_a_second_start_resumes_where_the_first_was(server, tmp_path):
    write_part(server, tmp_path, CONTENT[:300])
    fetched(server, "/file", tmp_path)
    assert server.asked[-1] == ("/file", "bytes=300-")


def test_a_server_without_ranges_starts_again(server, tmp_path):
    write_part(server, tmp_path, b"else" * 100)
    fetched(server, "/old", tmp_path)


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_with_nothing_left_to_come_is_downloaded_again(server, tmp_path, more):
    write_part(server, tmp_path, CONTENT + more)
    fetched(server, "/file", tmp_path)


def test_a_busy_server_is_asked_again(server, tmp_path):
    fetched(server, "/busy", tmp_path)
    assert len(server.asked) == 2


def test_the_second_address_is_used_when_the_first_fails(server, tmp_path):
    source = Download("x.zip", (f"{server.url}/missing", f"{server.url}/file"))
    download(source, tmp_path / "x.zip", lambda *now: None)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


@pytest.fixture
def drive(server, monkeypatch):
    """The server stands for Google Drive."""
    get = requests.Session.get

    def get_here(session, url, **options):
        return get(session, url.replace("https://drive.google.com", server.url), **options)

    monkeypatch.setattr(requests.Session, "get", get_here)
    return server


def test_google_drives_question_is_answered(drive, tmp_path):
    drive.pages["/uc"] = QUESTION
    source = Download("x.zip", ("https://drive.google.com/uc?export=download&id=KEY",))
    download(source, tmp_path / "x.zip", lambda *now: None)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert [path for path, _ in drive.asked] == ["/uc", "/drive/download"]


def test_google_drives_refusal_has_a_reason(drive, tmp_path):
    drive.pages["/uc"] = QUOTA
    source = Download("x.zip", ("https://drive.google.com/uc?export=download&id=KEY",))
    with pytest.raises(DownloadError, match="downloaded too often today, or is not public"):
        download(source, tmp_path / "x.zip", lambda *now: None)


@pytest.mark.parametrize(
    ("path", "known", "reason"),
    [
        ("/missing", {}, "the server answers 404 Not Found"),
        ("/cut/0", {}, "cut again and again, 0 bytes are there: run the same command again to resume"),
        ("/page", {}, "a web page came instead of the file"),
        ("/file", {"md5": "0" * 32}, f"its MD5 is {hashlib.md5(CONTENT).hexdigest()} instead of 0+; what came is kept"),
        ("/file", {"size": 5}, f"it has {len(CONTENT):,} bytes instead of 5; what came is kept as .*x.zip.rejected"),
    ],
)
def test_what_cannot_be_had_has_a_reason(server, tmp_path, path, known, reason):
    server.pages["/page"] = "<html>log in</html>"
    with pytest.raises(DownloadError, match=reason):
        download(Download("x.zip", (server.url + path,), **known), tmp_path / "x.zip", lambda *now: None)
    assert not (tmp_path / "x.zip").exists()


def test_a_web_page_that_calls_itself_an_archive_is_found_out(server, tmp_path):
    server.data = b"<!DOCTYPE html><html>log in</html>"
    with pytest.raises(DownloadError, match="a web page came instead of the file"):
        download(Download("x.zip", (f"{server.url}/file",)), tmp_path / "x.zip", lambda *now: None)


def test_prepare_downloads_lays_out_and_verifies(server, tmp_path, monkeypatch, capfd):
    know(monkeypatch, "PACS", {domain: dict.fromkeys(TWO, 3) for domain in PACS})
    server.data = write_zip(tmp_path / "PACS.zip", tree(PACS, top="kfold/")).read_bytes()
    md5 = hashlib.md5(server.data).hexdigest()
    monkeypatch.setitem(DOWNLOADS, "PACS", (Download("PACS.zip", (f"{server.url}/file",), md5),))
    assert main(["PACS", "--data_dir", str(tmp_path / "data")]) == 0
    assert len(DATASETS["PACS"](tmp_path / "data", [0], {})[2]) == 6
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["PACS"]
    assert capfd.readouterr().err == ""  # no progress bar in a pipe


def test_a_dead_link_names_what_to_get_and_the_command_to_run_then(server, tmp_path, monkeypatch):
    monkeypatch.setitem(DOWNLOADS, "PACS", (Download("PACS.zip", (f"{server.url}/missing",), page="https://a.b/view"),))
    data = tmp_path / "my data"
    with pytest.raises(BenchmarkError) as caught:
        main(["PACS", "--data_dir", str(data)])
    assert str(caught.value) == (
        f"cannot download (the server answers 404 Not Found): get PACS.zip from https://a.b/view manually, then run: "
        f"python -m domainbed_ext.prepare PACS --data_dir '{data}' --archive PACS.zip"
    )
    assert list(data.iterdir()) == []


def test_what_is_given_and_what_came_is_not_fetched_again(server, tmp_path, monkeypatch):
    domains = DATASETS["DomainNet"].DOMAINS
    know(monkeypatch, "DomainNet", dict.fromkeys(domains, 6))
    names = [f"{domain}.zip" for domain in domains]
    gone = Download("sketch.zip", ("http://127.0.0.1:9/a/sketch.zip",))
    sources = [Download(name, (f"{server.url}/{name}",)) for name in names[1:-1]]
    monkeypatch.setitem(DOWNLOADS, "DomainNet", (Download("clipart.zip", ("http://127.0.0.1:9/x",)), gone, *sources))
    given = write_zip(tmp_path / "clipart.zip", tree(domains[:1]))
    server.data = write_zip(tmp_path / "all.zip", {}).read_bytes()
    with pytest.raises(BenchmarkError, match=r"no connection: .*get sketch.zip from http://127.0.0.1:9/a/ manually"):
        main(["DomainNet", "--data_dir", str(tmp_path), "--archive", str(given)])
    assert len(server.asked) == 4
    rest = write_zip(tmp_path / "sketch.zip", tree(domains[1:]))
    assert main(["DomainNet", "--data_dir", str(tmp_path), "--archive", str(given), str(rest)]) == 0
    assert len(server.asked) == 4


def test_files_of_mnist_are_torchvisions():
    assert [(each.name, each.md5) for each in DOWNLOADS["MNIST"]] == MNIST.resources
