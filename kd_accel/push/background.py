"""Pushing checkpoints while training goes on: one process at a time, beside it, that cannot fail it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import get_token

from kd_accel.push_config import TrainHubConfig
from kd_accel.schema import ConfigError

log = logging.getLogger("kd_accel")

LOG = "hub.log"  # in the run: what the pushes say
WAIT_S = 1800  # for the last push, after the last step
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "GROUP_", "ROLE_")


class BackgroundPush:
    """Of the main rank; without a config nothing ever happens."""

    def __init__(self, config: TrainHubConfig | None, run: Path):
        """Raises ConfigError where there is no token: after the training it would be late."""
        self._config, self._log = config, run / LOG
        self._process: subprocess.Popen | None = None
        self._waiting: Path | None = None  # the newest checkpoint that is not pushed yet
        if config is not None and get_token() is None:
            raise ConfigError(
                "hub: no token for the HuggingFace Hub: set HF_TOKEN, log in with `hf auth login`, or drop it"
            )

    def checkpoint_written(self, checkpoint: Path) -> None:
        """Push it, now or when the push under way is done; with push=end at the end."""
        if self._config is None:
            return
        self._waiting = checkpoint
        if self._config.push == "every_checkpoint" and not self._is_pushing():
            self._start()

    def finish(self) -> None:
        """Push what is waiting, and wait for it."""
        if self._config is None:
            return
        while self._process is not None or self._waiting is not None:
            if self._process is None:
                self._start()
            try:
                self._process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning(
                    "hub: the last push takes more than %d s, and goes on without us: see %s", WAIT_S, self._log
                )
                return
            self._is_pushing()

    def _is_pushing(self) -> bool:
        """Whether a push is under way; what came of one that is over is said, once."""
        if self._process is None or self._process.poll() is None:
            return self._process is not None
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        if self._process.returncode:
            log.warning("hub: a push failed, and training is none the worse: %s", said)
        else:
            log.info("hub: %s", said)
        self._process = None
        return False

    def _start(self) -> None:
        checkpoint, self._waiting = self._waiting, None
        words = [f"repo={self._config.repo}", f"private={str(self._config.private).lower()}"]
        words += [] if self._config.license is None else [f"license={self._config.license}"]
        env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCH)}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kd_accel", "push", str(checkpoint), *words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the run's processes is none to the push
            )
