"""kd-accel embed: a teacher's features on disk."""
