"""Generators go on where they were."""

from __future__ import annotations

import random

import numpy as np
import torch

from kd_accel.random_state import random_state, set_random_state


def test_random_state_round_trip():
    """torch, numpy and Python go on with the same numbers, also in the middle of a pair of Gaussians."""

    def draw() -> tuple:
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            random.random(),
            np.random.randn(),
            random.gauss(0, 1),
        )

    np.random.randn(), random.gauss(0, 1)  # each keeps the second of a pair for the next call
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first
