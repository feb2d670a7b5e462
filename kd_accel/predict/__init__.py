"""kd-accel predict: which of the given texts fits a picture."""
