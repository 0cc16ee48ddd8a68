"""A T5 encoder of a few thousand weights, saved as `transformers` saves one."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
import transformers


def save_tiny_t5(folder: Path, captions: Iterable[str]) -> None:
    """Save an untrained T5 encoder, 16 wide, and a tokenizer that knows the words of some captions.

    Args:
        folder: Where it goes; made if it is missing.
        captions: Their words make the vocabulary.
    """
    words = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
