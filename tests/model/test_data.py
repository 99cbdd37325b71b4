"""Corpora, tokenizers, baselines and batches: what goes in comes out, and the same for the same seed and step."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from illada.byte_pairs import Chain
from illada.errors import DataError
from illada.tokenizer import (
    FILE,
    ByteTokenizer,
    JsonTokenizer,
    from_json,
    load_tokenizer,
    make_tokenizer,
    stream,
)
from illada.training.data import Document, Windows, ngram_bits, read_corpus, split
from illada.training.evaluate import bound, first_bytes
from illada.training.pairs import Pairs

from tests.helpers.models import make, tiny

TEXT = "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return f(x) * 2\n" * 20


# ---- corpora -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_sorted_and_passes_over_binary_empty_and_hidden_ones(tmp_path):
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("zé")
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / ".hidden").write_text("no")
    assert [(d.name, d.content.decode()) for d in read_corpus(tmp_path)] == [("a/z.txt", "zé"), ("b.py", "b")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"a\0b", "binary"), (b"\xff\xfe", "binary")]
)
def test_an_empty_or_binary_file_is_refused_with_what_to_do(tmp_path, content, message):
    file = tmp_path / "corpus"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{message}.*give a file or folder of UTF-8 text"):
        read_corpus(file)


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_corpus(tmp_path / "nowhere")
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"holds no UTF-8 text \(1 files"):
        read_corpus(tmp_path)


def test_the_default_corpus_is_the_standard_library_without_tests_and_tables():
    names = {d.name for d in read_corpus()}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("test" in name.split("/") or name.startswith("encodings/") for name in names)


def test_a_file_stays_on_its_side_of_the_split_when_others_come():
    few = [Document(f"{i}.py", b"x") for i in range(100)]
    train, held_out = split(few)
    more_train, more_held_out = split([*few, *(Document(f"new{i}.py", b"y") for i in range(100))])
    assert set(train) <= set(more_train) and set(held_out) <= set(more_held_out)
    # 5 of 100 are expected; a fair hash leaves 1 .. 14 with probability above 0.993
    assert 1 <= len(held_out) <= 14


def test_one_document_is_split_at_a_line_and_one_line_is_refused():
    train, held_out = split([Document("a", TEXT.encode())])
    assert train[0].content + held_out[0].content == TEXT.encode()
    assert len(held_out[0].content.splitlines()) == 6  # 5% of 120 lines
    with pytest.raises(DataError, match="one line only"):
        split([Document("a", b"just one line")])


def test_ngram_bits_are_those_of_the_counted_models():
    train, held_out = [Document("a", b"abab"), Document("b", b"ba")], [Document("c", b"aab")]
    singles, pairs = Counter("ababba"), Counter(["\0a", "ab", "ba", "ab", "\0b", "ba"])
    p = {c: (singles[c] + 1) / (6 + 256) for c in "ab"}

    def after(a: str, b: str) -> float:
        return (pairs[a + b] + p[b]) / (sum(n for pair, n in pairs.items() if pair[0] == a) + 1)

    unigram = -sum(math.log2(p[c]) for c in "aab") / 3
    bigram = -sum(math.log2(after(a, b)) for a, b in ("\0a", "aa", "ab")) / 3
    found = ngram_bits(train, held_out)
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)


# ---- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> ByteTokenizer:
    return ByteTokenizer.learn([Document("a", TEXT.encode())], 275)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_every_text_survives_encoding_with_and_without_merges(learned, text):
    for tokenizer in (ByteTokenizer(), learned):
        ids = tokenizer.encode(text.encode())
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.dtype == np.int64 and (ids < tokenizer.vocab_size).all()
        assert not {tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids.tolist())


def test_learning_joins_the_most_frequent_pair_first_and_shortens_the_text(learned):
    first = ByteTokenizer.learn([Document("a", b"abcab abd xy")], 260)  # "ab" three times, all else less often
    assert first.merges == [(ord("a"), ord("b"))]
    assert learned.vocab_size == 275
    assert len(learned.encode(TEXT.encode())) < len(TEXT) / 2


def test_learning_counts_overlapping_and_changing_pairs_as_a_recount_would():
    text = b"aaaa aaab abab bbbb aabb abba baab" * 3
    words = [[*w] for w in Counter(w for w in re.findall(rb" ?[a-z]+", text)).elements()]
    merges = []
    for new in range(259, 265):
        counts = Counter(p for w in words for p in pairwise(w))
        pair = min(counts, key=lambda p: (-counts[p], p))
        merges.append(pair)
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == pair:
                    w[i : i + 2] = [new]
                i += 1
    assert ByteTokenizer.learn([Document("a", text)], 265).merges == merges


def test_broken_utf8_and_special_ids_decode_to_something():
    assert ByteTokenizer().decode([0xC3, 256, 65, 257]) == "\ufffdA"


def test_tokenizers_are_read_back_from_json(learned, tmp_path):
    again = from_json(json.loads(json.dumps(learned.to_json())))
    assert (again.encode(TEXT.encode()) == learned.encode(TEXT.encode())).all()
    (tmp_path / FILE).write_text(json.dumps(learned.to_json()))
    assert load_tokenizer(tmp_path, 275, 256, 257, 258).vocab_size == 275


def test_a_tokenizers_json_file_is_accepted_and_gets_the_special_ids_it_lacks(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"def": 0, "x": 1, "[UNK]": 2, "<mask>": 3}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    file = tmp_path / "words.json"
    inner.save(str(file))
    tokenizer = make_tokenizer(str(file), [])
    assert tokenizer.encode(b"def x def").tolist() == [0, 1, 0]
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (3, 4, 5, 6)
    assert tokenizer.decode([0, 3, 1, 4, 5]) == "def x"
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert isinstance(again, JsonTokenizer) and again.vocab_size == 6


def test_what_is_no_tokenizer_is_refused(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"model": 1}')
    with pytest.raises(DataError, match="not a tokenizers JSON file"):
        make_tokenizer(str(bad), [])
    with pytest.raises(DataError, match="cannot be read"):
        make_tokenizer(str(tmp_path / "missing.json"), [])
    with pytest.raises(DataError, match="N above 259"):
        make_tokenizer("bpe:100", [])
    with pytest.raises(DataError, match="merge 0 joins ids 300 and 1"):
        from_json({"kind": "bytes", "merges": [[300, 1]]})
    with pytest.raises(DataError, match="expected kind"):
        from_json([1])
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path, 1000, 256, 257, 258)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_tokenizer(tmp_path, 1000, 256, 257, 258)


# ---- streams and batches -------------------------------------------------------------------------------------------


def test_every_text_in_the_stream_ends_with_the_end_of_text_id():
    ids = stream([Document("a", b"xy"), Document("b", b"z")], ByteTokenizer())
    assert ids.tolist() == [120, 121, 257, 122, 257]


def test_first_bytes_cuts_at_a_character():
    documents = [Document("a", b"ab"), Document("b", "éé".encode()), Document("c", b"c")]
    assert [d.content.decode() for d in first_bytes(documents, 5)] == ["ab", "é"]
    assert first_bytes(documents, None) == documents


def test_a_batch_depends_on_seed_and_step_alone():
    ids = np.arange(1000)
    one, other = Windows(ids, 16, 3, seed=5), Windows(ids, 16, 3, seed=5)
    late_first = [other.batch(step) for step in (70, 3, 0)]
    assert all((one.batch(step) == late).all() for step, late in zip((70, 3, 0), late_first))
    assert (one.batch(0) != Windows(ids, 16, 3, seed=6).batch(0)).any()


def test_an_epoch_shows_every_window_once_at_one_offset():
    windows = Windows(np.arange(1000), 10, 1, seed=0)
    starts = [int(windows.batch(step)[0, 0]) for step in range(windows.per_epoch)]
    assert len(set(starts)) == len(starts) == 99
    assert len({start % 10 for start in starts}) == 1
    assert all(windows.batch(3)[0] == np.arange(10) + starts[3])


def test_every_epoch_has_an_order_and_an_offset_of_its_own():
    windows = Windows(np.arange(1000), 10, 1, seed=0)
    epochs = [[int(windows.batch(99 * e + i)[0, 0]) for i in range(99)] for e in range(4)]
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 4
    assert len({epoch[0] % 10 for epoch in epochs}) > 1


def test_a_stream_shorter_than_a_window_is_repeated():
    assert set(Windows(np.arange(3), 8, 2, seed=0).batch(0).ravel().tolist()) == {0, 1, 2}


@pytest.mark.filterwarnings("error")
def test_negative_seeds_are_seeds_of_their_own():
    batches = [Windows(np.arange(900), 8, 4, seed).batch(0).tolist() for seed in (-1, -2, 0)]
    assert batches[0] != batches[1] != batches[2] != batches[0]


# ---- text is never changed silently --------------------------------------------------------------------------------


def json_tokenizer(special=("<|endoftext|>", "<|mdm_mask|>"), change=lambda t: None) -> JsonTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    made.pre_tokenizer, made.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    alphabet = level.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[*special], initial_alphabet=alphabet)
    made.train_from_iterator(["abc"], trainer)
    change(made)
    return JsonTokenizer(made.to_str())


def test_truncation_and_padding_saved_in_a_file_are_off():
    text = b"hello world, this is a long document. " * 200
    for change in (lambda t: t.enable_truncation(16), lambda t: t.enable_padding(length=64, pad_id=0, pad_token="!")):
        tokenizer = json_tokenizer(change=change)
        for one in (text, b"hi"):
            assert tokenizer.decode(tokenizer.encode(one).tolist()).encode() == one
        assert len(stream([Document("a", text)], tokenizer)) == len(tokenizer.encode(text)) + 1


def test_text_that_spells_a_special_token_stays_text():
    tokenizer = json_tokenizer()
    text = b"a <|mdm_mask|> b <|endoftext|>"
    ids = tokenizer.encode(text).tolist()
    assert not {tokenizer.mask_id, tokenizer.eos_id} & {*ids}
    assert tokenizer.decode(ids).encode() == text
    with_end = tokenizer.encode(b"a<|endoftext|>", special=True).tolist()
    assert with_end[-1] == tokenizer.eos_id  # what a prompt's chat template spells is meant
    with pytest.raises(DataError, match=r"the text spells <\|mdm_mask\|>, the token of mask_id"):
        tokenizer.encode(text, special=True)


def test_text_that_cannot_but_give_a_special_token_is_refused_with_its_name():
    tokenizer = json_tokenizer(("<|endoftext|>",), change=lambda t: t.add_tokens(["<mask>"]))  # not marked as special
    with pytest.raises(DataError, match=r"b\.txt: the text spells <mask>, the token of mask_id; take it out"):
        stream([Document("a.txt", b"fine"), Document("b.txt", b"a <mask> b")], tokenizer)
    line = json.dumps({"prompt": "a", "response": "<mask>"})
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: the text spells <mask>"):
        Pairs([Document("x.jsonl", line.encode())], tokenizer, 32, 1, 0)
    with pytest.raises(DataError, match="expected UTF-8 text, got byte 0xff at 1"):
        tokenizer.encode(b"a\xff")


def test_json_lines_end_at_newlines_alone():
    pairs = [{"prompt": "a", "response": f"b{char}c"} for char in "\u2028\u2029\x85\x0b\x0c\x1c\r"]
    lines = "\r\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    rows = Pairs([Document("x.jsonl", b"\xef\xbb\xbf" + lines.encode())], ByteTokenizer(), 32, 1, 0).rows
    assert [ByteTokenizer().decode(row.tolist()) for row, _ in rows] == ["a" + p["response"] for p in pairs]


def test_a_tokenizer_that_loses_text_has_no_bits_per_byte():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "[MASK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    lower = json_tokenizer(change=lambda t: setattr(t, "normalizer", tokenizers.normalizers.Lowercase()))
    for tokenizer, message in (
        (JsonTokenizer(words.to_str()), r"a: .* from character 0 on: 'Some text' became '\[UNK\] \[UNK\]'"),
        (lower, "a: the tokenizer does not give the text back, from character 0 on: 'Some text' became 'some text'"),
    ):
        ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": -1}
        model = make(tiny(vocab_size=tokenizer.vocab_size, **ids))
        with pytest.raises(DataError, match=message):
            bound(model, [Document("a", b"Some text")], tokenizer, length=8)


def quadratic_merges(words: Counter[bytes], rounds: int) -> list[tuple[int, int]]:
    """Byte-pair encoding by its definition: count all pairs anew in each round."""
    texts = {word: list(word) for word in words}
    merges: list[tuple[int, int]] = []
    while len(merges) < rounds:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, ids in texts.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        for word, ids in texts.items():
            joined, i = [], 0
            while i < len(ids):
                hit = tuple(ids[i : i + 2]) == best
                joined.append(259 + len(merges) if hit else ids[i])
                i += 2 if hit else 1
            texts[word] = joined
        merges.append(best)
    return merges


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab ", max_size=30), max_size=8))
def test_the_merges_are_those_of_the_definition(texts):
    documents = [Document("a", text.encode()) for text in texts]
    words = Counter(piece for d in documents for piece in re.findall(rb" ?[a-z]+|\s+", d.content))
    tokenizer = ByteTokenizer.learn(documents, 259 + 20)
    assert tokenizer.merges == quadratic_merges(words, 20)
    for document in documents:
        assert tokenizer.decode(tokenizer.encode(document.content).tolist()).encode() == document.content


@pytest.mark.parametrize("alphabet", ["0123456789abcdef", "的一是不了人我在有他", "a"])
def test_learning_does_not_depend_on_how_long_words_are(alphabet):
    """The work is counted, not timed: places that are looked at, summed over all rounds, at most 20 per byte."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice([*alphabet], 6000)).encode()
    looked, join = 0, Chain.join

    def counting(self, pair, joined):
        nonlocal looked
        looked += len(self.places[pair])
        return join(self, pair, joined)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "join", counting)
        seen: list[float] = []
        tokenizer = ByteTokenizer.learn([Document("a", text)], 1024, progress=seen.append)
    assert 0 < looked <= 20 * len(text)
    assert seen == sorted(seen) and len(seen) == len(tokenizer.merges) and 0 < seen[-1] <= 1
    assert tokenizer.decode(tokenizer.encode(text).tolist()).encode() == text


def test_the_folders_of_runs_and_names_of_any_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for folder in ("run", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "log.txt").write_text("not text to train on")
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path)  # a circle
    odd = tmp_path / os.fsdecode(b"\xff.txt")
    odd.write_text("odd")
    documents = read_corpus(tmp_path, leave_out=tmp_path / "out")
    assert {d.name for d in documents} == {"a.txt", odd.name}
    split([*documents, *(Document(f"{i}", b"x\n" * 9) for i in range(99))])
    assert len(read_corpus(tmp_path / "run")) == 2  # a folder that is named itself is read
