"""moto's S3 server, and what s3fs needs to use it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from tests.stores.process import HOST, free_port, running_at

_BUCKET = "slides"


@dataclass(frozen=True)
class Moto:
    """A server that runs, with one bucket."""

    url: str
    bucket: str = _BUCKET

    def storage_options(self, url: str | None = None) -> dict[str, Any]:
        """For s3fs; `url` is that of a proxy in front of the server."""
        return {"key": "a-key-of-tests", "secret": "a-secret-of-tests", "client_kwargs": self._place(url or self.url)}

    def upload(self, folder: Path) -> None:
        """All files of a folder, and of those in it."""
        client = boto3.client(
            "s3", aws_access_key_id="a-key-of-tests", aws_secret_access_key="a-secret-of-tests", **self._place(self.url)
        )
        client.create_bucket(Bucket=self.bucket)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(path), self.bucket, str(path.relative_to(folder)))

    def _place(self, url: str) -> dict[str, str]:
        return {"endpoint_url": url, "region_name": "us-east-1"}


@contextmanager
def moto() -> Iterator[Moto]:
    """Run moto's server, with nothing in it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    with running_at(port, command, stderr=subprocess.DEVNULL) as url:
        yield Moto(url)
