"""The sections of a training config: student, teacher, objective, optim, save, log; data is in data_config.py, and
config.py puts them together.

Imports no torch: `kd-accel --help` and `kd-accel config` answer at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kd_accel.schedules import Scheduled
from kd_accel.schema import Schema, check_one_given, without_nulls
from kd_accel.terms import AnyTerm


class PreprocessConfig(Schema):
    """How pixels reach a model of your own; named architectures bring their own."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per channel, of pixels in 0..1 (OpenAI CLIP's)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per channel."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How the image is resized."""
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    """Which side meets the image size, as in open_clip."""


class HeadConfig(Schema):
    """A small network per tower: a linear layer, norm and ReLU, `layers` times, and a linear layer on top."""

    hidden: int = Field(2048, gt=0)
    """Width of the hidden layers."""
    layers: int = Field(1, ge=0)
    """Hidden layers; 0 leaves one linear layer."""
    norm: Literal["layer", "batch", "none"] = "layer"
    """batch, as ProtoCLIP has it, takes the statistics of a process's micro-batch: results depend on its size."""


class PrototypeHeadConfig(HeadConfig):
    """A head whose output is clustered and compared with clusters (ProtoCLIP's projection heads)."""

    width: int = Field(128, gt=0)
    """Width of what comes out."""


class StudentConfig(Schema):
    """The model that learns."""

    arch: str | dict[str, Any]
    """An open_clip architecture ("ViT-B-16"), or an inline open_clip config: {embed_dim, vision_cfg, text_cfg}.

    One tower alone: timm/NAME, torchvision/NAME or hf/NAME, or an inline config with one of the two *_cfg."""
    pretrained: str | None = None
    """Start from these weights: an open_clip tag of the architecture, or a file; null starts from scratch.

    default: those that timm, torchvision or HuggingFace has for the NAME."""
    init: str | None = None
    """Start from another model: teacher (or the name of one of several), or PATH of a run, checkpoint or release.

    Of a deeper or wider one, evenly chosen layers and leading channels are copied (TinyCLIP, arXiv 2309.12314)."""
    embed_dim: int | None = Field(None, gt=0)
    """Width of the embedding of timm/, torchvision/ and hf/ students; null: the teacher's."""
    image_size: int | None = Field(None, gt=0)
    """Pixels of a side that timm/ and torchvision/ students see; null: those of the published weights."""
    context_length: int = Field(77, gt=0)
    """Tokens of a caption that an hf/ student sees."""
    pooling: Literal["mean", "cls", "max", "last", "pooler"] = "mean"
    """How an hf/ student makes one embedding of its tokens; cls and pooler fit transformers' VisionTextDualEncoder."""
    lock: dict[Literal["image", "text"], Annotated[int, Field(ge=0)]] = {}
    """Towers that are frozen but for their last N groups of layers (LiT, arXiv 2111.07991): {image: 0}."""
    preprocess: PreprocessConfig | None = None
    """Replaces the architecture's own mean, std and resizing."""
    projector: Literal["linear", "mlp"] | HeadConfig | None = None
    """linear: a trained layer per tower from the student's width to the teacher's, for terms that compare features.

    mlp: two layers with a GELU between them. {layers, hidden, norm}: a head of your own."""
    num_classes: int | None = Field(None, gt=1)
    """A linear class head on the image embedding, for label_ce without class embeddings."""
    prototype_head: PrototypeHeadConfig | None = None
    """A head per tower for the term prototype; null: it uses the embeddings themselves."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class TeacherConfig(Schema):
    """The frozen model that is learned from: give `arch` and `pretrained`, or `path`; or its features in a `store`."""

    arch: str | None = None
    """An open_clip architecture, or a model of another package, which brings its weights: timm/NAME, torchvision/NAME,

    hf/NAME (CLIP, SigLIP or a text encoder of transformers), sentence/NAME (sentence-transformers, word vectors too).
    ssl/auto: a ResNet of MoCo, SimCLR or SwAV, whose checkpoint is named by pretrained."""
    pretrained: str | None = None
    """An open_clip tag of the architecture, or a weights file."""
    path: str | None = None
    """A release directory (open_clip_config.json beside its weights), or one of our runs (its newest checkpoint)."""
    placement: Literal["engine", "replicated", "int8", "cached"] = "engine"
    """engine: in the prepared module (ZeRO-3 partitions it). replicated: a whole copy per process, outside of it.

    int8: like replicated, its matrices in 8 bits: a quarter of the bytes. cached: only its features, from the store."""
    store: str | None = None
    """What kd-accel embed wrote of this teacher. Towers that are in it are read from it, the others run."""
    pooling: Literal["mean", "cls", "max", "last", "pooler"] = "mean"
    """How a text encoder of hf/ makes one embedding of its tokens."""
    context_length: int = Field(77, gt=0)
    """Tokens of a caption that a text encoder of hf/ sees."""
    output: Literal["backbone", "head"] = "backbone"
    """Of an ssl/ checkpoint: the pooled features, or what its own head makes of them."""
    temperature: float | None = Field(None, gt=0)
    """Of its logits in every term; null: the one it was trained to."""
    weight: float = Field(1.0, gt=0)
    """Factor of the terms that learn from it, and its share in an ensemble."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.placement == "cached" and self.store is None:
            raise ValueError("placement=cached reads features from disk: set store, to what kd-accel embed wrote")
        if self.path is not None and self.pretrained is not None:
            raise ValueError("path already names the weights: drop pretrained")
        if self.placement == "cached" and (self.path is None or self.arch is None):
            return self
        if (self.path is None) == (self.arch is None):
            raise ValueError("give either path, or arch with pretrained")
        if self.arch is not None:
            self._weights_are_named()
        return self

    def _weights_are_named(self) -> None:
        package = self.arch.partition("/")[0] if self.arch and "/" in self.arch else None
        if package in (None, "ssl") and self.pretrained is None:
            raise ValueError("pretrained is needed beside arch: a teacher with random weights teaches nothing")
        if package not in (None, "ssl") and self.pretrained is not None:
            raise ValueError(f"arch={self.arch} brings its own weights: drop pretrained")


