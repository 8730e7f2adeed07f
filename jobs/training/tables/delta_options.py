"""Storage options of fsspec in the words of deltalake, for the one table that is written without Spark."""

from collections.abc import Mapping
from typing import Any

from udfs.wsi.store import StorageOptions, options_for

_AZURE = {"account_name": "account_name", "account_key": "account_key", "sas_token": "sas_token"}
_AZURE |= {"tenant_id": "tenant_id", "client_id": "client_id", "client_secret": "client_secret"}
_CONNECTION = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_token"}
_S3 = {"key": "aws_access_key_id", "secret": "aws_secret_access_key", "token": "aws_session_token"}
_S3 |= {"endpoint_url": "aws_endpoint_url", "region_name": "aws_region"}
_GCS = {"token": "google_service_account"}
_WORDS = {"az": _AZURE, "abfs": _AZURE, "abfss": _AZURE, "adl": _AZURE, "s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS}


def delta_options(uri: str, storage_options: StorageOptions | None) -> dict[str, str]:
    """For deltalake. What has no word there is left out: deltalake then asks the environment, as fsspec does."""
    given = options_for(uri, storage_options)
    words = _WORDS.get(uri.partition("://")[0], {})
    options = _translated(given, words)
    if words is _S3:
        options |= _translated(given.get("client_kwargs") or {}, words)
    if words is _AZURE and "connection_string" in given:
        parts = dict(part.split("=", 1) for part in str(given["connection_string"]).split(";") if "=" in part)
        options |= _translated(parts, _CONNECTION)
        if "BlobEndpoint" in parts:
            options["azure_storage_endpoint"] = parts["BlobEndpoint"]
    if any(value.startswith("http://") for value in options.values()):
        options["allow_http"] = "true"
    return options


def _translated(given: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, str]:
    return {words[name]: str(value) for name, value in given.items() if name in words and value is not None}
