"""The toy world's tokenizer: a sentencepiece BPE in Llama-2's style (byte fallback, dummy prefix),
trained on sentences of this world."""
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from core.common import write_beside
from data import SYSTEM
from toy.questions import QUESTIONS, ask, caption, grid
from toy.world import CATEGORIES, COLORS, KINDS, SHAPES, WORDS, make_scene

VOCAB, BOS, EOS = 896, 1, 2

# One piece each from the start. The names of things, so that "peaches" comes apart into "peach" and
# "es": the question then holds the very token that names the thing, and looking it up is a match of
# equal tokens. And what the prompt repeats in every sample: the system's sentences would be a third
# of the tokens of a short question.
WHOLE = [" " + SYSTEM, " USER:", "USER:", " ASSISTANT:",
         *(" " + name for name in [*KINDS, *CATEGORIES])]
NAMES = [*KINDS, *SHAPES, *COLORS, *WORDS, *CATEGORIES, *"0123456", "yes", "no"]


def sentences() -> Iterator[str]:
    """What the tokenizer is trained on: questions, answers, captions, names, and every printable
    character of ASCII once."""
    rng = random.Random("tokenizer")
    for i in range(3000):
        scene = make_scene(f"tokenizer/{i}")
        for turn in ask(scene, rng.choice(QUESTIONS), rng) or []:
            yield f"{turn.question} {turn.answer}"
            yield f"({turn.question}"      # after a picture's newline it begins without a space
        yield f"{grid(scene)} {caption(scene)}"
        yield " ".join(rng.sample(NAMES, 40))
    for code in range(32, 127):
        yield chr(code)


def train_tokenizer(out: Path) -> None:
    """Write out/tokenizer.model."""
    def write(tmp: Path) -> None:
        with open(tmp, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(), model_writer=file, model_type="bpe",
                vocab_size=VOCAB, byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, character_coverage=1.0,
                user_defined_symbols=[text.replace(" ", "\u2581") for text in WHOLE],
                unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, num_threads=1, minloglevel=2)

    out.mkdir(parents=True, exist_ok=True)
    write_beside(out / "tokenizer.model", write)