class TemperatureConfig(Schema):
    """The student's temperature, 1 / logit_scale; fp32 and outside the engine whatever the precision."""

    init: float | None = Field(None, gt=0, le=1)
    """Value at the first step; null: the model's own, which is 0.07 from scratch (SigLIP starts at 0.1)."""
    min: float = Field(0.01, gt=0, le=1)
    """Never below (0.01 is CLIP's)."""
    learnable: bool = True
    """false keeps it at init."""

    @model_validator(mode="after")
    def _start_inside(self) -> Self:
        if self.init is not None and self.init < self.min:
            raise ValueError(f"init={self.init} lies below min={self.min}: raise init or lower min")
        return self


class ObjectiveConfig(Schema):
    """What is minimised: a weighted sum of terms."""

    terms: Annotated[dict[str, AnyTerm], BeforeValidator(without_nulls)] = Field(min_length=1)
    """Name of your choice -> term; a name set to null drops a term that a base file brought."""
    temperature: TemperatureConfig = TemperatureConfig()
    logit_bias: float | None = None
    """Start of the learnable bias on the student's logits, of which only siglip makes use (-10 in the paper).

    null: the pretrained student's own, where it brings one."""
    chunk_rows: int = Field(256, gt=0)
    """Rows of a process that are compared with all columns at a time: memory grows with chunk_rows x global batch."""
    memory: Literal["replicated", "sharded"] = "replicated"
    """What terms remember of each sample: on every process that of all samples, or of its share of them (sharded).

    sharded divides the bytes by the number of processes, for an exchange per term and step; resume may change it."""

    @field_validator("terms")
    @classmethod
    def _names(cls, value: Any) -> Any:
        for name in value:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"'{name}' cannot name a term: letters, digits, _ and -, a letter first")
        return value


