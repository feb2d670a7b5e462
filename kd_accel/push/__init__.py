"""kd-accel push: a student on the HuggingFace Hub."""
