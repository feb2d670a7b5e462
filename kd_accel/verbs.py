"""The verbs: where the keys of each are, what runs it, and what it does in a line.

Imports no torch; what a verb names is imported when it is asked for, so that every verb starts without the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import import_module
from typing import Any

from kd_accel.schema import Schema

VERBS = {
    "train": (
        "kd_accel.config:TrainConfig",
        "kd_accel.train:run",
        "train a student, beside its frozen teacher or alone",
    ),
    "embed": (
        "kd_accel.embed_config:EmbedConfig",
        "kd_accel.embed.verb:run",
        "store a teacher's features, for training without the teacher",
    ),
    "eval": (
        "kd_accel.eval_config:EvalConfig",
        "kd_accel.evals.suite:run",
        "zero-shot classification and retrieval of a run or a release",
    ),
    "eval prepare": (
        "kd_accel.prepare_config:PrepareConfig",
        "kd_accel.evals.prepare:run",
        "a HuggingFace dataset as an evaluation set in tars",
    ),
    "pack": (
        "kd_accel.pack_config:PackConfig",
        "kd_accel.pack:run",
        "any data as indexed webdataset shards, resized on the way",
    ),
    "index": (
        "kd_accel.index_config:IndexConfig",
        "kd_accel.index:run",
        "list the samples of webdataset tars, once, before training",
    ),
    "filter": (
        "kd_accel.filter_config:FilterConfig",
        "kd_accel.filter.verb:run",
        "score images by prompts with a teacher, and keep the best ones",
    ),
    "download": (
        "kd_accel.download_config:DownloadConfig",
        "kd_accel.download.verb:run",
        "the images of a list of URLs as indexed webdataset shards",
    ),
    "export": (
        "kd_accel.export_config:ExportConfig",
        "kd_accel.export.verb:run",
        "a student as a release with a model card, for open_clip, transformers, ONNX",
    ),
    "push": (
        "kd_accel.push_config:PushConfig",
        "kd_accel.push.verb:run",
        "a release on the HuggingFace Hub",
    ),
    "predict": (
        "kd_accel.predict_config:PredictConfig",
        "kd_accel.predict.verb:run",
        "which of some texts fits a picture, and how well",
    ),
    "report": (
        "kd_accel.report_config:ReportConfig",
        "kd_accel.report.verb:run",
        "one HTML page: curves, results beside the teacher's, retrieved pictures; metrics.csv, PNGs",
    ),
    "plan": (
        "kd_accel.plan_config:PlanConfig",
        "kd_accel.plan.verb:run",
        "what a training would cost: parameters, FLOPs, memory, hours",
    ),
    "bench": (
        "kd_accel.bench_config:BenchConfig",
        "kd_accel.bench.verb:run",
        "some steps of a training, and where their time goes",
    ),
    "demo": (
        "kd_accel.demo_config:DemoConfig",
        "kd_accel.demo.verb:run",
        "the whole way, on handwritten digits and two CPU cores",
    ),
    "config": (
        "kd_accel.config:TrainConfig",
        "kd_accel.cli:print_config",
        "check config files of train and print what they come to",
    ),
    "doctor": (
        "kd_accel.doctor_config:DoctorConfig",
        "kd_accel.doctor.verb:run",
        "what would keep a training, launched like this, from running; takes its files and keys",
    ),
    "help": ("kd_accel.cli:HelpConfig", "kd_accel.cli:print_help", "explain the keys of a verb"),
}


def config_class(verb: str) -> type[Schema]:
    """The schema of a verb's keys."""
    return _named(VERBS[verb][0])


def function_of(verb: str) -> Callable[[Any], int | None]:
    """What runs a verb: its config -> the exit code, None for 0."""
    return _named(VERBS[verb][1])


def _named(path: str) -> Any:
    """What `module:name` names, imported without looking for garbage: an eighth of torch's time, and there is none."""
    module, name = path.split(":")
    gc.disable()
    try:
        return getattr(import_module(module), name)
    finally:
        gc.enable()
