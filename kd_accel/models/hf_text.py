"""Text towers out of transformers: BERT, RoBERTa, DistilBERT, ModernBERT, and whatever else AutoModel encodes.

    tower, text = build_hf_text("distilbert-base-uncased", embed_dim=512, pretrained=True, pooling="cls",
                                context_length=77, proj="linear", where="student.arch.text_cfg")
    features = tower(text.tokenize(captions))  # [b, 512]

Not open_clip's HFTextEncoder, since open_clip 3.3 cannot build DistilBERT and knows five families by name; but its
state keys and tokens, so it loads releases of those it knows:

    open_clip.create_model("local-dir:DIR", text_cfg={**text_cfg, "hf_model_name": DIR, "hf_model_pretrained": False})

Where export has added transformers' files, DIR/config.json is that of both towers, and hf_model_name is DIR/text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from kd_accel.models.hub import NOT_TO_BE_HAD, unavailable
from kd_accel.schema import ConfigError, one_line
from kd_accel.types import TextInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes half a second to import

# pooling -> hf_pooler_type of a text_cfg; the last one is ours alone
POOLERS = {
    "mean": "mean_pooler",
    "max": "max_pooler",
    "cls": "cls_last_hidden_state_pooler",
    "pooler": "cls_pooler",
    "last": "last_pooler",
}


class HFTextTower(nn.Module):
    """Tokens `[b,T]`, padded on the right, -> raw embeddings `[b,d]`.

    transformer   the encoder, state keys "transformer.*"
    proj          to d, state keys "proj.*"; none of its own where d is the encoder's width
    config        transformers' description of the encoder
    embed_dim     d
    """

    def __init__(
        self, transformer: PreTrainedModel, proj: nn.Module, config: PreTrainedConfig, *, pooling: str, embed_dim: int
    ):
        super().__init__()
        self.transformer, self.proj = transformer, proj
        self.config, self.pooling, self.embed_dim = config, pooling, embed_dim

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != self.config.pad_token_id
        mask[:, 0] = True  # a tokenizer without special tokens leaves nothing of an empty caption
        encoded = self.transformer(input_ids=tokens, attention_mask=mask.long())
        return self.proj(self._pool(encoded, mask))

    def _pool(self, encoded: Any, mask: Tensor) -> Tensor:
        if self.pooling == "pooler":
            return encoded.pooler_output
        rows = encoded.last_hidden_state  # [b, T, width]
        if self.pooling == "cls":
            return rows[:, 0]
        if self.pooling == "last":
            return rows[torch.arange(len(rows), device=rows.device), mask.sum(dim=1) - 1]
        mask = mask.unsqueeze(-1)
        if self.pooling == "max":
            return rows.masked_fill(~mask, -torch.inf).amax(dim=1)
        return (rows * mask).sum(dim=1) / mask.sum(dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass, or keep them."""
        if enable:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()


