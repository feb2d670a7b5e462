"""`python -m kd_accel VERB ...`, which is also what `accelerate launch -m kd_accel VERB ...` runs on every rank."""

from kd_accel.cli import run

run()
