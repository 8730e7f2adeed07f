"""URIs and storage options: which filesystem they mean, which options go to which store, and what of both may be shown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NewType
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

StorageOptions = Mapping[str, Any]
StoreUri = NewType("StoreUri", str)
"""A path or URI as it is opened. It may hold secrets: messages and tables show `public_uri` of it."""
PublicUri = NewType("PublicUri", str)
"""A path or URI without secrets, fit for tables and messages, and not for opening."""

TIMEOUT_S = 180.0  # that a slide may wait for its store, by default
_SHORTEST_SECRET = 6  # characters; shorter texts are words of any text
_HTTP = ("http", "https")
_NETWORK_PROTOCOLS = ("http", "https", "ftp", "sftp")  # their @ follows a credential, not a container


class StoreOptions(dict[str, Any]):
    """Storage options for the store of URI `root` alone, if it is set.

    A slide may wait for its store for `timeout_s` seconds in all, plus one second per MB received.
    """

    def __init__(self, options: Mapping[str, Any], root: str | None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(options)
        self.root, self.timeout_s = root, timeout_s


def options_for(uri: str, options: StorageOptions | None) -> dict[str, Any]:
    """Returns the options for the store of a URI: none for a plain path, nor for another store than that of the options.

    az:// and abfss:// are one store. Options without a store (slides.root is a path, or not set) go to any.
    """
    root = options.root if isinstance(options, StoreOptions) else None
    if "://" not in uri or (root and "://" in root and store_of(root) != store_of(uri)):
        return {}
    return dict(options or {})


def timeout_of(options: StorageOptions | None) -> float:
    """Returns the seconds that a slide may wait for its store: see `StoreOptions`."""
    return options.timeout_s if isinstance(options, StoreOptions) else TIMEOUT_S


def links_of(uri: str) -> list[str]:
    """Returns the links of a chain of fsspec (``zip://a.svs::s3://bucket/b.zip``); a list of one if the URI is no chain.

    An absolute path is a path of this machine, whatever its folders and file are called.
    """
    return [uri] if uri.startswith("/") else uri.split("::")


def store_of(uri: str) -> str:
    """Returns the kind of store of a URI, the same for all protocols of one store."""
    protocol = links_of(uri)[-1].partition("://")[0]
    return str(known_implementations.get(protocol, {}).get("class", protocol))


def filesystem(uri: str, storage_options: StorageOptions | None = None) -> tuple[AbstractFileSystem, str]:
    """Returns the fsspec filesystem of a path or URI, and the path in it; raises what fsspec and the store's client raise."""
    if uri.startswith("/"):  # fsspec takes `::` in a path for a chain, too
        return fsspec.filesystem("file"), uri.rstrip("/") or "/"
    options = options_for(uri, storage_options)
    # In fsspec's chains (simplecache::https://...), the first link gets the options, the others get theirs by protocol.
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


def why_not_for_tables(uri: str) -> str | None:
    """Returns why Delta tables cannot lie at a path or URI; None if they can.

    Spark takes a path as it is, except for backticks. deltalake and polars read ``%41`` as ``A`` and a backslash as a slash.
    """
    odd = re.findall(r"%[0-9A-Fa-f]{2}|[\\`]", uri) or [letter for letter in uri if not letter.isprintable()]
    if odd:
        return f"{odd[0]!r} in a path is something else to some who read or write Delta tables"
    if "://" in uri and (end := re.search(r"[?#]", uri)):
        return f"the path of a URI ends at {end[0]!r}"
    if "://" in uri and ".." in uri.split("/"):
        return "'..' in a URI is not resolved by every reader"
    if scheme := re.match(r"\w+:/(?!/)", uri):
        return f"{scheme[0]!r} begins neither a path nor a URI"
    return None


def absolute_uri(uri: str) -> StoreUri:
    """Returns a plain path made absolute and without ``..``, for processes that run elsewhere; a URI as it is."""
    if "://" in uri:
        return StoreUri(uri)
    path = Path(uri)
    return StoreUri(str(path.resolve() if ".." in path.parts else path.absolute()))


def public_uri(uri: str) -> PublicUri:
    """Returns the URI without user, password, query and fragment; a plain path as it is, even with ``?`` in it."""
    if "://" not in uri:
        return PublicUri(uri)
    links = links_of(uri)
    if len(links) > 1:
        return PublicUri("::".join(public_uri(link) for link in links))
    try:
        parts = urlsplit(uri)
    except ValueError:  # a host in brackets that is no IPv6 address
        return PublicUri(f"{uri.partition('://')[0]}://***")
    # In abfss://container@account and the like, what precedes the @ is a container unless it holds a password.
    user, at, host = parts.netloc.rpartition("@")
    netloc = host if ":" in user or parts.scheme in _NETWORK_PROTOCOLS else f"{user}{at}{host}"
    return PublicUri(f"{parts.scheme}://{netloc}{parts.path}")  # urlunsplit would take the empty host out of hdfs:///x


def secrets_of(uri: str | None, storage_options: StorageOptions | None) -> tuple[str, ...]:
    """Returns every text in a URI or in storage options that must not be shown, longest first."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                collect(item)
        elif not isinstance(value, bool) and len(str(value)) >= _SHORTEST_SECRET:  # also numbers: passwords of digits
            found.add(str(value))

    collect(storage_options or {})
    of_options = [link for text in tuple(found) if "://" in text for link in links_of(text)]
    for link in [*links_of(uri or ""), *of_options]:
        if "://" not in link:
            continue
        try:
            parts = urlsplit(link)
        except ValueError:  # as in public_uri
            found.add(link.partition("://")[2])
            continue
        found.update(text for text in (parts.query, parts.fragment, parts.password or "") if text)
        found.update(text for text in re.split(r"[&=]", parts.query) if len(text) >= 16)
        if parts.scheme in _NETWORK_PROTOCOLS and len(parts.username or "") >= _SHORTEST_SECRET:
            found.add(str(parts.username))  # https://TOKEN@host
    found |= {unquote(text) for text in found}  # errors of HTTP clients show them decoded
    return tuple(sorted(found, key=len, reverse=True))


def redact(text: str, secrets: Sequence[str]) -> str:
    """Returns the text with ``***`` for every secret, and without the queries of URLs, which clients quote anew."""
    text = re.sub(r"(://[^\s'\"<>?#]*)[?#][^\s'\"<>)]*", r"\1", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
