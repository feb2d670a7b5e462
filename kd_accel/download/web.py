"""One image from the web: from public servers only, politely, and never more of it than allowed.

aiohttp, because it is maintained, comes with fsspec and datasets, counts connections per host, and asks our resolver
for every address: what a name resolves to is checked where the connection is made, not before (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import ssl
from collections import defaultdict

import aiohttp
from yarl import URL

from kd_accel.download_config import DownloadConfig

PATIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which another try makes sense
LONGEST_WAIT = 60.0  # seconds between two tries, whatever a server asks for
NO_TRAINING = {"noai", "noimageai", "noindex", "noimageindex"}  # X-Robots-Tag, as img2dataset obeys it
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Failure(Exception):
    """An image that cannot be had: `kind` for the table, the message for people."""

    def __init__(self, kind: str, message: str = "", *, wait: float | None = None):
        super().__init__(message or kind)
        self.kind = kind
        self.wait = wait  # seconds until another try may help; None: no use


class Web:
    """Fetches images; an async context."""

    def __init__(self, config: DownloadConfig):
        self._config = config
        self._next: defaultdict[str, float] = defaultdict(float)  # host -> when its next request may start

    async def __aenter__(self) -> Web:
        config = self._config
        connector = aiohttp.TCPConnector(
            limit=config.connections,
            limit_per_host=config.per_host,
            resolver=None if config.allow_private else _PublicResolver(),
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=config.timeout),
            headers={"User-Agent": config.user_agent, "Accept": "image/*"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> bytes:
        """What lies at `url`; raises Failure."""
        for left in reversed(range(self._config.tries)):
            try:
                return await self._follow(url)
            except Failure as failure:
                if failure.wait is None or not left:
                    raise
                await asyncio.sleep(failure.wait)
        raise AssertionError

    async def _follow(self, text: str) -> bytes:
        url = self._checked(text)
        for _ in range(self._config.max_redirects + 1):
            await self._turn(url.host)
            try:
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await self._read(response)
                    url = self._checked(response.headers.get("Location", ""), url)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _explained(error) from None
        raise Failure("too many redirects", f"more than {self._config.max_redirects}")

    def _checked(self, text: str, base: URL | None = None) -> URL:
        """Refuses what is no http, and addresses that no resolver is asked for."""
        try:
            url = base.join(URL(text)) if base else URL(text)
        except ValueError as error:
            raise Failure("no URL", str(error)) from None
        if url.scheme not in ("http", "https") or not url.host:
            raise Failure("no URL", f"not http or https: {text[:200]!r}")
        if not self._config.allow_private and _is_address(url.host) and not is_public(url.host):
            raise Failure("private address", url.host)
        return url

    async def _turn(self, host: str) -> None:
        now = asyncio.get_running_loop().time()
        start = max(now, self._next[host])
        self._next[host] = start + self._config.delay
        await asyncio.sleep(start - now)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self._config.max_bytes
        if response.status != 200:
            asked = response.headers.get("Retry-After", "")
            seconds = float(asked) if asked.isdecimal() else random.uniform(0.5, 2)
            wait = min(seconds, LONGEST_WAIT) if response.status in PATIENT else None
            raise Failure(f"HTTP {response.status}", response.reason or "", wait=wait)
        if said := NO_TRAINING & set(response.headers.get("X-Robots-Tag", "").lower().replace(",", " ").split()):
            raise Failure("not for training", f"X-Robots-Tag: {', '.join(sorted(said))}")
        body = bytearray()
        async for block in response.content.iter_chunked(2**16):  # unpacked: a compressed bomb counts with its size
            body += block
            if len(body) > limit:
                raise Failure("too large", f"more than {limit:,} bytes")
        return bytes(body)


class _PublicResolver(aiohttp.ThreadedResolver):
    """Names of public addresses only."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        found = await super().resolve(host, port, family)
        if private := [entry["host"] for entry in found if not is_public(entry["host"])]:
            raise Failure("private address", f"{host} is {private[0]}")
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and not by way of IPv6 one that is not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    tunnel = ip.version == 6 and (ip.sixtofour or ip.teredo or ip in _NAT64)
    return ip.is_global and not ip.is_multicast and not tunnel


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _explained(error: Exception) -> Failure:
    wait = random.uniform(0.5, 2)
    match error:
        case TimeoutError():
            return Failure("timeout", wait=wait)
        case aiohttp.ClientConnectorDNSError():
            return Failure("no such host", str(error))
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return Failure("TLS", str(error))
        case aiohttp.InvalidURL():
            return Failure("no URL", str(error))
    return Failure("connection", f"{type(error).__name__}: {error}", wait=wait)
