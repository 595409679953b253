"""Two tokenizers trained on the spot, and records: what the tests of data.py share."""
import json
import random
import re

import pytest
import sentencepiece

from core import tokenizer
from core.tokenizer import Tokenizer
from data import IGNORE, IMAGE_TOKEN, SYSTEM


def tiny_sentencepiece(folder):
    """Made like Llama 2's: BPE, byte fallback, a space in front, nothing normalised."""
    words = ("the a cat dog what is this how many are there in picture of and on it see you hello "
             "question red").split()
    rng = random.Random(0)
    sentences = [SYSTEM] * 20
    for _ in range(300):
        question = " ".join(rng.choices(words, k=6))
        said = f"the {rng.choice(words)} {rng.randrange(99)}."
        sentences.append(f"USER: {question}? ASSISTANT: {said}")
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences),
                                             model_prefix=str(folder / "tokenizer"),
                                             model_type="bpe", vocab_size=420, byte_fallback=True,
                                             normalization_rule_name="identity",
                                             remove_extra_whitespaces=False, minloglevel=2,
                                             unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1)
    return folder


def tiny_byte_level(folder):
    """Made like Llama 3's: no space in front, and tokens of several spaces and of a full stop with
    a line break."""
    letters = list(tokenizer._byte_alphabet())
    merges = [
        "Ġ A", "Ġ t", "t h", "Ġt h", "Ġth e", "U S", "S T", "A S", "Ġ Ġ", "Ċ Ċ", "Ġ Ċ", ". Ċ",
        "? Ċ", "c a", "ca t", "Ġ c", "Ġc at"]
    vocab = {
        token: i for i, token in enumerate(letters + [merge.replace(" ", "") for merge in merges])}
    control = [{"content": "<|bos|>", "id": len(vocab), "special": True},
               {"content": "<|eot|>", "id": len(vocab) + 1, "special": True}]
    split = {
        "type": "Split", "pattern": {"Regex": tokenizer.LLAMA3}, "behavior": "Isolated",
        "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(
        {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
         "added_tokens": control, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eot|>"}))
    return folder


# --------------------------------------------------------------------------------------------------
# LLaVA's way: the whole text first, its labels by tokenising parts of it again and subtracting ones
# and twos

class Llava:
    def __init__(self, tokenizer):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file))

    def inside(self, text):
        """Without the space in front: after a byte that merges with nothing."""
        return self.sp.encode("\x02" + text)[2:]

    def tok(self, text):
        """What its tokenizer (not "legacy") makes of a text: only its very beginning gets a space.
        """
        ids = [1]
        for i, part in enumerate(re.split("(</s>)", text)):
            ids += [2] if part == "</s>" else self.sp.encode(part) if i == 0 else self.inside(part)
        return ids

    def image_tok(self, text):
        """Parts around <image> each on their own, all but the first <s> dropped."""
        first, *others = [self.tok(part) for part in text.split("<image>")]
        for other in others:
            first = first + [IMAGE_TOKEN] + other[1:]
        return first

    @staticmethod
    def text(made):
        questions, answers = turns_of(made)
        out = SYSTEM + " "
        for q, a in zip(questions, answers):
            if "image" in made and "<image>" in q:
                q = ("<image>\n" + q.replace("<image>", "").strip()).strip()
            out += f"USER: {q} ASSISTANT: {a}</s>"
        return out

    def v1(self, made):
        tok = self.image_tok if "image" in made else self.tok
        text = self.text(made)
        ids = tok(text)
        labels, cur = [IGNORE] + ids[1:], 1
        # By how much a round tokenised by itself is longer than in its place after </s>. LLaVA
        # hard-codes Llama's 1.
        longer = len(self.sp.encode("USER:")) - len(self.inside("USER:"))
        for i, part in enumerate(text.split("</s>")):
            if part == "":
                break
            before, _ = part.split(" ASSISTANT: ")
            size, instruction = len(tok(part)), len(tok(before + " ASSISTANT: ")) - 2
            size, instruction = (size - longer, instruction - longer) if i else (size, instruction)
            labels[cur:cur + instruction] = [IGNORE] * instruction
            cur += size
        assert cur == len(ids), "LLaVA would have masked this sample as a whole"
        return ids, labels

    def plain(self, made):
        ids = self.image_tok("<image>" + made["conversations"][1]["value"] + "\n")
        return ids, [IGNORE, IGNORE] + ids[2:]


def record(*texts, **more):
    """Texts of human and gpt by turns."""
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r", **more, "conversations": said}


PIECES = [
    "a", "cat", "the", " the", " ", "  ", "\n", "\n\n", "\t", "2", "17", "0.5", ".", "?", ".\n",
    "?\n", "'s", "A", "<", "USER", "USER:", "ASSISTANT", "ASSISTANT:", "é", "日本", "🙂", "👩‍👩‍👧",
    "\u3000", "\u2581", "\xa0", ">", "</", "image", "\\n", "answer it"]


def words(rng, n=8):
    while True:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, n)))
        if text.strip():
            return text


def random_record(rng):
    texts = [words(rng) for _ in range(2 * rng.randint(1, 4))]
    made = record(*texts)
    if rng.random() < 0.7:
        turn = made["conversations"][2 * rng.randrange(len(texts) // 2)]
        text = turn["value"] if rng.random() < 0.9 else ""       # sometimes nothing but the picture
        at = rng.choice([0, len(text), rng.randint(0, len(text))])
        turn["value"] = text[:at] + "<image>" + rng.choice(["", "\n", " "]) + text[at:]
        made["image"] = "x.png"
    if rng.random() < 0.1:
        made["conversations"].insert(0, {"from": "gpt", "value": "dropped"})
    # A turn that holds the role tag is one which LLaVA can't take apart again, and masks away (we
    # don't: see below).
    rounds = Llava.text(made).split("</s>")[:-1]
    return made if all(part.count(" ASSISTANT:") == 1 for part in rounds) else random_record(rng)


def turns_of(made):
    said = [t for t in made["conversations"] if t["value"] != "dropped"]
    return [t["value"] for t in said[::2]], [t["value"] for t in said[1::2]]


def supervised(sample):
    return [label for label in sample.labels if label != IGNORE]


def of(folders, kind):
    if kind not in folders:
        pytest.skip("NANOCCRA_LLAMA2_TOKENIZER is not set to the path of a Llama-2 tokenizer.model")
    return Tokenizer.from_pretrained(folders[kind])
