"""What can be told of a remote file's URL alone. Imports nothing that talks to a server."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

_REMOTE = re.compile(r"(https?|s3a?|hf|gs|gcs|az|abfs)://[^/]")


def is_remote(entry: str) -> bool:
    """Whether `entry` is a URL to be fetched, not a path."""
    return _REMOTE.match(entry) is not None


def beside(url: str, name: str) -> str:
    """The URL of the file `name` in the folder of `url`; a query (an access token) is kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def file_name(url: str) -> str:
    """The last part of the path."""
    return urlsplit(url).path.rpartition("/")[2]


def shown(url: str) -> str:
    """`url` for people and logs: without password and query, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
