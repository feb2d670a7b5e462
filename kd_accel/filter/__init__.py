"""kd-accel filter: images scored by prompts, the best kept."""
