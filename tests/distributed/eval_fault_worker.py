"""kd-accel eval with a fault put in.

FAULT=dead eval_fault_worker.py eval ...     the last rank kills itself before its second batch
FAULT=hanging eval_fault_worker.py eval ...  it stops there for good, and the others wait 5 s for it
FAULT=worker eval_fault_worker.py eval ...   a worker of its loader kills itself at its second batch
FAULT=vanishing eval_fault_worker.py ...     the folder `gone` goes away between two ranks' looks into it, and the
                                             folder `going` while its images are read
FAULT=blind eval_fault_worker.py eval ...    the last rank sees no folder
FAULT=between eval_fault_worker.py eval ...  the first rank kills itself when two rows are written
"""

import os
import shutil
import signal

from torch.utils.data import get_worker_info

from kd_accel import cli, distributed
from kd_accel.evals import evaluate, plan, suite
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.features import ImageBatches
from kd_accel.evals.find import find_sets
from kd_accel.evals.tars import TarSet

FAULT = os.environ.get("FAULT")
encode_images, read_batch, read_samples = Encoder.encode_images, ImageBatches.__getitem__, TarSet.samples
append_row = evaluate.append_row
images_encoded = rows_written = 0


def is_last() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def last_batch(self, views):
    """Of the last rank, its second batch."""
    global images_encoded
    images_encoded += bool(len(views))
    if is_last() and images_encoded == 2:
        os.kill(os.getpid(), signal.SIGKILL if FAULT == "dead" else signal.SIGSTOP)
    return encode_images(self, views)


def worker_batch(self, number):
    if get_worker_info() is not None and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return read_batch(self, number)


def vanishing_samples(self):
    if self.name == "gone" and is_last():
        distributed.barrier()
        shutil.rmtree(self.path)
    samples = read_samples(self)
    if self.name == "gone" and not is_last():
        distributed.barrier()
    return samples


def vanishing_batch(self, number):
    if self.eval_set.name == "going" and number == 1:
        shutil.rmtree(self.eval_set.path, ignore_errors=True)
    return read_batch(self, number)


def blind_find(folders):
    return find_sets("/nowhere" if is_last() else folders)


def append_and_die(path, row):
    global rows_written
    append_row(path, row)
    rows_written += 1
    if rows_written == 2:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    match FAULT:
        case "dead" | "hanging":
            Encoder.encode_images = last_batch
        case "worker":
            ImageBatches.__getitem__ = worker_batch
        case "vanishing":
            TarSet.samples = vanishing_samples
            ImageBatches.__getitem__ = vanishing_batch
        case "blind":
            plan.find_sets = blind_find
        case "between":
            evaluate.append_row = append_and_die
    suite.TIMEOUT_S = 5 if FAULT == "hanging" else suite.TIMEOUT_S
    cli.run()
