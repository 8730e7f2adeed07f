"""Azurite, Microsoft's own Azure blob server for tests, and what adlfs needs to use it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from azure.storage.blob import BlobSasPermissions, BlobServiceClient, generate_blob_sas

from tests.stores.process import HOST, free_port, running_at

_PROGRAM = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
_ACCOUNT = "slidelake"
_KEY = "c2xpZGVsYWtlIHRlc3RzIG5lZWQgYSBrZXkgb2YgdGhlaXIgb3duLCBhbmQgdGhpcyBpcyBpdC4="  # made for these tests


@dataclass(frozen=True)
class Azurite:
    """A server that runs, with one account."""

    url: str

    def storage_options(self, url: str | None = None, key: str = _KEY) -> dict[str, Any]:
        """For adlfs; `url` is that of a proxy in front of the server."""
        return {"connection_string": self._connection_string(url or self.url, key)}

    def upload(self, folder: Path, container: str) -> None:
        """All files of a folder, and of those in it, into a new container."""
        with BlobServiceClient.from_connection_string(self._connection_string(self.url, _KEY)) as service:
            made = service.create_container(container)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                made.upload_blob(str(path.relative_to(folder)), path.read_bytes(), overwrite=True)

    def replace(self, container: str, name: str, content: bytes) -> None:
        """Upload one blob again."""
        with BlobServiceClient.from_connection_string(self._connection_string(self.url, _KEY)) as service:
            service.get_blob_client(container, name).upload_blob(content, overwrite=True)

    def signed(self, container: str, name: str, valid: timedelta) -> str:
        """The HTTP URL of a blob with a signature that lets anybody read it for a time, which may lie in the past."""
        expiry = datetime.now(UTC) + valid
        begin = expiry - timedelta(days=1)
        signature = generate_blob_sas(
            _ACCOUNT,
            container,
            name,
            account_key=_KEY,
            permission=BlobSasPermissions(read=True),
            start=begin,
            expiry=expiry,
        )
        return f"{self.url}/{_ACCOUNT}/{container}/{name}?{signature}"

    def _connection_string(self, url: str, key: str) -> str:
        return f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={key};BlobEndpoint={url}/{_ACCOUNT};"


@contextmanager
def azurite() -> Iterator[Azurite]:
    """Run Azurite, with nothing in it and nothing left behind."""
    port = free_port()
    quiet = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]
    command = [str(_PROGRAM), *quiet, "--blobHost", HOST, "--blobPort", str(port)]
    with running_at(port, command, env=os.environ | {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{_KEY}"}) as url:
        yield Azurite(url)
