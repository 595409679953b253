"""core/tokenizer.py against sentencepiece, Hugging Face's tokenizers and known ids.

Real files, skipped where a variable isn't set: NANOCCRA_LLAMA2_TOKENIZER and
NANOCCRA_LLAMA3_TOKENIZER, the paths of Llama 2's and Llama 3's tokenizer.model; NANOCCRA_SMOLLM2, a
folder with SmolLM2-135M in the Hugging Face layout.
"""
import base64
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

import llama
from core.common import UserError
from core.tokenizer import LLAMA3, Tokenizer

TEXTS = [
    "Hello, world!", "a  cat\n\n\tsat", "12345 67", " leading", "  two", "trailing ", "", "\n", " ",
    "é 世界 🙂 ½ ٣", "it's  don't", "x = [1, 2];\r\n", "<s></s><unk><0x0A><pad>",
    "naïve façade — “quoted”", "\u00a0\u3000wide", "</s>USER: hi"]
WORDS = "the cat sat on a mat USER : ASSISTANT what is this picture of two dogs and red square"


def file_of(variable):
    """A real file that can't be shipped."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set")
    return path


def test_it_is_llamas():
    assert llama.Tokenizer is Tokenizer


# --------------------------------------------------------------------------------------------------
# Sentencepiece

def train_sentencepiece(lines, **how):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out,
                                             model_type="bpe", minloglevel=2, **how)
    return out.getvalue()


@pytest.fixture(scope="module")
def tiny_sp(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("sp"), WORDS.split()
    lines = [" ".join(random.Random(i).choices(words, k=8)) for i in range(300)]
    content = train_sentencepiece(lines, vocab_size=340, byte_fallback=True, unk_id=0, bos_id=1,
                                  eos_id=2, normalization_rule_name="identity",
                                  remove_extra_whitespaces=False)
    (folder / "tokenizer.model").write_bytes(content)
    return folder


def check_sentencepiece(tok):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tok.file))
    assert tok.vocab_size == sp.vocab_size() and (tok.bos_id, tok.eos_ids) == (1, {2})
    r = random.Random(0)
    texts = ["".join(r.choices("ab \n\t'US2é🙂<s>/", k=r.randint(1, 12))) for _ in range(500)]
    for text in TEXTS + texts:
        ids, on = tok.encode(text), tok.encode(text, continues=True)
        assert ids == sp.encode(text) and tok.encode(text, bos=True) == [1] + ids
        assert not {0, 1, 2} & {*ids, *on}
        assert tok.decode(ids) == text == sp.decode(ids)
        # nothing between, control ids are silent
        assert tok.decode([1, *tok.encode("x"), *on, 2]) == "x" + text
        pieces = list(tok.stream(iter(torch.tensor(ids))))
        assert "".join(pieces) == text and "" not in pieces
        assert not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece(tiny_sp):
    tok = Tokenizer.from_pretrained(tiny_sp)
    check_sentencepiece(tok)
    assert tok.encode("USER:", continues=True) != tok.encode("USER:")


def test_a_tokenizer_goes_to_other_processes(tiny_sp):
    """As a reading process that isn't forked takes it: by its file."""
    tok = Tokenizer.from_pretrained(tiny_sp)
    again = pickle.loads(pickle.dumps(tok))
    assert again.encode("a cat") == tok.encode("a cat") and again.eos_ids == tok.eos_ids


def test_streaming_is_immediate(tiny_sp):
    """A piece is handed out as soon as its last id is in, not at the end."""
    tok, seen = Tokenizer.from_pretrained(tiny_sp), []

    def ids():
        for id in tok.encode("a é 🙂 cat"):
            seen.append(id)
            yield id

    behind = [(piece, len(seen)) for piece in tok.stream(ids())]
    assert "".join(piece for piece, _ in behind) == "a é 🙂 cat"
    assert [n for _, n in behind] == sorted({n for _, n in behind}) and behind[0] == ("a", 1)
    cut = tok.encode("é")[:-1]
    assert tok.decode(cut) == "\ufffd"


