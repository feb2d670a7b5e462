"""Evaluation tasks and suites by name; keys, titles and main metrics are DataComp's (arXiv:2304.14108, tasklist.yml).

    expand(["imagenet", "retrieval", "vtab/cifar100"])  # five tasks, in this order

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kd_accel.schema import ConfigError, did_you_mean

RECALL = "mean_per_class_recall"
FACE_COLUMNS = ("age", "gender", "race", "race_binary")


@dataclass(frozen=True)
class Task:
    """One named evaluation set, and the metric that stands for it in averages."""

    key: str
    """Its name in suites, averages and results.jsonl."""
    title: str
    """Its name in tables."""
    kind: Literal["zero_shot", "retrieval", "winogavil"] = "zero_shot"
    main_metric: str | None = "acc1"
    """Name of one of its metrics; None: no number stands for it alone."""
    metadata: tuple[str, ...] = ()
    """Columns of every image's KEY.npy that its metrics read, from the first on."""


_VTAB = (
    Task("vtab/caltech101", "Caltech-101", main_metric=RECALL),
    Task("vtab/cifar100", "CIFAR-100"),
    Task("vtab/clevr_count_all", "CLEVR Counts"),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance"),
    Task("vtab/dtd", "Describable Textures"),
    Task("vtab/eurosat", "EuroSAT"),
    Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance"),
    Task("vtab/flowers", "Oxford Flowers-102", main_metric=RECALL),
    Task("vtab/pets", "Oxford-IIIT Pet", main_metric=RECALL),
    Task("vtab/pcam", "PatchCamelyon"),
    Task("vtab/resisc45", "RESISC45"),
    Task("vtab/svhn", "SVHN"),
    Task("sun397", "SUN397"),
)
_IMAGENET = Task("imagenet1k", "ImageNet 1k")
_IMAGENET_SHIFTS = (
    Task("imagenet_sketch", "ImageNet Sketch"),
    Task("imagenetv2", "ImageNet v2"),
    Task("imagenet-a", "ImageNet-A"),
    Task("imagenet-o", "ImageNet-O"),
    Task("imagenet-r", "ImageNet-R"),
    Task("objectnet", "ObjectNet"),
)
_RETRIEVAL = (
    Task("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", "retrieval", "mean_recall@1"),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", "retrieval", "mean_recall@1"),
    Task("misc/winogavil", "WinoGAViL", "winogavil", "jaccard_score_10-12"),
)
_OTHERS = (
    Task("cifar10", "CIFAR-10"),
    Task("country211", "Country211"),
    Task("fgvc_aircraft", "FGVC Aircraft", main_metric=RECALL),
    Task("food101", "Food-101"),
    Task("gtsrb", "GTSRB"),
    Task("mnist", "MNIST"),
    Task("voc2007", "Pascal VOC 2007"),
    Task("renderedsst2", "Rendered SST2"),
    Task("cars", "Stanford Cars"),
    Task("stl10", "STL-10"),
    Task("wilds/iwildcam", "iWildCam", main_metric="F1-macro_all"),
    Task("wilds/camelyon17", "Camelyon17", metadata=("hospital", "slide")),
    Task("wilds/fmow", "FMoW", main_metric="acc_worst_region", metadata=("region", "year")),
    Task("fairness/dollar_street", "Dollar Street", main_metric="acc_top5_wg", metadata=("income_ds",)),
    Task("fairness/geode", "GeoDE", main_metric="acc_wg", metadata=("region",)),
    Task("fairness/fairface", "FairFace", main_metric=None, metadata=FACE_COLUMNS),
    Task("fairness/utkface", "UTKFace", main_metric=None, metadata=FACE_COLUMNS),
)
_BEYOND_DATACOMP = (
    Task("birdsnap", "Birdsnap"),
    Task("ucf101", "UCF101"),
    Task("coco", "COCO val2017", "retrieval", "mean_recall@1"),
)
_DATACOMP = (_IMAGENET, *_IMAGENET_SHIFTS, *_VTAB, *_RETRIEVAL, *_OTHERS)

TASKS = {task.key: task for task in (*_DATACOMP, *_BEYOND_DATACOMP)}


def _keys(*tasks: Task) -> tuple[str, ...]:
    return tuple(task.key for task in tasks)


IMAGENET_SHIFTS = _keys(*_IMAGENET_SHIFTS)

# The keys of every suite, in the order of evaluation.
SUITES = {
    "imagenet": _keys(_IMAGENET),
    "imagenet_variants": _keys(_IMAGENET, *_IMAGENET_SHIFTS),
    "retrieval": _keys(*_RETRIEVAL),
    "vtab": _keys(*_VTAB),
    "datacomp38": _keys(*_DATACOMP),
    # the zero-shot sets of ProtoCLIP (arXiv:2206.10996)
    "protoclip": tuple(
        "imagenet1k cifar10 vtab/cifar100 stl10 birdsnap country211 vtab/flowers gtsrb ucf101 cars".split()
    ),
    "coco": ("coco",),
}


def expand(names: Sequence[str]) -> list[Task]:
    """The tasks that `names` of tasks and suites stand for, in order, each once; raises ConfigError for others."""
    if unknown := [name for name in names if name not in (*SUITES, *TASKS)]:
        raise ConfigError("\n".join(f"tasks: no task or suite '{name}'{_nearest(name)}" for name in unknown))
    keys = [key for name in names for key in SUITES.get(name, (name,))]
    return [TASKS[key] for key in dict.fromkeys(keys)]


def _nearest(name: str) -> str:
    """A hint; "cifar100" is nearer to "vtab/cifar100" than to "cifar10"."""
    in_full = [key for key in TASKS if key.endswith(f"/{name}")]
    return did_you_mean(in_full[0] if in_full else name, [*SUITES, *TASKS])
