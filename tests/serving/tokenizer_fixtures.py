"""Tiny tokenizers of the two families that real models use, trained in milliseconds."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_TEXT = [
    "hello world héllo wörld 你好 世界 emoji 🙂🙃 the cat sat on the mat",
    "a stop string ends the text; END of the line\nand a new one",
] * 5
BYTE_LEVEL_SIZE = 400


@functools.cache
def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it: any text encodes; ids may split bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """SentencePiece-style BPE with bytes for what it does not know, as Llama 2 and Gemma have."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    names += ["▁", "▁▁", "▁a", "▁the", "h", "e", "he", "l", "o", "é", "\ufffd", "x"]
    merges = [("h", "e"), ("▁", "▁")]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    """A unigram model whose first space is the decoder's to drop, as T5 has it."""
    pieces = [("<unk>", 0.0), *((p, -1.0) for p in ("▁", "▁a", "▁the", "h", "e", "l", "▁▁"))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@functools.cache
def suffixed() -> Tokenizer:
    """BPE with an end-of-word suffix, as GPT-1 has it."""
    names = ["<unk>", "a", "b</w>", "cd</w>", "e", "</w>"]
    model = models.BPE({n: i for i, n in enumerate(names)}, [], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


@functools.cache
def word_piece() -> Tokenizer:
    """Pieces marked with ##, as BERT has it; the decoder also tidies punctuation."""
    names = ["[UNK]", "hello", "##lo", ".", "'", "s", "do", "n't", "!"]
    tokenizer = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


FAMILIES = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "suffixed": suffixed,
    "word_piece": word_piece,
}
