"""`python -m kd_accel VERB ...`, which is also what `accelerate launch -m kd_accel VERB ...` runs on every rank."""

import sys

from kd_accel.cli import main

sys.exit(main())
