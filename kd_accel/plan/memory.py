"""Bytes of one process by ZeRO stage (arXiv 1910.02054, sec. 3): what is replicated, what is shared out.

Stage 0 is one process or DDP. P trained weights, W processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_accel.launch import BUCKET

STAGES = (0, 1, 2, 3)
MAX_LIVE = 1_000_000_000  # elements: its max_live_parameters and max_reuse_distance of ZeRO-3
FP32 = 4


@dataclass(frozen=True)
class Weights:
    """Numbers of weights."""

    trained: int
    frozen: int  # of the student
    teachers: int  # prepared with the student, which ZeRO-3 shares out
    beside: int  # bytes of teachers outside of the engine


@dataclass(frozen=True)
class Memory:
    """Bytes of one process when it needs most."""

    weights: int
    teachers: int
    gradients: int
    optimizer: int  # masters, moments, moving average
    buckets: int  # for communication
    activations: int  # of student and teachers; or what the step needs, if that is more
    objective: int  # what it needs beyond that, and its memory by sample id

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Peaks:
    """Bytes at most, of a micro-batch's activations and what comes with them."""

    towers: int  # in forward and backward passes; of stage 0 with the gradients
    objective: int  # while the losses are computed
    by_id: int  # what the objective remembers, all the time


def memory(stage: int, weights: Weights, peaks: Peaks, *, world_size: int, bf16: bool, has_average: bool) -> Memory:
    """What a process needs under a ZeRO stage."""
    low = 2 if bf16 and stage else FP32
    own, trained = low * (weights.trained + weights.frozen), weights.trained
    teachers = (2 if bf16 else FP32) * weights.teachers
    average = FP32 * has_average * trained
    if stage == 0:
        gradients = FP32 * trained
        buckets = gradients if world_size > 1 else 0  # DDP's copy
        state = own, teachers + weights.beside, gradients, 8 * trained + average, buckets
        return Memory(*state, peaks.towers - gradients, _beyond(peaks, peaks.towers))
    gradients, buckets = low * trained // (1 if stage == 1 else world_size), low * min(trained, BUCKET)
    optimizer = (12 * trained + average) // world_size
    if stage == 3:
        gathered = min(own + teachers, low * MAX_LIVE) if world_size > 1 else 0
        own, teachers, buckets = own // world_size, teachers // world_size, buckets + gathered
    activations = max(peaks.towers, FP32 * trained // world_size)  # the step's gradients in fp32
    state = own, teachers + weights.beside, gradients, optimizer, buckets
    return Memory(*state, activations, _beyond(peaks, activations))


def _beyond(peaks: Peaks, activations: int) -> int:
    return max(0, peaks.objective - activations) + peaks.by_id


def network_bytes(stage: int, weights: Weights, *, world_size: int, bf16: bool, features: int) -> int:
    """What one process sends in a step, by ring algorithms.

    features   bytes of a global batch's features that are compared across processes
    """
    share = (world_size - 1) / world_size
    low = 2 if bf16 and stage else FP32
    moved = 2 * low * weights.trained  # gradients reduced, then gradients (DDP) or weights (ZeRO) gathered
    if stage == 3:
        teachers = (2 if bf16 else FP32) * weights.teachers
        moved = low * weights.trained * 3 + low * weights.frozen * 2 + teachers
    return round(share * (moved + 3 * features))  # features gathered, their gradients summed


def checkpoint_bytes(trained: int, frozen: int, *, has_average: bool) -> int:
    """fp32: weights and moments to go on from, and the release; the moving average is both too."""
    whole = trained + frozen
    return 4 * (2 * whole + 2 * trained + has_average * (trained + whole))
