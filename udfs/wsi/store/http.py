"""The HTTP client for fsspec: sends no credential to another origin, and accepts no answer for another range."""

import re
from typing import Any

import aiohttp
from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, DummyCookieJar
from yarl import URL

from udfs.wsi.store.ranges import check_range

_CLOSED_RANGE = re.compile(r"bytes=\d+-\d+")
_REDIRECTS = (301, 302, 303, 307, 308)
_KEPT = ("Accept", "Accept-Encoding", "Range", "User-Agent")  # headers without which another origin cannot answer


async def session(**options: Any) -> aiohttp.ClientSession:
    """Returns a session for fsspec; `options` are those of `aiohttp.ClientSession`.

    If a redirect leads to another origin, aiohttp drops the header Authorization, but keeps tokens in headers of other
    names, cookies from the options, and `auth`. Here, a session without any of them follows such a redirect.
    """

    async def follow(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        answer = await handler(request)
        location = answer.headers.get("Location")
        if answer.status not in _REDIRECTS or not location:
            return answer
        target = request.url.join(URL(location))
        if not target.absolute or target.origin() == request.url.origin():
            return answer
        answer.release()
        return await bare.request(
            request.method,
            target,
            headers={name: request.headers[name] for name in _KEPT if name in request.headers},
            ssl=request.ssl,
            proxy=request.proxy,
            proxy_auth=request.proxy_auth,
        )

    middlewares = (*options.pop("middlewares", ()), follow, _refuse_wrong_ranges)
    own = aiohttp.ClientSession(**options, middlewares=middlewares)
    bare = aiohttp.ClientSession(
        connector=own.connector,
        connector_owner=False,  # closed with the other session
        cookie_jar=DummyCookieJar(),
        timeout=own.timeout,
        trust_env=own.trust_env,
        middlewares=(_refuse_wrong_ranges,),
    )
    return own


async def _refuse_wrong_ranges(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    answer = await handler(request)
    # fsspec makes other requests only if it can use whatever the server sends
    wanted = request.headers.get("Range", "")
    if answer.status == 206 and request.method == "GET" and _CLOSED_RANGE.fullmatch(wanted):
        try:
            check_range(answer.headers, wanted)
        except BaseException:
            answer.close()
            raise
    return answer
