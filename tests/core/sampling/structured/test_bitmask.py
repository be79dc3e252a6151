"""The packed mask against a loop over its bits, and the vocabulary that its bits stand for."""

import numpy as np
import pytest
import torch

from fairlead.ops.reference import apply_token_bitmask
from fairlead.sampling.structured.backend import Vocabulary, create_backend, greedy_tokens
from fairlead.tokenization.tokenizer import Tokenizer


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_leaves_what_its_bits_allow(vocab_size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(vocab_size)
    num_words = (vocab_size + 32) // 32
    words = rng.integers(-(2**31), 2**31, (5, num_words)).astype(np.int32)
    words[0], words[1] = -1, 0
    logits = torch.from_numpy(rng.standard_normal((5, vocab_size))).to(dtype)
    before = logits.clone()
    masked = apply_token_bitmask(logits, torch.from_numpy(words))
    for row in range(5):
        for i in range(vocab_size):
            is_allowed = int(words[row, i // 32]) >> (i % 32) & 1
            assert masked[row, i] == (logits[row, i] if is_allowed else -torch.inf)
    assert torch.equal(logits, before)


def test_special_tokens_and_missing_ones_add_nothing(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    assert vocabulary.tokens[3] == b""
    assert vocabulary.tokens[tokenizer.encode("a")[0]] == b"a"
    padded = Vocabulary.of(tokenizer, 1100)
    assert padded.tokens[1024:] == (b"",) * 76
    assert (padded.end_id, padded.num_words) == (1100, 35)
    assert Vocabulary(tokens=(b"a",) * 31).num_words == 1
    assert Vocabulary(tokens=(b"a",) * 32).num_words == 2


def test_text_is_written_as_the_tokenizer_would_but_never_with_special_tokens(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode is not None
    for text in ("the king", "<|end|>", "漢 🎉"):
        assert b"".join(vocabulary.tokens[i] for i in vocabulary.encode(text.encode())) == text.encode()


def test_the_longest_token_comes_first() -> None:
    assert greedy_tokens(b"abcab?x", {b"a": 0, b"b": 1, b"ab": 2, b"c": 3, b"x": 4}) == [2, 3, 2]


def test_a_fork_stands_where_its_matcher_stood(backend_name: str, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    matcher = create_backend(backend_name, vocabulary).compile("regex", "ab|ac").start()
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    assert matcher.accept(a)
    fork = matcher.fork()
    assert matcher.accept(b)
    assert (matcher.is_finished, fork.is_finished) == (True, False)
    row_W = np.zeros(vocabulary.num_words, np.int32)
    fork.fill_bitmask(row_W)
    allowed = np.flatnonzero(np.unpackbits(row_W.view(np.uint8), bitorder="little"))
    assert allowed.tolist() == sorted([b, c])
    assert fork.accept(c)
    assert fork.is_finished


def test_the_end_alone_is_left_after_a_complete_output(
    backend_name: str, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    matcher = create_backend(backend_name, vocabulary).compile("regex", "a").start()
    row_W = np.zeros(vocabulary.num_words, np.int32)
    matcher.fill_bitmask(row_W)
    assert not int(row_W[vocabulary.end_id // 32]) >> vocabulary.end_id % 32 & 1
    assert matcher.accept(tokenizer.encode("a")[0])
    matcher.fill_bitmask(row_W)
    allowed = np.flatnonzero(np.unpackbits(row_W.view(np.uint8), bitorder="little"))
    assert allowed.tolist() == [vocabulary.end_id]


def test_no_mask_leaves_utf8(backend_name: str, vocabulary: Vocabulary) -> None:
    """Behind the first byte of a character only those may come that make it one."""
    bytes_of = {token[0]: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}
    for lead, bad in ((0xE0, 0x9F), (0xED, 0xA0), (0xF0, 0x8F), (0xF4, 0x90)):
        matcher = create_backend(backend_name, vocabulary).compile("regex", "[^a]{3}").start()
        assert matcher.accept(bytes_of[lead])
        row_W = np.zeros(vocabulary.num_words, np.int32)
        matcher.fill_bitmask(row_W)
        assert not int(row_W[bytes_of[bad] // 32]) >> bytes_of[bad] % 32 & 1
