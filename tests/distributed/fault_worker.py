"""kd-accel with a fault put in on the last rank alone.

FAULT=nan fault_worker.py train ...      nan in the gradients of step 3, in the features of step 5
FAULT=hanging fault_worker.py train ...  it stops for good before the engine's fourth step, the others wait inside it
FAULT=bug fault_worker.py train ...      an error that nobody expects, there
"""

import dataclasses
import os
import signal

from kd_accel import cli, distributed
from kd_accel.engine import Engine
from kd_accel.objective import Objective

forward, step = Objective.forward, Engine.step
steps_begun = 0


def is_last() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def broken_forward(self, student, teachers, progress, **given):
    if is_last() and progress.step == 4:
        student = {name: rows.detach().clone() for name, rows in student.items()}
        student["image"][1] = float("nan")
    outcome = forward(self, student, teachers, progress, **given)
    if is_last() and progress.step == 2:
        gradients = {name: rows.clone() for name, rows in outcome.gradients.items()}
        gradients["text"][0] = float("nan")
        outcome = dataclasses.replace(outcome, gradients=gradients)
    return outcome


def broken_step(self, lr):
    global steps_begun
    steps_begun += 1
    if is_last() and steps_begun == 4:
        if os.environ["FAULT"] == "bug":
            raise RuntimeError("a bug")
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, lr)


if __name__ == "__main__":
    if os.environ["FAULT"] == "nan":
        Objective.forward = broken_forward
    else:
        Engine.step = broken_step
    cli.run()
