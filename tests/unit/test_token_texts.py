"""A character of several tokens: the feature store and the model show it at the same token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from activations.models.tokenizer import TextCodec
from store.vocabulary import Vocabulary

TEXTS = (
    "le café 水 🙂 naïve", "🌧️🌧️ and 雨", "é", "aé", "éa", "日本語のテキスト", "x", "🙂", "ÿÿ",
    "mixed ünïcödé — “quotes” …", "tab\tand\nline",
)  # fmt: skip


def byte_level(vocab_size: int, corpus: Sequence[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback() -> Any:
    """As Llama's: pieces of SentencePiece, and a token for each byte."""
    words = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "bytes": lambda: byte_level(257, TEXTS),
    "merged bytes": lambda: byte_level(330, TEXTS * 3),
    "fallback": byte_fallback,
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_show_a_character_at_the_same_token(kind: str) -> None:
    codec = TextCodec(KINDS[kind]())
    words = codec.vocabulary(codec._size)
    partial = {n: word for n, word in enumerate(words) if isinstance(word, bytes)}
    vocabulary = Vocabulary([word if isinstance(word, str) else "" for word in words], partial)
    assert partial
    rng = np.random.default_rng(0)
    texts = [*TEXTS, *("".join(rng.permutation(list("".join(TEXTS)))) for _ in range(20))]
    split = 0
    for text in texts:
        (ids,) = codec.encode_batch([text])
        shown = vocabulary.decode(ids)
        assert shown == codec.pieces(ids)
        assert "".join(shown) == text
        split += shown.count("")
    assert split > 20
    (ids,) = codec.encode_batch(["é"])
    if len(ids) > 1:
        assert vocabulary.decode(ids) == ["", "é"]
