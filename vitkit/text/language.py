"""Causal language models and tokenizers: any of transformers, or a small GPT-2 that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vitkit.errors import MissingExtra, WeightsError
from vitkit.text.settings import Settings

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
POSITIONS = 2048  # of the tiny one: image tokens and text


def require_transformers() -> Any:
    """The package, or MissingExtra."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "text") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def open_language(settings: Settings, texts: Sequence[str], *, seed: int) -> tuple[Any, Any, bool]:
    """(language model, tokenizer, whether it is new). "tiny" learns its tokenizer from `texts`."""
    if settings.lm == "tiny":
        return *tiny(texts, settings, seed=seed), True
    return *load(settings.lm), False


def load(ref: str | Path) -> tuple[Any, Any]:
    """A causal model of transformers by folder or hub id: safetensors only, no code of the model's own is run."""
    transformers = require_transformers()
    here = Path(ref).is_dir()
    options = {"local_files_only": here, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(ref), **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(ref), use_safetensors=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, KeyError) as error:
        text = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{ref} is not read as a causal language model ({text})",
            fix="a folder that transformers' save_pretrained wrote (safetensors), a hub id, or lm=tiny",
        ) from None
    end = tokenizer.eos_token
    if end is None:
        raise WeightsError(f"{ref}: its tokenizer has no token that ends a text", fix="a generative model's tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end
    if tokenizer.bos_token is None:
        tokenizer.bos_token = end
    return model, tokenizer


def tiny(texts: Sequence[str], settings: Settings, *, seed: int) -> tuple[Any, Any]:
    """A GPT-2 with random weights, and a byte-level byte-pair encoding of `texts`, which can spell any other text, too."""
    transformers = require_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.lm_vocabulary,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    coder.train_from_iterator(list(texts), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=coder, pad_token=PAD, bos_token=BEGIN, eos_token=END
    )
    heads = max(1, settings.lm_width // 64)
    while settings.lm_width % heads:
        heads -= 1
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=settings.lm_width,
        n_layer=settings.lm_layers,
        n_head=heads,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config), tokenizer
