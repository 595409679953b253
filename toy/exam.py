"""The exam about the toy world: questions about scenes that training never shows, and the score.

Half of the questions are in phrasings that training never uses, half are about scenes with a pair
of kinds that training never shows together. `python eval.py --task toy` sits it.
"""
import random
from collections import Counter
from dataclasses import dataclass

from toy.questions import QUESTIONS, Turn, ask, caption
from toy.world import Scene, make_scene


@dataclass
class Item:
    """A question of the exam: the last of turns. Its phrasing, or a pair of kinds in its scene, may
    be held out."""
    scene: Scene
    kind: str              # of QUESTIONS
    turns: list[Turn]
    new_phrasing: bool
    new_pair: bool


def exam(seed: int, n: int) -> list[Item]:
    """n held-out questions, every kind equally often, half of them in new phrasings, half of them
    with a new pair."""
    items = []
    for i in range(n):
        kind = QUESTIONS[i % len(QUESTIONS)]
        before = i // len(QUESTIONS)                                    # questions of this kind
        new_phrasing = before % 2 == 1
        new_pair = before // 2 % 2 == 1
        for attempt in range(1000):
            # training has no such keys
            scene = make_scene(f"test{seed}/{i}/{attempt}", new_pair=new_pair)
            turns = ask(scene, kind, random.Random("exam/" + scene.key), new_phrasing)
            if turns:
                items.append(Item(scene, kind, turns, new_phrasing, new_pair))
                break
    return items


def score(items: list[Item], texts: list[str]) -> dict:
    """What a model's answers to an exam's items are worth: right is what equals the answer.

    Gives {"accuracy", "n", "kinds": {kind: {"accuracy", "n", "majority"}}, "groups": {"known
    phrasing", "new phrasing", "known pair", "new pair", "sentences": {"accuracy", "n"}}, "worst": a
    kind, "confusion": {right answer: {given one: how often}}}. majority: how often the kind's
    commonest answer is right. The confusion is the worst kind's, without the questions that asked
    for a sentence. A group without questions has n alone.
    """
    marked = [(item, text == item.turns[-1].answer) for item, text in zip(items, texts)]
    kinds = {}
    for kind in QUESTIONS:
        those = [(item, right) for item, right in marked if item.kind == kind]
        if those:
            answers = Counter(item.turns[-1].short for item, _ in those)
            kinds[kind] = share(those) | dict(majority=max(answers.values()) / len(those))
    groups = {
        "known phrasing": [row for row in marked if not row[0].new_phrasing],
        "new phrasing": [row for row in marked if row[0].new_phrasing],
        "known pair": [row for row in marked if not row[0].new_pair],
        "new pair": [row for row in marked if row[0].new_pair],
        "sentences": [row for row in marked if wants_sentence(row[0])],
    }
    worst = min(kinds, key=lambda kind: kinds[kind]["accuracy"])
    confusion = {}
    for item, text in zip(items, texts):
        if item.kind == worst and not wants_sentence(item):
            confusion.setdefault(item.turns[-1].short, Counter())[text] += 1
    return dict(**share(marked), kinds=kinds,
                groups={name: share(those) for name, those in groups.items()},
                worst=worst, confusion=confusion)


def share(marked: list[tuple[Item, bool]]) -> dict:
    """How many of these are right."""
    if not marked:
        return dict(n=0)
    return dict(accuracy=sum(right for _, right in marked) / len(marked), n=len(marked))


def wants_sentence(item: Item) -> bool:
    """Whether the question asks for a sentence."""
    return item.turns[-1].answer != item.turns[-1].short


def show_scores(result: dict, grey: dict | None = None) -> None:
    """Print score's result as a table; grey: the same for grey pictures."""
    last = f" {'grey':>9}" if grey else ""
    print(f"{'kind':15} {'n':>5} {'accuracy':>9} {'majority':>9}{last}")
    for kind, row in result["kinds"].items():
        line = f"{kind:15} {row['n']:5} {row['accuracy']:9.1%} {row['majority']:9.1%}"
        if grey:
            line += f" {grey['kinds'][kind]['accuracy']:9.1%}"
        print(f"{line}  {'#' * round(20 * row['accuracy'])}")
    for name, row in {"all": result, **result["groups"]}.items():
        print(f"{name:15} {row['n']:5} " + (f"{row['accuracy']:9.1%}" if row["n"] else ""))
    confusion = result["confusion"]
    given = sum(confusion.values(), Counter())
    columns = sorted(text for text in given if given[text] > 1)
    print(f"\n{result['worst']}: right answers down, given ones across")
    print(" " * 13 + "".join(f"{text:>13}" for text in columns))
    for name in sorted(confusion):
        print(f"{name:13}" + "".join(f"{confusion[name][text] or '.':>13}" for text in columns))


def show_wrong(items: list[Item], texts: list[str], most: int) -> None:
    """Print the first wrong answers with their scenes."""
    wrong = [(item, text) for item, text in zip(items, texts) if text != item.turns[-1].answer]
    for item, text in wrong[:most]:
        asked = " / ".join(turn.question for turn in item.turns)
        print(f"{item.scene.key} {item.kind}: {asked} said {text!r}, right "
              f"{item.turns[-1].answer!r} [{caption(item.scene)}]")
