"""A client of clip-retrieval's knn-service: prompts in, addresses of pictures out. The service is the user's own."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from kd_accel.filter_config import ServiceConfig
from kd_accel.schema import ConfigError
from kd_accel.text_files import replace_text

log = logging.getLogger(__name__)

FILE = "urls.tsv"
COLUMNS = ("url", "caption", "similarity", "prompt")


def search(service: ServiceConfig, prompts: list[str], folder: Path) -> None:
    """Write folder/urls.tsv, with a header, for kd-accel download: each url once, under the first prompt that finds it.

    A prompt whose request fails to the end is left out and counted. Raises ConfigError where every one fails.
    """
    found: dict[str, list[str]] = {}
    failures: list[str] = []
    with httpx.Client(timeout=service.timeout_s) as client:
        for prompt in tqdm(prompts, desc="search", unit="prompt", disable=None):
            try:
                results = _ask(client, service, prompt)
            except (httpx.HTTPError, ValueError) as error:
                failures.append(f"{prompt!r}: {type(error).__name__}: {error}")
                continue
            for result in results:
                values = [result.get(key) for key in COLUMNS[:-1]]
                row = ["" if value is None else " ".join(str(value).split()) for value in values]
                found.setdefault(row[0], [*row, prompt])
    if len(failures) == len(prompts):
        raise ConfigError(f"service.url={service.url}: no prompt got an answer; the first: {failures[0]}")
    replace_text(folder / FILE, "".join("\t".join(row) + "\n" for row in (COLUMNS, *found.values())))
    print(f"{len(found):,} urls for {len(prompts) - len(failures):,} of {len(prompts):,} prompts: {folder / FILE}")
    if failures:
        log.warning("%d prompts got no answer, the first: %s", len(failures), failures[0])


def _ask(client: httpx.Client, service: ServiceConfig, prompt: str) -> list[dict[str, Any]]:
    """The service's results; raises httpx.HTTPError or ValueError after the last try."""
    for attempt in range(service.retries + 1):
        try:
            answer = client.post(service.url, json=_question(service, prompt))
            answer.raise_for_status()
            results = answer.json()
            if not isinstance(results, list):
                raise ValueError(f"expected a list of results, got {str(results)[:80]}")
            return [result for result in results if isinstance(result, dict) and result.get("url")]
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if attempt == service.retries or (refused and error.response.status_code != 429):
                raise
            time.sleep(2**attempt)
    raise AssertionError("the last try returns or raises")


def _question(service: ServiceConfig, prompt: str) -> dict[str, Any]:
    """What clip-retrieval's own client asks."""
    return {
        "text": prompt,
        "image": None,
        "image_url": None,
        "embedding_input": None,
        "modality": "image",
        "num_images": service.num_images,
        "indice_name": service.index_name,
        "num_result_ids": service.num_result_ids,
        "use_mclip": False,
        "deduplicate": True,
        "use_safety_model": True,
        "use_violence_detector": True,
        "aesthetic_score": "",
        "aesthetic_weight": "0.5",
    }
