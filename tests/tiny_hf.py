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


def tokenizer(pad: int = 0):
    """Whole words between [CLS] and [SEP]; padding is token `pad`, 0 or 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL[1 : pad + 1], SPECIAL[0], *SPECIAL[pad + 1 :]]
    ids = {word: i for i, word in enumerate(special + WORDS)}
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
