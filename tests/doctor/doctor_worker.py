"""kd-accel on ranks that are machines of their own, of which the last one has another clock, seed and disk.

doctor_worker.py OTHER_FOLDER doctor CONFIG ...
"""

import os
import socket
import sys
import time

from kd_accel import cli

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
host, now = f"host{rank}", time.time

if __name__ == "__main__":
    other, *words = sys.argv[1:]
    socket.gethostname = lambda: host
    if rank == ranks - 1:
        time.time = lambda: now() + 100
        os.chdir(other)
        words.append("seed=7")
    sys.argv = ["kd-accel", *words]
    cli.run()
