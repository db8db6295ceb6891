"""A raster at a URL: read in ranges, only where it is needed."""

import multiprocessing
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.predict import predict_raster

SETTINGS = {"tile": 64, "overlap": 16, "block": 512}


class Bands(nn.Module):
    """Gives the bands as scores."""

    spec = DataSpec("fake", ("x", "y"), (ClassSpec("a", (1, 2, 3)), ClassSpec("b", (4, 5, 6))), (0.5,) * 2, (0.3,) * 2)

    def forward(self, image, valid):
        return image


class Ranges(BaseHTTPRequestHandler):
    """Serves the files of the server's `folder`, whole or the range that is asked for; counts bytes in its `sent`."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)) if asked else (0, len(data) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.server.sent.value += last + 1 - first
            self.wfile.write(data[first : last + 1])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """In a process of its own: GDAL may hold Python's lock while it waits for an answer."""
    context = multiprocessing.get_context("fork")
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as http:
        http.folder, http.sent = tmp_path, context.Value("q", 0)
        process = context.Process(target=http.serve_forever, daemon=True)
        process.start()
        yield http
        process.kill()
        process.join()


@pytest.mark.parametrize("prefix", ["", "/vsicurl/"])
def test_a_url_gives_the_bytes_of_the_file(server, write_tiff, tmp_path, prefix):
    values = np.random.default_rng(0).integers(1, 256, (2, 1000, 1100), dtype=np.uint8)
    path = write_tiff(tmp_path / "a.tif", values, tiled=True)
    url = f"{prefix}http://127.0.0.1:{server.server_port}/a.tif"
    predict_raster(Bands(), url, tmp_path / "part.tif", **SETTINGS, window=[0, 0, 100, 100])
    assert 0 < server.sent.value < 0.7 * path.stat().st_size
    predict_raster(Bands(), url, tmp_path / "remote.tif", **SETTINGS)
    predict_raster(Bands(), path, tmp_path / "local.tif", **SETTINGS)
    assert (tmp_path / "remote.tif").read_bytes() == (tmp_path / "local.tif").read_bytes()


def test_a_url_without_a_raster_is_one_line(server, tmp_path, capfd):
    (tmp_path / "text.tif").write_bytes(b"no raster")
    for name in ("missing.tif", "text.tif"):
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        with pytest.raises(UserError) as error:
            predict_raster(Bands(), url, tmp_path / "out" / "map.tif")
        assert "\n" not in str(error.value)
        assert url in str(error.value)
    assert not list((tmp_path / "out").glob("*"))
    assert capfd.readouterr().err == ""