def build_hf_text(
    name: str,
    *,
    embed_dim: int | None,
    pretrained: bool,
    pooling: str,
    context_length: int,
    proj: str | None,
    where: str,
    config: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> tuple[HFTextTower, TextInput]:
    """(tower in fp32, what it wants as input).

    name            on the Hub, or a folder with config.json, tokenizer files and, if `pretrained`, weights
    embed_dim       d; None: the encoder's width
    pooling         a key of POOLERS: mean or max over the caption's tokens, cls (the first), last, or the model's own
    context_length  longer captions are cut
    proj            linear | mlp, without biases, as open_clip has them; None: the encoder's width is d
    config          keys of config.json to change, for instance num_hidden_layers
    folder          where config.json and tokenizer lie if not under `name` (a release)

    Fresh weights come from torch's global generator. No code from the Hub is run. Raises ConfigError, which begins with
    `where`, for a model that is not to be had or is not a text encoder, and for sizes that do not fit each other.
    """
    source = str(folder or name)
    settings = _config(source, config or {}, where)
    tokenize = _tokenizer(source, context_length, where)
    settings.pad_token_id = tokenize.tokenizer.pad_token_id
    if len(tokenize.tokenizer) > settings.vocab_size:
        known = f"the tokenizer knows {len(tokenize.tokenizer)} tokens, the model {settings.vocab_size}"
        raise ConfigError(f"{where}: {source}: {known}: they are not of one model")
    encoder = _encoder(source, settings, pretrained, pooling, where)
    _check_context(encoder, settings, context_length, where)
    width = settings.hidden_size
    tower = HFTextTower(
        encoder,
        _projection(proj, width, embed_dim or width, where),
        settings,
        pooling=pooling,
        embed_dim=embed_dim or width,
    )
    return tower, TextInput(context_length, name, tokenize, settings.pad_token_id)


# Releases -------------------------------------------------------------------------------------------------------------


def hf_text_cfg(name: str, *, pooling: str, proj: str | None, context_length: int) -> dict[str, Any]:
    """The text_cfg of a release's model_cfg: open_clip's keys for such a tower."""
    return {
        "context_length": context_length,
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "hf_model_pretrained": False,  # the weights come with the release
        "hf_pooler_type": POOLERS[pooling],
        "hf_proj_type": proj,
    }


def write_hf_tower(tower: HFTextTower, text: TextInput, folder: Path) -> None:
    """config.json of the encoder and the tokenizer's files, beside which a release keeps the weights."""
    tower.config.save_pretrained(folder)
    text.tokenize.save_pretrained(folder)


def read_hf_tower(
    folder: Path | None, text_cfg: dict[str, Any], *, embed_dim: int, where: str
) -> tuple[HFTextTower, TextInput]:
    """The tower that a text_cfg describes.

    Of a release, `folder`, it has fresh weights, and nothing outside of that folder is read. Without one it starts from
    the model's own weights unless hf_model_pretrained is false, and hf_config changes keys of its config.json. What
    `text_cfg` does not say is as in open_clip. Raises ConfigError.
    """
    poolings = {pooler: pooling for pooling, pooler in POOLERS.items()}
    pooler = text_cfg.get("hf_pooler_type", "mean_pooler")
    if pooler not in poolings:
        raise ConfigError(f"{where}.hf_pooler_type: {pooler!r} is none of {', '.join(poolings)}")
    return build_hf_text(
        text_cfg["hf_model_name"],
        embed_dim=embed_dim,
        pretrained=folder is None and text_cfg.get("hf_model_pretrained", True),
        pooling=poolings[pooler],
        context_length=text_cfg.get("context_length", 77),
        proj=text_cfg.get("hf_proj_type", "mlp"),
        where=where,
        config=None if folder else text_cfg.get("hf_config"),
        folder=folder,
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def _config(source: str, changes: dict[str, Any], where: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type == "vision-text-dual-encoder" and not changes:
            config = config.text_config  # of a release with transformers' files
    except NOT_TO_BE_HAD as error:
        raise unavailable(f"the model '{source}'", where, error) from error
    if not (hasattr(config, "hidden_size") and hasattr(config, "vocab_size")):
        raise ConfigError(f"{where}: {source} is a {config.model_type} model, which is no text encoder")
    if unknown := [key for key in changes if not hasattr(config, key)]:
        raise ConfigError(f"{where}.hf_config.{unknown[0]}: no such key in the config.json of {source}")
    try:
        if changes:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
        config.validate()  # else a release, after training, would find out
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}.hf_config: does not fit the config.json of {source} ({one_line(error)})") from error
    return config


def _tokenizer(source: str, context_length: int, where: str) -> HFTokenizer:
    """open_clip's wrapper, so that open_clip makes the same tokens from a release."""
    try:
        tokenize = HFTokenizer(source, context_length, padding_side="right", trust_remote_code=False)
    except NOT_TO_BE_HAD as error:
        raise unavailable(f"the tokenizer '{source}'", where, error) from error
    own = tokenize.tokenizer
    if own.pad_token is None:
        own.pad_token = own.eos_token  # GPT-like: they end no caption with it
    if own.pad_token_id is None or own.pad_token_id in own("a").input_ids:
        raise ConfigError(f"{where}: the tokenizer of {source} has no token that stands for padding alone")
    return tokenize


def _encoder(source: str, config: PreTrainedConfig, pretrained: bool, pooling: str, where: str) -> PreTrainedModel:
    """Attention is transformers' own choice: SDPA where the model has it."""
    try:
        if pretrained:
            model, loaded = AutoModel.from_pretrained(
                source, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        else:
            model, loaded = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False), {}
    except NOT_TO_BE_HAD as error:
        raise unavailable(f"the model '{source}'", where, error) from error
    if config.is_encoder_decoder:
        model = model.get_encoder()
    pooler = getattr(model, "pooler", None)
    if pooling == "pooler" and pooler is None:
        raise ConfigError(f"{where}: pooling 'pooler': {source} ({config.model_type}) has no pooler: use cls or mean")
    if pooling != "pooler" and pooler is not None:
        model.pooler = None  # its weights would never see a gradient
    if missing := sorted(loaded.get("missing_keys", set()) & model.state_dict().keys()):
        raise ConfigError(f"{where}: the weights in {source} lack {missing[0]} ({len(missing)} tensors in all)")
    return model


def _check_context(encoder: PreTrainedModel, config: PreTrainedConfig, context_length: int, where: str) -> None:
    positions = getattr(config, "max_position_embeddings", None)  # None: relative positions
    if positions is None:
        return
    # RoBERTa and its kin count positions from behind the padding's
    reserved = getattr(getattr(encoder, "embeddings", None), "padding_idx", -1) + 1
    if context_length > positions - reserved:
        raise ConfigError(f"{where}.context_length={context_length}: this model takes {positions - reserved} at most")


def _projection(kind: str | None, width: int, embed_dim: int, where: str) -> nn.Module:
    """Shapes and state keys of open_clip's HFTextEncoder."""
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    if kind == "mlp":
        hidden = (width + embed_dim) // 2
        return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))
    if width != embed_dim:
        raise ConfigError(f"{where}: the encoder is {width} wide and embed_dim={embed_dim}: set proj to linear or mlp")
    return nn.Identity()
