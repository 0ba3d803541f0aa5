"""Characters as tokens: a transformers fast tokenizer over printable ASCII, the newline and four special tokens."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>", "unk_token": "<unk>"}  # ids 0 to 3
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 100 in all; nothing is added, so that decoding gives back the text that was encoded."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), *ALPHABET])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)
