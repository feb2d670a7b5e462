"""kd-accel download: a list of URLs as indexed shards."""
