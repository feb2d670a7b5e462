"""kd-accel demo: the main job, whole and small."""
