"""The schema of kd-accel download. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kd_accel import __version__
from kd_accel.schema import Schema


class DownloadConfig(Schema):
    """kd-accel download URLS out=FOLDER: fetch the images of a list into indexed shards; run it again to go on."""

    positional: ClassVar[str] = "urls"
    urls: str
    """A .tsv or .csv with a URL and perhaps a caption per row, or any other file with a URL per line.

    Columns are found by a header (url, caption), else by what looks like a URL, as in CC3M and CC12M."""
    out: str
    """Folder of the shards: KEY.jpg, KEY.txt (the caption), KEY.json (URL, size, SHA-256), and failures.jsonl."""
    url: str = "url"
    """Header of the column of URLs."""
    caption: str = "caption"
    """Header of the column of captions."""
    rows_per_shard: int = Field(10_000, gt=0)
    """Rows of the list per shard, those that fail included: what is done when all of them are is a shard."""
    short_side: int | None = Field(None, gt=0)
    """Pixels of the shorter side, to which larger images are reduced, as JPEG; null keeps all as they came."""
    quality: int = Field(90, ge=1, le=100)
    """Of the JPEGs that are written."""
    connections: int = Field(64, gt=0)
    """Requests at a time."""
    per_host: int = Field(2, gt=0)
    """Requests at a time to one server."""
    delay: float = Field(0.0, ge=0)
    """Seconds between the starts of two requests to one server."""
    timeout: float = Field(20.0, gt=0)
    """Seconds that one request may take."""
    tries: int = Field(2, gt=0)
    """Requests for an image whose server does not answer, or asks for patience."""
    max_bytes: int = Field(20_000_000, gt=0)
    """Of an image; what is larger is given up as soon as that shows."""
    max_redirects: int = Field(5, ge=0)
    """Of one image."""
    user_agent: str = f"kd-accel/{__version__}"
    """What servers are told; name yourself, with an address for complaints."""
    allow_private: bool = False
    """Also fetch from loopback and private addresses: only for lists that you wrote yourself."""
