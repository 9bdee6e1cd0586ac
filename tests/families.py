"""A tokenizer of each family, trained on words of a few letters, with the layout that those of its family have."""

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DebertaV2Tokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

FRONT = ("<s>", "<pad>", "</s>", "<unk>")
BYTE_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = ["".join(letters) for length in (1, 2, 3) for letters in product("abcé", repeat=length)]
CORPUS += [" ".join(CORPUS[start::7]) for start in range(7)] + ["aaaa aaaaaaaa", "abcabc bcabca", "abc abc abc abc"]


def bpe(pre_tokenizer: Any, alphabet: list[str], special: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    """The model of a trained BPE: its vocabulary and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 80, special_tokens=list(special), initial_alphabet=alphabet,
        show_progress=False, **options,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return dict(json.loads(tokenizer.to_str())["model"])


def unigram(special: tuple[str, ...], first: str) -> list[tuple[str, float]]:
    """The pieces of a trained Unigram, then one that scores less than all others and never occurs."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=len(special) + 60, special_tokens=list(special), unk_token=first, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(piece, round(score, 4)) for piece, score in pieces] + [("zq", -40.0)]


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def merges_of(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [(first, second) for first, second in model["merges"]]


def roberta() -> PreTrainedTokenizerBase:
    model = bpe(byte_level(), BYTE_LETTERS, FRONT)
    return RobertaTokenizer(vocab=model["vocab"] | {"<mask>": len(model["vocab"])}, merges=merges_of(model))


def gpt2() -> PreTrainedTokenizerBase:
    model = bpe(byte_level(), BYTE_LETTERS)
    return GPT2Tokenizer(vocab=model["vocab"] | {"<|endoftext|>": len(model["vocab"])}, merges=merges_of(model))


def llama() -> PreTrainedTokenizerBase:
    """As sentencepiece gives it: every two pieces that make a third are a merge, so that some are made in many ways."""
    model = bpe(pre_tokenizers.Metaspace(), [], ("<unk>", "<s>", "</s>", *BYTES))
    pieces = model["vocab"]
    pairs = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    return LlamaTokenizer(vocab=pieces, merges=[(a, b) for a, b in pairs if a in pieces and b in pieces])


def modernbert() -> PreTrainedTokenizerBase:
    """Special tokens after all pieces, and a run of spaces as a token that is not special."""
    model = bpe(byte_level(), BYTE_LETTERS)
    backend = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges_of(model)))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizers.NFC(), byte_level(), decoders.ByteLevel()
    backend.add_tokens([AddedToken("   ", normalized=True)])
    return with_template(backend, ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"))


def whole_words() -> PreTrainedTokenizerBase:
    """As Llama 3's: a word that is a piece is taken whole, though no merges may lead there; two processors in a row."""
    model = bpe(byte_level(), BYTE_LETTERS)
    pieces = dict.fromkeys([*model["vocab"], *("".join(letters) for letters in product("Ġ", "abc", "abc", "abc"))])
    numbered = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=numbered, merges=merges_of(model), ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = byte_level(), decoders.ByteLevel()
    return with_template(backend, ("[UNK]", "[CLS]", "[SEP]", "[PAD]"), processors.ByteLevel(trim_offsets=False))


def marked(prefix: str = "", suffix: str = "") -> PreTrainedTokenizerBase:
    """A BPE of characters that marks pieces which go on a word, or end it, as OpenAI's first GPT does."""
    marks = {"continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    special = ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
    model = bpe(pre_tokenizers.Whitespace(), [], special, **marks)
    backend = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges_of(model), unk_token="[UNK]", **marks))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix=suffix or "</w>")
    return with_template(backend, special)


def with_template(
    backend: Tokenizer, special: tuple[str, ...], before: processors.PostProcessor | None = None
) -> PreTrainedTokenizerBase:
    backend.add_special_tokens(list(special))
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    backend.post_processor = processors.Sequence([before, template]) if before else template
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def xlm_roberta() -> PreTrainedTokenizerBase:
    return XLMRobertaTokenizer(vocab=[*unigram(FRONT, "<unk>"), ("<mask>", 0.0)])


def deberta() -> PreTrainedTokenizerBase:
    """[MASK] comes after all pieces, and is none of them."""
    return DebertaV2Tokenizer(vocab=unigram(("[PAD]", "[CLS]", "[SEP]", "[UNK]"), "[UNK]"))


def unigram_bytes() -> PreTrainedTokenizerBase:
    """Characters without a piece become bytes; the unknown token has the last id."""
    pieces = [*unigram(BYTES, BYTES[0]), ("[UNK]", 0.0)]  # type: ignore[arg-type]
    backend = Tokenizer(models.Unigram(pieces, unk_id=len(pieces) - 1, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return with_template(backend, ("[UNK]", "[CLS]", "[SEP]", "[PAD]"))


MADE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "roberta": roberta, "gpt2": gpt2, "llama": llama, "modernbert": modernbert, "whole_words": whole_words,
    "prefix": lambda: marked(prefix="##"), "suffix": lambda: marked(suffix="</w>"),
    "xlm_roberta": xlm_roberta, "deberta": deberta, "unigram_bytes": unigram_bytes,
}  # fmt: skip
LOSSLESS = ("roberta", "gpt2", "modernbert", "whole_words", "llama", "unigram_bytes")
make = cache(lambda family: MADE[family]())
