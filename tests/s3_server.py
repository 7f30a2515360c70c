"""A local S3 server with one empty bucket, `s3://bucket`, for the tests of object storage."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@contextmanager
def s3_bucket(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """Serve the bucket, to this process and those it starts; files that are fetched go to `cache`.

    Yields what is undone at the end. Skips the test where s3fs or moto is not installed.
    """
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs, of the extra s3")
    moto = pytest.importorskip("moto.server", reason="needs moto, of the extra dev")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    # all servers of a process share what is in them
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("SAESCOPE_CACHE", str(cache))
        for key in KEYS:
            patch.setenv(key, "test")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield patch
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
