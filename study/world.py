"""The study's world: toy's scenes, and two kinds of question more, about the background.

Toy's eight kinds of question are answered from deep layers, printed words all the better the
deeper (study/probes.py). What deep layers forget, since no caption told it when the CLIP was
trained, is how the background looks. So the study asks for that, too: *tint*, its colour, and
*shade*, how light it is. The scenes stay as they are, pixel for pixel. Captions and texts tell the
background as well.
"""
import random

import data
from core.tokenizer import Tokenizer
from toy import exam as toy_exam
from toy import questions
from toy import world as toy

BACKGROUND = ["tint", "shade"]
KINDS = questions.QUESTIONS + BACKGROUND
EXAM = 8                      # toy.exam's seed: not the one that the bundled model was chosen on

PHRASES = {
    "tint": ["What color is the picture?", "Which color does the picture have?"],
    "shade": ["What is the number of the picture?", "What number does the picture have?"],
}


# --------------------------------------------------------------------------------------------------
# The background

def ground(scene: toy.Scene) -> list[int]:
    """The background's red, green and blue, as toy draws it: each 190 to 245."""
    rng = random.Random("background/" + scene.key)
    return [rng.randint(190, 245) for _ in range(3)]


def tint(scene: toy.Scene) -> str | None:
    """Whether the background has more red or more blue; None where it is the same but for 10 levels
    of 255."""
    red, _, blue = ground(scene)
    if abs(red - blue) < 10:
        return None
    return "red" if red > blue else "blue"


def shade(scene: toy.Scene) -> str:
    """How light the background is, in quarters of all scenes: 1 (dark) to 4."""
    light = sum(ground(scene))
    return str(1 + sum(light >= edge for edge in (634, 653, 672)))


def background(scene: toy.Scene) -> str:
    """What there is to say about it: "red picture 3". In words that the tokenizer has as one piece:
    a patch, which is one row of what the Llama reads, can't say a word of five."""
    return " ".join(filter(None, [tint(scene), "picture", shade(scene)]))


# --------------------------------------------------------------------------------------------------
# What is told and asked

def ask(scene: toy.Scene, kind: str, rng: random.Random) -> questions.Turn | None:
    """A question of one of the two kinds; None where the scene has no answer."""
    answer = tint(scene) if kind == "tint" else shade(scene)
    if answer is None:
        return None
    return questions.Turn(rng.choice(PHRASES[kind]), answer, answer)


def caption(scene: toy.Scene) -> str:
    """Toy's, and the background before it: in a place where it's known to come, it is told or
    missed; after things in any order what comes next can't be foreseen, however well the background
    is seen."""
    return background(scene) + ", " + questions.caption(scene)


def conversation(scene: toy.Scene, max_turns: int = 8) -> list[tuple[str, str]]:
    """Toy's questions and answers, printed words more often, with the two kinds before or after;
    or, in a third of the scenes that have one question, one of the two instead."""
    rng = random.Random("study/" + scene.key)
    turns = questions.conversation(scene, max_turns, also=["word", "word"])
    more = []
    for kind in rng.sample(BACKGROUND, 2):
        if turn := ask(scene, kind, rng):
            more.append((turn.question, turn.answer))
    if len(turns) == 1:
        return more[:1] if rng.random() < 1 / 3 else turns
    for turn in more:
        turns = rng.choice([turns + [turn], [turn] + turns])
    return turns


def text_rows(tokenizer: Tokenizer, step: int, batch: int = 32) -> list[tuple[list, list]]:
    """[(ids, labels)] of a step of text, as toy.towers.text_rows, of this world: what the study's
    Llama reads, to know the two kinds of question from text as it knows the others."""
    rows = []
    for i in range(batch):
        scene = toy.make_scene(f"study/text/{step}/{i}")
        grid = [background(scene), questions.grid(scene)]
        if random.Random(scene.key).choice((1, -1)) < 0:
            grid.reverse()
        glimpses = questions.glimpses(scene, background(scene))
        seen = (caption(scene), " ".join(grid), glimpses, glimpses)[i % 4]
        if turns := conversation(scene, 12):
            question, answer = turns[0]
            record = questions.record([(seen + "\n" + question, answer)] + turns[1:])
            sample = data.render(record, tokenizer, "v1")
            rows.append((sample.ids, sample.labels))
    return rows


def kind_of(i: int, n: int) -> str:
    """The kind of question i of an exam of n: toy's eight by turns, then the other two."""
    old = n * len(questions.QUESTIONS) // len(KINDS)
    if i < old:
        return questions.QUESTIONS[i % len(questions.QUESTIONS)]
    return BACKGROUND[i % 2]


def exam(n: int) -> list[toy_exam.Item]:
    """n held-out questions, every kind equally often: toy's exam, then those about backgrounds."""
    items = toy_exam.exam(EXAM, n * len(questions.QUESTIONS) // len(KINDS))
    i = 0
    while len(items) < n:
        scene = toy.make_scene(f"test-study/{i}")
        i += 1
        kind = kind_of(len(items), n)
        if turn := ask(scene, kind, random.Random("exam/" + scene.key)):
            items.append(toy_exam.Item(scene, kind, [turn], False, False))
    return items
