"""Ranks that share a cache, and ranks that do not, find the same features and nobody waits in vain."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import tiny
from conftest import run_process
from PIL import Image

WORKER = """
import json, logging, sys
from pathlib import Path
import torch
from kd_accel import distributed, processes
from kd_accel.evals import feature_cache, statistics
from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.find import find_sets
from kd_accel.evals.linear_probe import linear_probe
from kd_accel.probe_config import ProbeConfig

logging.basicConfig(format="warning: %(message)s")
processes.start_process_group(60)
rank, (release, folder, cache) = distributed.rank(), sys.argv[1:]
encoder, [eval_set] = load_encoder(release), find_sets(folder)
samples, computed = eval_set.samples(), 0
original = feature_cache.image_features

def counted(*args, **kwargs):
    global computed
    computed += 1
    return original(*args, **kwargs)

def features_in(folder):
    return feature_cache.FeatureCache(folder).image_features(encoder, eval_set, samples, batch_size=4, num_workers=0)

feature_cache.image_features = counted
first, again = features_in(cache), features_in(cache)
counts = [computed]
of_one_machine = features_in(cache if rank == 0 else f"{cache}/{rank}")  # where rank 1 finds nothing
counts.append(computed)
distributed.barrier()
if rank == 0:
    [path] = Path(cache).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
distributed.barrier()
repaired = features_in(cache)
counts.append(computed)
assert all(torch.equal(first.images, other.images) for other in (again, of_one_machine, repaired))

labels = torch.tensor([sample.label for sample in samples])[first.rows]
metrics = linear_probe((first.images, labels), (first.images, labels), ProbeConfig(), num_classes=3)
statistics.CHUNK_ROWS = 4
lies = statistics.feature_statistics(first.images, first.images.flip(1), torch.arange(len(labels)))
everyone = distributed.gather_objects((counts, metrics, lies, first.images.sum().item(), first.rows.tolist()))
assert everyone == everyone[:1] * len(everyone)
if rank == 0:
    print("result:", json.dumps(everyone[0]))
processes.end_process(0)
"""


@pytest.mark.distributed
def test_two_processes_find_what_one_does(tmp_path, run_ranks):
    """Computed once, read once; all compute where one has another folder, or the file is damaged, which is said once.

    A linear probe on the features, and their statistics, are the same to the last bit.
    """
    release = tiny.write_teacher(tmp_path / "untrained")
    folder = tmp_path / "set"
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for i in range(26):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(file, "PNG")
            tiny.add(tar, f"{i}.png", b"junk" if i == 5 else file.getvalue())
            tiny.add(tar, f"{i}.cls", str(i % 3).encode())
    (folder / "test/nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("a\nb\nc")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def result(run, cache, computed):
        output = run([str(script), str(release), str(folder), str(tmp_path / cache)])
        [line] = [line for line in output.splitlines() if line.startswith("result:")]
        counts, *rest = json.loads(line.removeprefix("result:"))
        assert counts == computed
        assert output.count("cannot be used") == 1
        return rest

    two = result(run_ranks, "two", [1, 2, 3])
    one = result(lambda args: run_process([sys.executable, *args]), "one", [1, 1, 2])
    assert two == one
    assert len(two[-1]) == 25