def test_eos_of_the_config_counts(tiny_sp, tmp_path):
    shutil.copy(tiny_sp / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"llm": {"eos_token_id": [2, 7]}}')
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.eos_ids == {2, 7} and tok.decode([7]) == ""


def test_wrong_tokenizer_files(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.from_pretrained(tmp_path)
    wrong = [(b"IQ== 0\nIg== 1\n", "every single byte"),
             (b"IQ== 0\nIg== x\n", "not tiktoken's format"),
             (b"hello", "neither a sentencepiece model nor")]
    for fallback, words in ((False, "byte fallback"), (True, "changes line breaks")):
        content = train_sentencepiece(["a b c d e f"] * 9, byte_fallback=fallback,
                                      vocab_size=12 + 256 * fallback,
                                      normalization_rule_name="nmt_nfkc")
        wrong.append((content, words))
    for content, words in wrong:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=words):
            Tokenizer.from_pretrained(tmp_path)


def test_ids_outside_the_vocabulary(tiny_sp):
    tok = Tokenizer.from_pretrained(tiny_sp)
    for id in (-1, tok.vocab_size):
        with pytest.raises(UserError, match=f"no token {id}"):
            tok.decode([id])


@pytest.mark.real
def test_llama2_tokenizer(tmp_path):
    shutil.copy(file_of("NANOCCRA_LLAMA2_TOKENIZER"), tmp_path / "tokenizer.model")
    tok = Tokenizer.from_pretrained(tmp_path)
    check_sentencepiece(tok)
    assert tok.vocab_size == 32000
    assert tok.encode("USER:") == [3148, 1001, 29901]
    assert tok.encode("USER:", continues=True) == [11889, 29901]
    assert tok.encode("2") == [29871, 29906] and tok.encode("\n") == [29871, 13]
    assert tok.encode("\nWhat is", continues=True) == [13, 5618, 338]
    assert tok.encode(" ASSISTANT:", continues=True) == [319, 1799, 9047, 13566, 29901]
    assert tok.encode("hi</s><s>") == [7251, 829, 29879, 5299, 29879, 29958]
    assert tok.decode(tok.encode("2") + [2]) == "2"


# --------------------------------------------------------------------------------------------------
# tiktoken's text

GOLDEN3 = {"Hello world": [9906, 1917], " ": [220], "\n": [198],
           "  12345 dogs\n\n\tdon't": [220, 220, 4513, 1774, 12875, 271, 2765, 263, 956],
           "h\u00e9llo \u4e16\u754c \U0001f642": [71, 19010, 385, 127365, 28584]}


@pytest.mark.real
def test_llama3_tokenizer(tmp_path):
    """(The PyPI wheel llama-models holds the file.)"""
    shutil.copy(file_of("NANOCCRA_LLAMA3_TOKENIZER"), tmp_path / "tokenizer.model")
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (tok.vocab_size, tok.bos_id, tok.eos_ids) == (128256, 128000, {128001, 128008, 128009})
    for text, ids in GOLDEN3.items():
        assert tok.encode(text) == tok.encode(text, continues=True) == ids
        assert tok.decode(ids) == text
    typed = tok.encode("<|eot_id|><|begin_of_text|>", bos=True)
    assert typed[0] == 128000 and max(typed[1:]) < 128000
    assert tok.decode(typed) == "<|eot_id|><|begin_of_text|>"


def test_tiktoken_file(tmp_path):
    """A small file in Meta's format: 256 bytes, then "he" and "hel", the lower rank merging first.
    """
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel", b" w"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tok, ids = Tokenizer.from_pretrained(tmp_path), [257, 108, 111, 258]
    assert tok.encode("hello w") == ids and tok.decode(ids) == "hello w"
    assert (tok.vocab_size, tok.bos_id, tok.eos_ids) == (259 + 256, 259, {260, 267, 268})
    assert tok.decode([259, 257, 268]) == "hel"


# --------------------------------------------------------------------------------------------------
# Byte-level BPE