class OptimConfig(Schema):
    """The towers' optimizer, and how its learning rate moves after a linear warm-up."""

    optimizer: Literal["adamw", "lamb"] = "adamw"
    """lamb: layer-wise steps for very large batches (arXiv 1904.00962)."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "constant_cooldown", "one_cycle"] = "cosine"
    """After the warm-up: half a cosine to min_lr; lr to the end; lr, and at the end cooldown_steps down to min_lr.

    one_cycle: half a cosine from lr / 25 up to lr in the warm-up, half a cosine down to min_lr after it."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine or of the cooldown."""
    cooldown_steps: int = Field(0, ge=0)
    """Steps of the cooldown of constant_cooldown."""
    cooldown_power: float = Field(1.0, gt=0)
    """1: the cooldown is a straight line; more: it bends towards min_lr."""
    epochs: int | None = Field(None, gt=0)
    """Length of the run in epochs (give one of epochs, steps, samples)."""
    steps: int | None = Field(None, gt=0)
    """Length of the run in optimizer steps."""
    samples: int | None = Field(None, gt=0)
    """Length of the run in samples seen, rounded up to whole steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate per layer below the top of each tower (BEiT, arXiv 2106.08254); 1: none."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices and kernels; biases, norms, class and position embeddings of one dimension get none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's epsilon."""
    grad_clip_norm: float = Field(1.0, ge=0)
    """Gradients of the student are scaled down to this global norm; 0 switches clipping off."""
    temperature_lr: Scheduled | None = None
    """Learning rate of the temperature and of other scales; null follows lr with its warm-up and cosine."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        check_one_given(epochs=self.epochs, steps=self.steps, samples=self.samples)
        if (self.schedule == "constant_cooldown") != bool(self.cooldown_steps):
            raise ValueError("cooldown_steps and schedule=constant_cooldown need each other: set both or neither")
        return self


class LoopConfig(Schema):
    """How steps are taken."""

    accumulate: int = Field(1, gt=0)
    """Micro-batches per step and process. The losses see all of them at once, so the result is that of one large batch;
    costs one more forward pass of the student."""
    max_skipped: int = Field(10, ge=0)
    """Steps in a row whose loss or gradient is not finite: they are skipped and logged, one more ends the run."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a moving average of the student's weights, for instance 0.9999; it is what eval and export take."""
    compile: bool = False
    """Compile the blocks of student and teachers by torch.compile; takes minutes the first time, and a C++ compiler."""
    deterministic: bool = False
    """Refuse operations that do not give the same bits each time; slower on GPUs."""
    timeout_s: float = Field(1800, gt=0)
    """Seconds that a process waits for another one before it ends the run."""


class CompressConfig(Schema):
    """How a trained student becomes smaller in a second training."""

    sparsity: Literal["2:4"] | None = None
    """2:4: of every four neighbouring weights two are zero from the first step on; null: dense."""
    int8: Literal["modelopt", "torchao"] | None = None
    """Train the image tower as rounded to 8 bits, its image.onnx has int8: modelopt for TensorRT, torchao for CPUs."""


class SaveConfig(Schema):
    """When a checkpoint is written; the end of the run always writes one."""

    every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two checkpoints; neither this nor the next two: once per epoch."""
    every_epochs: int | None = Field(None, gt=0)
    """Epochs between two checkpoints, in place of every_steps or beside it."""
    every_minutes: float | None = Field(None, gt=0)
    """Minutes between two checkpoints, in place of the others or beside them."""
    on_signal: bool = True
    """SIGTERM and SIGUSR1 write a checkpoint after the step and end the run with exit code 0; false: they kill it."""
    background: bool = False
    """Write files while training goes on, from a copy in memory; at most one checkpoint is under way."""
    keep_last: int = Field(2, gt=0)
    """How many of the newest checkpoints stay."""
    keep_every: int | None = Field(None, gt=0)
    """Checkpoints whose step is a multiple of this stay for good."""


class LogConfig(Schema):
    """What is written while training."""

    every_steps: int = Field(10, gt=0)
    """Optimizer steps between two rows of metrics.jsonl and of the console."""
    trackers: list[str] = []
    """Accelerate trackers by name, for instance [tensorboard, wandb]."""
