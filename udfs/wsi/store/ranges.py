"""One range of a file by the client of its store, checked against the headers of the answer."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from udfs.wsi.store.faults import NoRangesError, ShortReadError, WrongAnswerError

_CONTENT_RANGE = re.compile(r"bytes[ =](\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)
_AZURE_TIMEOUTS = ("timeout", "connection_timeout", "read_timeout")  # options of adlfs


class Part(NamedTuple):
    """Bytes of a file, and what the headers of the store's answer give; None if they do not."""

    data: bytes
    size_bytes: int | None = None  # of the whole file
    etag: str | None = None


async def bring_range(fs: Any, path: str, start: int, count: int) -> Part:
    """Requests the bytes [start, start + count), at least one, of a file in an asynchronous fsspec filesystem.

    Raises NoRangesError, WrongAnswerError, ShortReadError and what the store's client raises.
    """
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "https" in protocols:
        return await _http(fs, path, start, count)
    if "abfs" in protocols:
        return await _azure(fs, path, start, count)
    return Part(await fs._cat_file(path, start=start, end=start + count))


def check_range(headers: Mapping[str, str], wanted: str) -> int | None:
    """Returns the size of the whole file by the headers of an answer of status 206; None if they do not give it.

    Raises WrongAnswerError unless the answer holds the range `wanted` (bytes=FIRST-LAST), as far as the file has it, and
    nothing else, not encoded.
    """
    if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
        raise WrongAnswerError(f"its server sent {wanted} encoded as {encoding}")
    sent = headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(sent.strip())
    size = int(match[3]) if match and match[3] != "*" else None
    first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
    end = last if size is None else min(last, size - 1)  # a range ends with the file at the latest
    if not match or (int(match[1]), int(match[2])) != (first, end):
        raise WrongAnswerError(f"its server sent {sent or headers.get('Content-Type')!r} for {wanted}")
    return size


def strong_etag(etag: Any) -> str | None:
    """Returns an ETag without its quotes; None if it is weak: weak ones say nothing about single bytes (RFC 9110, 8.8.1)."""
    return None if not etag or str(etag).startswith("W/") else str(etag).strip('"')


async def _http(fs: Any, url: str, start: int, count: int) -> Part:
    wanted = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    options = fs.kwargs | {"headers": fs.kwargs.get("headers", {}) | wanted}
    session = await fs.set_session()  # which refuses a wrong range: see `udfs.wsi.store.http`
    async with session.get(fs.encode_url(url), **options) as answer:
        answer.raise_for_status()
        if answer.status == 206:
            size = check_range(answer.headers, wanted["Range"])
        elif start == 0 and answer.content_length == count:
            size = count
        else:
            raise NoRangesError("its server ignores byte ranges")
        try:
            data = await answer.content.readexactly(count)
        except asyncio.IncompleteReadError as error:
            raise ShortReadError(f"{len(error.partial):,} of {count:,} bytes arrived") from None
        return Part(data + await answer.content.read(1), size, strong_etag(answer.headers.get("ETag")))


async def _azure(fs: Any, path: str, start: int, count: int) -> Part:
    container, blob, version = fs.split_path(path)
    options = {name: fs.storage_options[name] for name in _AZURE_TIMEOUTS if name in fs.storage_options}
    answers: list[Any] = []
    # without the client's own retries, the first of which waits for 15 s
    options |= {"version_id": version, "retry_total": 0, "raw_response_hook": answers.append}
    async with fs.service_client.get_blob_client(container=container, blob=blob) as client:
        data = await (await client.download_blob(offset=start, length=count, **options)).readall()
    size = etag = None
    for answer in answers:
        if answer.http_response.status_code == 206:
            headers = answer.http_response.headers
            size = check_range(headers, answer.http_request.headers["x-ms-range"])
            etag = strong_etag(headers.get("ETag"))
    return Part(data, size, etag)