def bpe_folder(dir, kind, shuffle=False):
    """A tiny tokenizer.json trained by the tokenizers library; `shuffle`: ids say nothing about the
    order of merges."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    first = {"gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)],
             "llama3": [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")]}[kind]
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|end|>", "<|start|>"],
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([Path(__file__).read_text()] + TEXTS, trainer)
    spec = json.loads(theirs.to_str())
    if shuffle:
        ids = list(range(2, len(spec["model"]["vocab"])))
        random.Random(0).shuffle(ids)
        vocab = spec["model"]["vocab"].items()
        spec["model"]["vocab"] = {token: id if id < 2 else ids[id - 2] for token, id in vocab}
    (dir / "tokenizer.json").write_text(json.dumps(spec))
    names = {"eos_token": "<|end|>", "bos_token": {"content": "<|start|>"}}
    (dir / "tokenizer_config.json").write_text(json.dumps(names))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    theirs.encode_special_tokens = True                          # "<|end|>" in a text is text
    return theirs


def check_byte_level(tok, expected, controls):
    r = random.Random(0)
    mix, letters = "aab tdre  \n\t'123½é🙂.,!<|end|>", " abcdefghijklmnopqrstuvwxyz"
    texts = TEXTS + [controls, "x" + controls + " 1"]
    texts += ["".join(r.choices(mix, k=r.randint(1, 14))) for _ in range(1500)]
    texts += ["".join(r.choices(letters, k=40)) for _ in range(300)]
    for text in texts:
        ids = tok.encode(text)
        assert ids == expected(text), text
        assert ids == tok.encode(text, continues=True)
        assert tok.encode(text, bos=True) == [tok.bos_id] + ids
        assert not {tok.bos_id, *tok.eos_ids} & {*ids}
        assert tok.decode([tok.bos_id] + ids + list(tok.eos_ids)) == text
        assert not any("\ufffd" in piece or not piece for piece in tok.stream(ids))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3"])
def test_byte_level_bpe(kind, shuffle, tmp_path):
    theirs = bpe_folder(tmp_path, kind, shuffle)
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (1, {0}, 700)
    check_byte_level(tok, lambda text: theirs.encode(text, add_special_tokens=False).ids,
                     "<|end|><|start|>")


UNKNOWN = "not a byte-level BPE of a kind known"


@pytest.mark.parametrize("change, words", [
    (lambda s: s.update(normalizer={"type": "NFC"}), UNKNOWN),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), UNKNOWN),
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), UNKNOWN),
    (lambda s: s["model"].update(byte_fallback=True), "tokenizer.model"),
    (lambda s: s["added_tokens"][0].update(special=False), "added tokens that are not special"),
    (lambda s: s["model"]["vocab"].update({"日": 700}), "not a letter of the byte alphabet"),
    (lambda s: s["added_tokens"].pop(0), "eos_token '<.end.>' is not among the added tokens"),
])
def test_unknown_tokenizers_are_refused(change, words, tmp_path):
    bpe_folder(tmp_path, "gpt2")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=words):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_must_know_its_eos(tmp_path):
    bpe_folder(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="which token ends a text"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0, "bos_token_id": null}')
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.eos_ids == {0} and tok.bos_id is None
    with pytest.raises(UserError, match="no bos token"):
        tok.encode("a", bos=True)


@pytest.mark.real
def test_smollm2_tokenizer():
    dir = file_of("NANOCCRA_SMOLLM2")
    tok = Tokenizer.from_pretrained(dir)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(dir)

    def expected(text):
        return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)

    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (1, {2}, 49152)
    check_byte_level(tok, expected, "<|im_start|>user<|im_end|>")
    words = [word for id in range(tok.vocab_size) if "\ufffd" not in (word := tok.decode([id]))]
    assert len(words) > 48000 and all(tok.encode(word) == expected(word) for word in words)
    mix = ["".join(random.Random(i).choices(words, k=6)) for i in range(1500)]
    assert all(tok.encode(text) == expected(text) for text in mix)
