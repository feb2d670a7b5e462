"""kd_accel: distil a large frozen CLIP teacher into a small student, on two CPU cores or on many nodes."""

__version__ = "0.1.0"
