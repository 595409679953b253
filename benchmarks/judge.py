"""What answers are worth beside the right ones, of any questions: one's own exam (exam.py), and
held-out records while training (training/val.py). Nothing here needs torch.

    exact    the same text, without the blanks around it
    vqa      the same by the normal form of the VQA challenge: case, articles, punctuation and
             number words don't count ("The dog." is "dog", "two" is 2)
    yes_no   of the questions whose right answer is yes or no: what the first word says, "yes",
             "no", or neither, which is wrong and no yes

All are shares, 0 to 1, each with its 95% interval (statistics.py). Beside them stands the majority:
how often the commonest right answer is right, whatever is asked.
"""
from collections import Counter, defaultdict

from benchmarks.normalise import CONTRACTIONS, vqa
from benchmarks.pope import f1_shares, measures
from benchmarks.statistics import margin

Pair = tuple[str, str, str]               # what was said, what is right, the kind of question
YES_NO = ("accuracy", "precision", "recall", "f1")


def judge(pairs: list[Pair]) -> dict:
    """{"exact", "vqa", "majority", "n", "yes_no", "intervals", "kinds"} of at least one answer.

    intervals: {"exact": [low, high], "vqa": ...}. yes_no: None without such questions, else YES_NO,
    "n", and "intervals" of its own. kinds: {kind: the same, without kinds}, of the questions whose
    kind isn't "".
    """
    kinds = defaultdict(list)
    for pair in pairs:
        kinds[pair[2]].append(pair)
    named = {kind: measure(kinds[kind]) for kind in sorted(kinds) if kind}
    return measure(pairs) | dict(kinds=named)


def measure(pairs: list[Pair]) -> dict:
    """`judge`, without kinds."""
    right = Counter(right.strip() for _, right, _ in pairs)
    values = dict(exact=[is_exact(said, right) for said, right, _ in pairs],
                  vqa=[is_vqa(said, right) for said, right, _ in pairs])
    shares = {name: sum(of) / len(of) for name, of in values.items()}
    return shares | dict(majority=max(right.values()) / len(pairs), n=len(pairs),
                         yes_no=yes_no(pairs),
                         intervals={name: interval(shares[name], values[name]) for name in values})


def is_exact(said: str, right: str) -> bool:
    return said.strip() == right.strip()


def is_vqa(said: str, right: str) -> bool:
    """Of a right answer whose normal form is empty (the letter A is an article) case doesn't count.
    """
    normal = vqa(right, CONTRACTIONS)
    if not normal:
        return said.strip().casefold() == right.strip().casefold()
    return is_exact(said, right) or vqa(said, CONTRACTIONS) == normal


def word_of(text: str) -> str | None:
    """Yes or no, by an answer's first word; None: neither."""
    first = vqa(text, CONTRACTIONS).split()[:1]
    return first[0] if first in (["yes"], ["no"]) else None


def yes_no(pairs: list[Pair]) -> dict | None:
    """See `judge`. Precision is None if nobody said yes, recall and f1 if it is never right."""
    normal = [(word_of(said), vqa(right, CONTRACTIONS)) for said, right, _ in pairs]
    pairs = [(word, label) for word, label in normal if label in ("yes", "no")]
    if not pairs:
        return None
    found = {name: value / 100 for name, value in measures(pairs).items()}
    values = dict(accuracy=[word == label for word, label in pairs],
                  precision=[label == "yes" for word, label in pairs if word == "yes"],
                  recall=[word == "yes" for word, label in pairs if label == "yes"],
                  f1=f1_shares(pairs) if any(label == "yes" for _, label in pairs) else [])
    found = {name: found[name] if values[name] else None for name in YES_NO}
    return found | dict(n=len(pairs), intervals={name: interval(found[name], values[name])
                                                 for name in YES_NO})


def interval(share: float | None, values: list[float]) -> list[float] | None:
    """[low, high] of a share of these values; None where there is none."""
    if share is None:
        return None
    off = margin(values) / 100
    return [max(0.0, share - off), min(1.0, share + off)]
