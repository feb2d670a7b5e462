"""Folders as transformers writes them, with models of two narrow layers and tokenizers of a dozen words."""

from __future__ import annotations

from pathlib import Path

WORDS = "a red cat dog on the green square photo of !".split()
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
# What a family has under other names than most, and where its padding is not token 0.
FAMILIES = {
    "bert": {},
    "distilbert": {"hidden_dim": 48},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "modernbert": dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2),
    "mt5": {"d_kv": 16, "d_ff": 48},
    "gpt2": {"bos_token_id": 2, "eos_token_id": 2},
}


def tokenizer(pad: int = 0, order: list[str] | None = None):
    """Whole words between [CLS] and [SEP]; padding is token `pad`, 0 or 1. `order`: all words, if not in the usual."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL[1 : pad + 1], SPECIAL[0], *SPECIAL[pad + 1 :]]
    ids = {word: i for i, word in enumerate(order or special + WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def write_text_model(folder: Path, family: str = "bert", **changes) -> Path:
    """A text encoder with weights and tokenizer, as AutoModel and AutoTokenizer read it."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(4)
    settings = {"vocab_size": 20, "max_position_embeddings": 40, "pad_token_id": 0, **SIZES, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **settings | changes)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no two positions and no two words alike
    model.save_pretrained(folder)
    tokenizer(config.pad_token_id).save_pretrained(folder)
    return folder


END = len(WORDS) + 3  # the largest token, as in CLIP


def write_clip(folder: Path, family: str = "clip", *, eos: int = END, **processor) -> Path:
    """A CLIPModel or SiglipModel with weights, tokenizer and image processor; `processor` changes keys of the last."""
    import torch
    import transformers

    torch.manual_seed(5)
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 12}
    text |= {"bos_token_id": END - 1, "eos_token_id": eos, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    width = {"projection_dim": 16} if family == "clip" else {}
    config = transformers.AutoConfig.for_model(family, text_config=text, vision_config=vision, **width)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words = tokenizer(order=["[PAD]", "[UNK]", *WORDS, "[CLS]", "[SEP]"])
    if family == "clip":
        words.add_special_tokens({"pad_token": "[SEP]"})  # CLIP's pad with their end-of-text token
    words.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": square} if family == "clip" else {"size": square}
    kinds = {"clip": transformers.CLIPImageProcessor, "siglip": transformers.SiglipImageProcessor}
    kinds[family](**{**sizes, **processor}).save_pretrained(folder)
    return folder
