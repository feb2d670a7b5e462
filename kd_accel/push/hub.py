"""A folder on the HuggingFace Hub: repository, upload, tag; all of it retried, none of it with a token in sight."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter is its HTTP client's: no answer at all

from kd_accel.push_config import PushConfig
from kd_accel.schema import ConfigError, one_line

log = logging.getLogger("kd_accel")

PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # of the server's answers those that may be others next time
REFUSED = {401, 403}
LONGEST_PAUSE_S = 120

T = TypeVar("T")


def upload(folder: Path, config: PushConfig, *, tag: str | None, message: str) -> str:
    """Upload all of `folder` as one commit, and return its address; files that are there already are not sent again.

    Raises ConfigError, in one line and without the token, when there is no token, when the Hub refuses it, and when
    the retries are used up.
    """
    token = get_token()
    if token is None:
        raise ConfigError("no token for the HuggingFace Hub: set HF_TOKEN, or log in with `hf auth login`")
    if re.fullmatch(r"[!-~]+", token) is None:  # the HTTP client would print it, escaped, where it complains
        raise ConfigError("the token for the HuggingFace Hub has a character that no token has: set HF_TOKEN anew")
    api = HfApi(token=token)

    def retried(what: str, act: Callable[[], T]) -> T:
        return _retried(what, act, retries=config.retries, pause_s=config.pause_s, token=token)

    made = retried("create_repo", lambda: api.create_repo(config.repo, private=config.private, exist_ok=True))
    repo = made.repo_id
    send = {"repo_id": repo, "folder_path": folder, "commit_message": message}
    commit = retried("upload", lambda: api.upload_folder(**send))
    if tag is not None:
        retried("tag", lambda: api.create_tag(repo, tag=tag, revision=commit.oid, exist_ok=True))
    return f"{made.url}, commit {commit.oid[:8]}" + (f", tag {tag}" if tag else "")


def _retried(what: str, act: Callable[[], T], *, retries: int, pause_s: float, token: str) -> T:
    left, pause = retries, pause_s
    while True:
        try:
            return act()
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            reason = _one_line(error, token)
            if status in REFUSED:
                raise ConfigError(f"the Hub refuses the token for this ({what}): {reason}") from None
            if status is not None and status not in PASSING:
                raise ConfigError(f"the Hub does not do it ({what}): {reason}") from None
            if not left:
                raise ConfigError(f"the Hub is not reached ({what}, {retries + 1} attempts): {reason}") from None
        log.warning("%s failed (%s); again in %.3g s", what, reason, pause)
        time.sleep(pause)
        left, pause = left - 1, min(2 * pause, LONGEST_PAUSE_S)


def _one_line(error: Exception, token: str) -> str:
    """What happened, without the token that some library may have put into it."""
    return one_line(error, limit=10_000).replace(token, "***")[:300]
