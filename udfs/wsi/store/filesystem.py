"""The fsspec filesystem of a URI, made in one place with the options that go to its store and to no other."""

from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from udfs.wsi.store.uris import StorageOptions, links_of, options_for

_HTTP = ("http", "https")


def filesystem(uri: str, storage_options: StorageOptions | None = None) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a path or URI, and the path in it. Raises what fsspec and the store's client raise."""
    if uri.startswith("/"):  # fsspec takes `::` in a path for a chain, too
        return fsspec.filesystem("file"), uri.rstrip("/") or "/"
    options = options_for(uri, storage_options)
    # Of fsspec's chains (simplecache::https://...) the first link gets the options, the others theirs by their protocol.
    for position, link in enumerate(links_of(uri)):
        protocol = link.partition("://")[0]
        if protocol in _HTTP and position == 0:
            options.setdefault("get_client", _http_session)
        elif protocol in _HTTP:
            options[protocol] = {"get_client": _http_session} | options.get(protocol, {})
    fs, path = url_to_fs(uri, **options)
    return fs, path


async def _http_session(**options: Any) -> Any:
    from udfs.wsi.store.http import session  # noqa: PLC0415  # aiohttp, which most runs do without

    return await session(**options)
