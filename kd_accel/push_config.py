"""The schemas of `kd-accel push` and of training's section `hub`; import no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kd_accel.schema import Schema

REPO = r"^[\w][\w.\-]*(/[\w][\w.\-]*)?$"


class HubConfig(Schema):
    """Where on the HuggingFace Hub a student goes. The token is that of HF_TOKEN or of `hf auth login`."""

    repo: str = Field(pattern=REPO)
    """OWNER/NAME, or NAME for the owner of the token; made when it is not there."""
    private: bool = True
    """Of a repository that is made; one that is there stays as it is."""
    license: str | None = None
    """Of the weights, in the Hub's words (mit, apache-2.0), for the card of a run or checkpoint."""


class PushConfig(HubConfig):
    """kd-accel push FOLDER repo=NAME: a release, as export writes it, or the newest checkpoint of a run, on the Hub."""

    positional: ClassVar[str] = "model"
    model: str
    """A folder that export wrote, with all that is in it; or a run or checkpoint, of which the release is pushed."""
    tag: str | None = None
    """A name of this version, besides main; null: step-1000 for a checkpoint of step 1000, else none."""
    retries: int = Field(6, ge=0)
    """Attempts after one that failed for the network or the server; the pauses double."""
    pause_s: float = Field(1, ge=0)
    """Seconds before the first retry."""


class TrainHubConfig(HubConfig):
    """Pushing while a run trains: by a process of its own, which cannot fail the run."""

    push: Literal["end", "every_checkpoint"] = "end"
    """end: the last checkpoint. every_checkpoint: each; of those that are written during a push, the newest."""
