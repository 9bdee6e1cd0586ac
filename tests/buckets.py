"""An object store of this machine's own, for checkpoints that are not on its disks."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving() -> Iterator[str]:
    """The address of a folder in an object store that answers over HTTP as S3 does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}
    try:
        yield _bucket(f"127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
            del os.environ[name]


def _bucket(address: str) -> str:
    request = urllib.request.Request(f"http://{address}/bucket", method="PUT")
    for _ in range(600):
        try:
            urllib.request.urlopen(request).close()
            return f"s3://bucket/folder?scheme=http&endpoint_override={address}&region=us-east-1"
        except OSError:
            time.sleep(0.1)
    raise AssertionError("expected an object store that answers")
