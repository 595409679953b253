"""TODO toy/exam.py"""
import random
from collections import Counter
from dataclasses import dataclass

from toy import questions
from toy.questions import QUESTIONS, ask
from toy.world import Scene, make_scene


@dataclass
class Item:
    """A question of the exam: the last of turns. Its phrasing, or a pair of kinds in its scene, may
    be held out."""
    scene: Scene
    kind: str
    turns: list
    new_phrasing: bool
    new_pair: bool


def exam(seed: int, n: int) -> list:
    """n held-out Items, every kind equally often, half of them in new phrasings, half of them with
    a new pair."""
    items = []
    for i in range(n):
        kind, new_phrasing, new_pair = QUESTIONS[i % 8], i // 8 % 2 == 1, i // 16 % 2 == 1
        for attempt in range(1000):
            # training has no such keys
            scene = make_scene(f"test{seed}/{i}/{attempt}", new_pair=new_pair)
            if turns := ask(scene, kind, random.Random("exam/" + scene.key), new_phrasing):
                items.append(Item(scene, kind, turns, new_phrasing, new_pair))
                break
    return items


def score_toy(items, texts) -> dict:
    """items: exam's. Accuracy overall, by kind (with its majority rate), by what was held out; what
    the worst kind took for what, among the questions that didn't ask for a sentence: {right: {said:
    how often}}."""
    right = [text == item.turns[-1].answer for text, item in zip(texts, items)]

    def part(those):
        return dict(accuracy=sum(right[i]
                                 for i in those) / len(those), n=len(those)) if those else dict(n=0)

    kinds, numbers = {}, range(len(items))
    for kind in questions.QUESTIONS:
        if those := [i for i in numbers if items[i].kind == kind]:
            commonest = Counter(items[i].turns[-1].short for i in those).most_common(1)[0][1]
            kinds[kind] = part(those) | dict(majority=commonest / len(those))
    groups = {
        f"{known} {name}": part([
            i for i in numbers if getattr(items[i], "new_" + name) == (known == "new")])
        for name in ("phrasing", "pair") for known in ("known", "new")}
    groups["sentences"] = part([
        i for i in numbers if items[i].turns[-1].answer != items[i].turns[-1].short])
    worst, confusion = min(kinds, key=lambda kind: kinds[kind]["accuracy"]), {}
    for text, item in zip(texts, items):
        if item.kind == worst and item.turns[-1].answer == item.turns[-1].short:
            confusion.setdefault(item.turns[-1].short, Counter())[text] += 1
    return dict(accuracy=sum(right) / len(right), n=len(right), kinds=kinds, groups=groups,
                worst=worst, confusion=confusion)


def show(result, grey=None):
    """score_toy's result as a table; grey: the same for grey pictures."""
    print(f"{'kind':15} {'n':>5} {'accuracy':>9} {'majority':>9}" +
          (f" {'grey':>9}" if grey else ""))
    for kind, row in result["kinds"].items():
        guessed = f" {grey['kinds'][kind]['accuracy']:9.1%}" if grey else ""
        print(f"{kind:15} {row['n']:5} {row['accuracy']:9.1%} {row['majority']:9.1%}{guessed}  "
              + "#" * round(20 * row["accuracy"]))
    for name, row in {"all": result, **result["groups"]}.items():
        print(f"{name:15} {row['n']:5} " + (f"{row['accuracy']:9.1%}" if row["n"] else ""))
    said = sorted({text for row in result["confusion"].values() for text in row})
    columns = [text for text in said if sum(row[text] for row in result["confusion"].values()) > 1]
    print(f"\n{result['worst']}: right answers down, given ones across\n{'':13}" +
          "".join(f"{c:>13}" for c in columns))
    for name in sorted(result["confusion"]):
        print(f"{name:13}" + "".join(f"{result['confusion'][name][c] or '.':>13}" for c in columns))
