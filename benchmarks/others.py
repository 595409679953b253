"""What other people's harnesses would say of the same answers, whose numbers stand beside ours:
lmms-eval (75571cf) and VLMEvalKit (e8e78f0).

Only the reading of an answer is theirs. Their prompts differ as well, so that even by the same rule
a model's numbers would: TextVQA without its line of OCR tokens costs LLaVA-1.5-7B 12 points. MMMU
by lmms-eval isn't here: its draws depend on the run, and its open questions are all wrong of late.
"""
import re
import string

from benchmarks.normalise import (
    CONTRACTIONS,
    PERIOD_VLMEVALKIT,
    evalai,
    strip_punctuation,
    vqa,
    vqa_accuracy,
)

# --------------------------------------------------------------------------------------------------
# lmms-eval

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa_lmms_eval(text: str, gold: str) -> bool:
    """Without regard to case and punctuation."""
    return text.lower().translate(NO_PUNCTUATION) == gold.lower().translate(NO_PUNCTUATION)


def scienceqa_lmms_eval(text: str, letter: str) -> bool:
    """The letter, or the letter and a period, whatever follows."""
    text = text.strip()
    return text.lower() == letter.lower() or text[:2] == letter + "."


def vizwiz_lmms_eval(uploaded: str, humans: list[str]) -> float:
    """Both sides in `evalai`'s form; what is uploaded is in it."""
    return vqa_accuracy(uploaded, [evalai(human) for human in humans])


def seed_lmms_eval(text: str, letter: str) -> bool:
    """The first character, so that "Because" is a B."""
    return text.strip()[:1].lower() == letter.strip().lower()


def mme_lmms_eval(text: str) -> str:
    """What is handed to MME's own reading: without periods, a lone y or n as the word."""
    text = text.lower().strip().replace(".", "")
    return dict(y="yes", n="no").get(text, text)


def pope_lmms_eval(text: str) -> str:
    """What has to be yes or no; anything else is wrong."""
    return text.lower().strip()


# --------------------------------------------------------------------------------------------------
# VLMEvalKit

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
MARKS_TO_SPACES = str.maketrans(".()[],:;!*#{}", " " * 13)


def can_infer(answer: str, options: dict[str, str]) -> str | None:
    """The letter that VLMEvalKit, and MMBench's server, read from an answer without asking a
    language model; None if they find none, Z for a refusal.

    options: {letter: text}. A letter in words; else the one option whose text is part of the
    answer.
    """
    if "Failed to obtain answer via API" not in answer:
        if letter := inferred_letter(answer, options):
            return letter
    if len(answer.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def inferred_letter(answer: str, options: dict[str, str]) -> str | None:
    """The one letter among the words, unless four or more follow it ("A dog is on the left"); else
    that of "answer is B"."""
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    tokens = answer.translate(MARKS_TO_SPACES).split()
    letters = [letter for letter in options if letter in tokens]
    if len(letters) == 1 and tokens.index(letters[0]) > len(tokens) - 5:
        return letters[0]
    if not letters and "Z" in tokens:
        return "Z"
    said = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer)
    if said and said[1].upper() in options:
        return said[1].upper()
    return None


def gqa_vlmevalkit(text: str, gold: str) -> bool:
    return text.strip().lower() == gold.strip().lower()


def textvqa_vlmevalkit(text: str, humans: list[str]) -> float:
    """Both sides in the older normal form, with the look-behind for periods as it was meant."""
    humans = [vqa(human, CONTRACTIONS, PERIOD_VLMEVALKIT) for human in humans]
    return vqa_accuracy(vqa(text, CONTRACTIONS, PERIOD_VLMEVALKIT), humans)


def yes_or_no_vlmevalkit(text: str) -> str | None:
    """The word yes or no, anywhere; None if there are both or neither."""
    said = set(strip_punctuation(text.lower(), PERIOD_VLMEVALKIT).split()) & {"yes", "no"}
    return said.pop() if len(said) == 1 else None
