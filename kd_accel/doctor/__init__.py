"""kd-accel doctor: what would keep a training from running, before it is started."""

import os

# Before torch is imported: in C++ it would tell of each attempt to meet in forty lines, and the doctor has one for it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
