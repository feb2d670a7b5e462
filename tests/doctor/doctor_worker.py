"""kd-accel on ranks that are machines of their own, of which the last one has another clock, seed and disk.

doctor_worker.py OTHER_FOLDER doctor CONFIG ...
HANGS=1 doctor_worker.py OTHER_FOLDER doctor ...     it stops for good as soon as all have met
"""

import os
import signal
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
        if "HANGS" in os.environ:
            from kd_accel.doctor import rendezvous

            rendezvous.agreement = lambda config: os.kill(os.getpid(), signal.SIGSTOP)
    sys.argv = ["kd-accel", *words]
    cli.run()
