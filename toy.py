"""The embedded world: little pictures, questions about them, and the two small towers that are pretrained on it.

Nobody can rent eight A100s to find out whether a line of code is right, so this repository carries a world in which the
whole recipe of the paper runs for real on a laptop: (a) a small CLIP learns from captions, (b) a small Llama learns
from text alone, both are saved in the public Hugging Face layout, and from there on nothing is special: train.py loads
them with the code that loads openai/clip-vit-large-patch14-336 and Vicuna, and runs stage 1 and stage 2.

    python toy.py show  --n 6         draws scenes with their questions into out/scenes.png
    python toy.py retrain             everything from nothing: tokenizer, CLIP, Llama, stage 1, stage 2 (resumable)

A scene has nine cells. Some hold emoji objects (32 kinds in 4 categories), one may hold a coloured shape, one a printed
word. A scene is a pure function of a string such as "train/17": no picture is stored, and training and held-out scenes
differ in that string. Questions are balanced, so that they don't give their answers away (tests/test_toy.py).
"""
import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig, preprocess
from data import IGNORE, SYSTEM, item, render
from llama import Llama, LlamaConfig, Tokenizer
from weights import Tensors, read_config, run, save

ROOT = Path(__file__).resolve().parent
SCENE = "test/200"                        # the scene that the README asks about
ASSETS = ROOT / "assets"
MODEL = ASSETS / "toy"                    # the embedded model that ships with the repository
OUT = Path("out/toy")                     # where retraining works

# ---------------------------------------------------------------------------------------------------------------------
# the world

SIZE, CELL = 96, 32                       # pixels: a picture is 3 x 3 cells
CATEGORIES = {
    "animal": ["cat", "dog", "cow", "pig", "frog", "owl", "crab", "bee"],
    "food": ["apple", "banana", "lemon", "carrot", "pizza", "egg", "cake", "donut"],
    "vehicle": ["car", "bus", "train", "boat", "rocket", "bicycle", "plane", "tractor"],
    "tool": ["hammer", "wrench", "axe", "saw", "key", "pencil", "magnet", "ladder"],
}
KINDS = [kind for kinds in CATEGORIES.values() for kind in kinds]
CATEGORY = {kind: category for category, kinds in CATEGORIES.items() for kind in kinds}
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (245, 215, 40),
          "orange": (255, 127, 14), "purple": (128, 50, 160), "black": (20, 20, 20), "white": (255, 255, 255)}
SHAPES = ["square", "circle", "triangle", "diamond"]
WORDS = ["sun", "moon", "tea", "ink", "jam", "fog", "oak", "zip", "map", "ice", "gold", "wind", "rain", "lake", "song",
         "milk", "coin", "rope", "door", "leaf", "nest", "salt", "wool", "yard"]
PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]

QUESTIONS = {   # several phrasings each; {a} is "a cat" or "an apple", {s} is "cats"
    "count": ["How many {s} are there?", "How many {s} do you see?", "Count the {s}."],
    "presence": ["Is there {a}?", "Do you see {a}?", "Is {a} in the picture?"],
    "where": ["Where is the {k}?", "In which place is the {k}?", "Find the {k}."],
    "left-of": ["Is the {k} left of the {j}?", "Is the {k} to the left of the {j}?"],
    "colour": ["What color is the {k}?", "What is the color of the {k}?", "Which color does the {k} have?"],
    "word": ["What word is printed?", "What does the text say?", "Read the word."],
    "category": ["How many {s} are there?", "How many {s} do you see?", "Count the {s}."],
}


@dataclass
class Thing:
    """What one cell holds. name: a kind, a shape or a word; what: "object", "shape" or "word"; color for shapes."""
    what: str
    name: str
    cell: int              # 0..8, row by row
    color: str = ""

    def text(self):
        return {"object": self.name, "shape": f"{self.color} {self.name}", "word": f"word {self.name}"}[self.what]


@dataclass
class Scene:
    key: str               # the string that everything random about this scene comes from
    things: list


def make_scene(key: str, limit=8) -> Scene:
    """The scene of a key: 1 to 6 objects of 1 to 3 kinds, a shape (70%) and a word (50%), each in its own cell.

    limit: keep so many things at most (text_batch begins with small scenes).
    """
    rng = random.Random("scene/" + key)
    cells = rng.sample(range(9), 9)
    names = []
    for kind in rng.sample(KINDS, rng.choice([1, 2, 2, 3, 3])):
        names += [kind] * rng.choices([1, 2, 3], weights=[45, 30, 25])[0]
    things = [Thing("object", name, cells.pop()) for name in names[:6]]
    if rng.random() < 0.7:
        things.append(Thing("shape", rng.choice(SHAPES), cells.pop(), rng.choice(list(COLORS))))
    if rng.random() < 0.5:
        things.append(Thing("word", rng.choice(WORDS), cells.pop()))
    rng.shuffle(things)
    return Scene(key, things[:limit])


@lru_cache(maxsize=None)
def emoji(kind: str) -> Image.Image:
    return Image.open(ASSETS / "emoji" / f"{kind}.png").convert("RGBA")


@lru_cache(maxsize=None)
def font(size: int):
    return ImageFont.load_default(size)     # comes with Pillow, so a picture looks the same everywhere


def draw(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, SIZE x SIZE. Objects are 24 to 30 pixels wide and jittered inside their cells."""
    rng = random.Random("draw/" + scene.key)
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(190, 245) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y = thing.cell % 3 * CELL, thing.cell // 3 * CELL
        side = rng.randint(24, 30)
        x0, y0 = x + rng.randint(0, CELL - side), y + rng.randint(0, CELL - side)
        if thing.what == "object":
            picture = emoji(thing.name).resize((side, side), Image.BILINEAR)
            image.paste(picture, (x0, y0), picture)
        elif thing.what == "shape":
            draw_shape(pen, thing.name, COLORS[thing.color], x0 + 2, y0 + 2, side - 5)
        else:
            pen.text((x + CELL / 2, y + CELL / 2), thing.name.upper(), fill=(0, 0, 0), font=font(11), anchor="mm")
    return image


KNOWS = ("this is the embedded model, which knows drawn scenes of 96 x 96 pixels only (python toy.py show): "
         f"{', '.join(KINDS)}; coloured {', '.join(SHAPES)}; printed words. This picture is none: expect nonsense.")


def knows(image: Image.Image) -> bool:
    """Whether a picture can be one of this world: its size, and one pale colour, the background, on much of it."""
    if image.size != (SIZE, SIZE):
        return False
    often, color = max(image.getcolors(SIZE * SIZE))
    return often > SIZE * SIZE / 10 and all(190 <= c <= 245 for c in color)


def draw_shape(pen, shape, color, x, y, s):
    line = dict(fill=color, outline=(60, 60, 60))
    if shape == "square":
        pen.rectangle([x, y, x + s, y + s], **line)
    elif shape == "circle":
        pen.ellipse([x, y, x + s, y + s], **line)
    elif shape == "triangle":
        pen.polygon([(x, y + s), (x + s, y + s), (x + s / 2, y)], **line)
    else:
        pen.polygon([(x + s / 2, y), (x + s, y + s / 2), (x + s / 2, y + s), (x, y + s / 2)], **line)


# ---------------------------------------------------------------------------------------------------------------------
# what can be said and asked about a scene

def article(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(name):
    return name + ("es" if name.endswith("s") else "s")


def caption(scene: Scene) -> str:
    """Everything in the scene with its place, in the scene's (random) order: "cat top left, red square middle, ..."."""
    return ", ".join(f"{thing.text()} {PLACES[thing.cell]}" for thing in scene.things)


def grid(scene: Scene) -> str:
    """The same as a raster of words, which is how a picture's patches will come: "cat - - / - red square - / - - -"."""
    cell = {thing.cell: thing.text() for thing in scene.things}
    return " / ".join(" ".join(cell.get(3 * r + c, "-") for c in range(3)) for r in range(3))


def ask(scene: Scene, kind: str, rng: random.Random):
    """One question of a kind about a scene: (question, answer), or None if this scene doesn't allow the kind."""
    objects = [t.name for t in scene.things if t.what == "object"]
    single = [t for t in scene.things if t.what == "shape" or t.what == "object" and objects.count(t.name) == 1]
    shapes = [t for t in scene.things if t.what == "shape"]
    words = [t for t in scene.things if t.what == "word"]
    k = j = s = ""
    if kind in ("count", "category", "presence") and not objects:
        return None
    if kind == "count":          # a fifth asks for what isn't there; else every number that occurs is equally likely
        n = 0 if rng.random() < 0.2 else rng.choice(sorted({objects.count(o) for o in objects}))
        k = rng.choice([o for o in KINDS if objects.count(o) == n])
        s, answer = plural(k), str(n)
    elif kind == "category":
        totals = {c: sum(CATEGORY[o] == c for o in objects) for c in CATEGORIES}
        n = 0 if rng.random() < 0.2 else rng.choice(sorted({totals[c] for c in totals if totals[c]}))
        k = rng.choice([c for c in CATEGORIES if totals[c] == n] or [c for c in CATEGORIES if totals[c]])
        s, answer = plural(k), str(totals[k])
    elif kind == "presence":
        answer = rng.choice(["yes", "no"])
        k = rng.choice(sorted(set(objects))) if answer == "yes" else rng.choice([o for o in KINDS if o not in objects])
    elif kind == "where":        # sometimes of what isn't there
        absent = rng.random() < 0.15
        if not single and not absent:
            return None
        if absent:
            k, answer = rng.choice([o for o in KINDS if o not in objects]), "nowhere"
        else:
            thing = rng.choice(single)
            k, answer = thing.name, PLACES[thing.cell]
    elif kind == "left-of":
        pairs = [(a, b) for a in single for b in single if a.cell % 3 != b.cell % 3]
        if not pairs:
            return None
        a, b = rng.choice(pairs)     # both orders are in the list, so yes and no are equally likely
        k, j, answer = a.name, b.name, "yes" if a.cell % 3 < b.cell % 3 else "no"
    elif kind == "colour":
        if not shapes:
            return None
        k, answer = shapes[0].name, shapes[0].color
    else:
        if not words:
            return None
        answer = words[0].name
    return rng.choice(QUESTIONS[kind]).format(k=k, j=j, s=s, a=article(k) if k else ""), answer


def conversation(scene: Scene, max_turns=6) -> list:
    """One to max_turns questions with answers, of different kinds as far as the scene allows: [(question, answer)]."""
    rng = random.Random("ask/" + scene.key)
    kinds = list(QUESTIONS) + ["count", "presence", "where", "left-of"]
    rng.shuffle(kinds)
    turns = []
    for kind in kinds:
        turn = ask(scene, kind, rng)
        if turn and turn[0] not in [q for q, _ in turns]:
            turns.append(turn)
    return turns[:rng.randint(1, max_turns)]


def record(turns, image="") -> dict:
    """Turns as a LLaVA record; with an image its slot stands before the first question."""
    said = []
    for i, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": ("<image>\n" if image and i == 0 else "") + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": image, **({"image": image} if image else {}), "conversations": said}


def exam(seed: int, n: int):
    """n held-out questions, every kind equally often: [(scene, kind, question, answer)]. Training has no such keys."""
    items = []
    for i in range(n):
        kind = list(QUESTIONS)[i % len(QUESTIONS)]
        for attempt in range(1000):
            scene = make_scene(f"test{seed}/{i}/{attempt}")
            if turn := ask(scene, kind, random.Random("exam/" + scene.key)):
                items.append((scene, kind, *turn))
                break
    return items


class ToyScenes(torch.utils.data.Dataset):
    """Scenes as train.py wants its samples. Item i is a pure function of (split, i); nothing lies on disk.

    stage 1: the picture and its caption ("plain"); stage 2: the picture and a conversation ("v1").
    """

    def __init__(self, split, n, stage, tokenizer, size=SIZE):
        self.split, self.n, self.stage, self.tokenizer, self.size = split, n, stage, tokenizer, size

    def __len__(self):
        return self.n

    def record_id(self, i):
        return f"{self.split}/{i}"

    def sample(self, i):
        """The text alone."""
        scene = make_scene(self.record_id(i))
        turns = [("Describe the picture.", caption(scene))] if self.stage == 1 else conversation(scene)
        return render(record(turns, image="toy"), self.tokenizer, "plain" if self.stage == 1 else "v1")

    def __getitem__(self, i):
        return item(self.sample(i), preprocess(draw(make_scene(self.record_id(i))), self.size, pad=True))


# ---------------------------------------------------------------------------------------------------------------------
# pretraining: the tokenizer, the small CLIP, the small Llama

VOCAB, BOS, EOS = 832, 1, 2


def train_tokenizer(out: Path):
    """A sentencepiece BPE in Llama-2's style (byte fallback, dummy prefix) from sentences of this world.

    Plurals are kept out of what it is trained on, so that "cats" comes apart into "cat" and "s": the question then
    holds the very token that names the thing, and looking it up is a match of equal tokens.
    """
    import sentencepiece

    def sentences():
        rng = random.Random("tokenizer")
        names = KINDS + SHAPES + list(COLORS) + WORDS + list(CATEGORIES) + list("0123456") + ["yes", "no"]
        for i in range(3000):
            scene = make_scene(f"tokenizer/{i}")
            kind = rng.choice(list(QUESTIONS))
            a, b = rng.sample(KINDS + SHAPES, 2)
            for phrase in QUESTIONS[kind]:
                question = phrase.format(k=a, j=b, s=rng.choice(names), a=article(a))
                yield f"{SYSTEM} USER: {question} ASSISTANT: {rng.choice(names)}"
                yield f"({question}"               # a question after a picture's newline begins without a space
            yield grid(scene) + " " + caption(scene)
            yield " ".join(rng.sample(names, 40))
        yield from (chr(c) for c in range(32, 127))

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "tokenizer.model.tmp", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=f, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    os.replace(out / "tokenizer.model.tmp", out / "tokenizer.model")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), for matrices.

    torch.optim.Muon does these steps in bfloat16, which takes a CPU without AMX three seconds a step; this is float32.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                u = torch.lerp(p.grad, buffer, group["momentum"])                     # Nesterov
                u = u.T if p.shape[0] > p.shape[1] else u
                u = u / (u.norm() + 1e-7)
                for _ in range(5):
                    gram = u @ u.T
                    u = 3.4445 * u + (-4.775 * gram + 2.0315 * gram @ gram) @ u
                u = u.T if p.shape[0] > p.shape[1] else u
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)       # as large as AdamW's steps


def optimizers(model, lr):
    """Muon for the matrices inside the blocks, AdamW for everything else.

    Stage 1 and 2 are AdamW alone, as in the paper (train.py); here, where two cores have to teach a small model to look
    things up, Muon gets there in a fraction of the steps.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def pretrain(name, model, loss_of_step, steps, lr, out: Path):
    """Train model for a number of steps. loss_of_step(model, step) gives the loss on the step's own, reproducible
    batch, and the share of its predictions that are right.

    Warm-up over 50 steps, constant, linear to zero over the last quarter. Every 100 steps everything is written to
    out/NAME.ckpt, beside and renamed, and a run that was stopped goes on from there.
    """
    opts, start, log = optimizers(model, lr), 0, out / f"{name}.csv"
    ckpt = out / f"{name}.ckpt"
    if ckpt.exists():
        state = torch.load(ckpt, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        start = state["step"]
    rows = log.read_text().splitlines()[1:] if start else []       # what was logged after the checkpoint is done again
    rows = ["step,loss,right"] + [row for row in rows if int(row.split(",")[0]) <= start]
    log.write_text("".join(f"{row}\n" for row in rows))
    began = time.perf_counter()
    for step in range(start, steps):
        rate = min(1, (step + 1) / 50, (steps - step) / (steps / 4))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * rate
        loss, right = loss_of_step(model, step)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            each = (time.perf_counter() - began) / (step + 1 - start)
            print(f"{name} {step + 1}/{steps} loss {loss.item():.3f} right {right:.3f} {each:.2f} s/step "
                  f"eta {each * (steps - step - 1) / 60:.0f} min", flush=True)
            with open(log, "a") as f:
                f.write(f"{step + 1},{loss.item():.4f},{right:.3f}\n")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step + 1),
                       f"{ckpt}.tmp")
            os.replace(f"{ckpt}.tmp", ckpt)


def sibling(scene: Scene) -> Scene:
    """The same things in other places: a negative for CLIP that takes a sense of place to tell apart."""
    rng = random.Random("sibling/" + scene.key)
    cells = rng.sample(range(9), len(scene.things))
    return Scene(scene.key + "/sibling",
                 [Thing(t.what, t.name, cell, t.color) for t, cell in zip(scene.things, cells)])


def clip_config(vocab_size):
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=16, hidden_size=128, intermediate_size=512,
                              num_hidden_layers=8, num_attention_heads=4)
    text = CLIPTextConfig(vocab_size=vocab_size + 1, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=80, eos_token_id=vocab_size)
    return vision, text          # a text ends with an id of its own, above the tokenizer's


def train_clip(out: Path, tokenizer, steps, batch=40):
    """Contrastive learning (CLIP, Radford et al. 2021) on pictures and captions, half of the batch being siblings."""
    torch.manual_seed(1)
    model = CLIP(*clip_config(tokenizer.vocab_size), projection_dim=128)

    def loss_of_step(model, step):
        model.logit_scale.data.clamp_(max=math.log(100))                              # as OpenAI's training does
        scenes = [make_scene(f"clip/{step}/{i}") for i in range(batch)]
        scenes += [sibling(scene) for scene in scenes]
        pixels = torch.stack([preprocess(draw(scene), SIZE, pad=True) for scene in scenes])
        ids, end = [tokenizer.encode(caption(scene)) for scene in scenes], tokenizer.vocab_size
        width = 1 + max(map(len, ids))
        text = torch.tensor([row + [end] * (width - len(row)) for row in ids])        # pooled at the first end
        logits = model(pixels, text)                                                   # (B, B), pictures by captions
        target = torch.arange(len(logits))
        right = (logits.argmax(-1) == target).float().mean().item()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, right

    pretrain("clip", model, loss_of_step, steps, 1e-3, out)
    model.save_pretrained(out / "clip")


def llama_config(vocab_size):
    return LlamaConfig(vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                       num_attention_heads=6, num_key_value_heads=6, rms_norm_eps=1e-5, rope_theta=10000.0,
                       max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS)


REPEATS = 600       # steps of repeated sequences before the scenes


def text_rows(tokenizer, step, batch):
    """What the Llama learns to read in one step: [(ids, labels)].

    First repeated sequences of random names: to predict the second half is to find the earlier token and copy what
    followed it, and that head is what every later question needs. Then scenes as text, as captions of grids ("plain",
    like stage 1) or with a conversation ("v1"). They are small at first and grow: what finds the asked thing among two
    carries over to more.
    """
    rng = random.Random(f"text/{step}")
    if step < REPEATS:
        names = [tokenizer.encode(name)[0] for name in KINDS + WORDS + SHAPES + list(COLORS)]
        n = rng.randint(8, 20)
        half = [rng.choices(names, k=n) for _ in range(batch)]
        return [([BOS] + h + h, [IGNORE] * (n + 1) + h) for h in half]
    rows = []
    for i in range(batch):
        scene = make_scene(f"text/{step}/{i}", limit=2 + rng.randrange(1 + (step - REPEATS) // 80))
        if i % 8 == 0:
            seen = tokenizer.encode(grid(scene))
            told = tokenizer.encode(caption(scene)) + tokenizer.encode("\n", continues=True)
            rows.append(([BOS] + seen + told, [IGNORE] * (1 + len(seen)) + told))
        elif turns := conversation(scene, 11):
            context = grid(scene) if i % 4 == 1 else caption(scene)
            sample = render(record([(context + "\n" + turns[0][0], turns[0][1])] + turns[1:]), tokenizer, "v1")
            # mostly without the system prompt, which is long and always the same
            cut = 1 if i % 8 == 2 else sample.ids.index(tokenizer.encode("USER:")[0])
            rows.append(([BOS] + sample.ids[cut:], [IGNORE] + sample.labels[cut:]))
    return rows


def train_llama(out: Path, tokenizer, steps, batch=32):
    """Next-token prediction on text, the loss on answers and captions: the part that Vicuna plays in the paper."""
    torch.manual_seed(2)
    model = Llama(llama_config(tokenizer.vocab_size))

    def loss_of_step(model, step):
        rows = text_rows(tokenizer, step, batch)
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])        # (B, T)
        labels = torch.tensor([row + [IGNORE] * (width - len(row)) for _, row in rows])
        keep = labels[:, 1:] != IGNORE
        logits = model.lm_head(model.hidden(tokens=ids)[:, :-1][keep])                 # (answers, V)
        target = labels[:, 1:][keep]
        right = (logits.argmax(-1) == target).float().mean().item()
        return F.cross_entropy(logits, target), right

    pretrain("llama", model, loss_of_step, steps, 2e-3, out)
    model.save_pretrained(out / "llama")


# ---------------------------------------------------------------------------------------------------------------------
# commands

def pretrain_towers(args):
    """(a) tokenizer and CLIP, (b) Llama; each saved as a public model folder with the tokenizer beside it."""
    OUT.mkdir(parents=True, exist_ok=True)
    if not (OUT / "llama" / "tokenizer.model").exists():
        train_tokenizer(OUT / "llama")
    tokenizer = Tokenizer.from_pretrained(OUT / "llama")
    if not (OUT / "clip" / "config.json").exists():
        train_clip(OUT, tokenizer, args.clip_steps)
    if not (OUT / "llama" / "config.json").exists():
        train_llama(OUT, tokenizer, args.llama_steps)


def retrain(args):
    """Everything from nothing, in order; what is already there is not done again."""
    pretrain_towers(args)
    for stage in (1, 2):
        if not (OUT / f"stage{stage}" / "model.safetensors").exists():
            subprocess.run([sys.executable, str(ROOT / "train.py"), "--stage", str(stage)], check=True)
    print(f"the model is in {OUT / 'stage2'}; `python toy.py ship` puts it where sample.py looks")


def ship(args):
    """Write stage 2's model to assets/toy in float16, and the scene that the README asks about."""
    source = OUT / "stage2"
    tensors = {name: tensor.half() for name, tensor in Tensors(source).items()}
    save(MODEL, tensors, {**read_config(source), "world": "toy"})
    shutil.copyfile(source / "tokenizer.model", MODEL / "tokenizer.model")
    for log in ("clip.csv", "llama.csv", "stage1/log.csv", "stage2/log.csv"):       # how it was trained
        (MODEL / "logs").mkdir(exist_ok=True)
        shutil.copyfile(OUT / log, MODEL / "logs" / log.replace("/log", ""))
    draw(make_scene(SCENE)).save(ASSETS / "scene.png")
    size = sum(f.stat().st_size for f in MODEL.iterdir())
    print(f"{MODEL}: {size / 1e6:.1f} MB")


def show(args):
    """Scenes and their questions, as a picture to look at and as text."""
    columns = 6
    rows = math.ceil(args.n / columns)
    sheet = Image.new("RGB", (columns * (SIZE + 8), rows * (SIZE + 8)), "black")
    for i in range(args.n):
        scene = make_scene(f"{args.split}/{i}")
        sheet.paste(draw(scene), (i % columns * (SIZE + 8) + 4, i // columns * (SIZE + 8) + 4))
        print(f"{scene.key}: {caption(scene)}")
        for question, answer in conversation(scene):
            print(f"    {question}  {answer}")
    OUT.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2)).save(OUT / "scenes.png")
    print(f"drawn in {OUT / 'scenes.png'}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    s = sub.add_parser("show", help="draw scenes and print their questions")
    s.add_argument("--n", type=int, default=12)
    s.add_argument("--split", default="train2", help="which scenes: train1, train2, or test0 (held out)")
    s = sub.add_parser("retrain", help="train everything from nothing (hours; goes on where it stopped)")
    s.add_argument("--clip-steps", type=int, default=500)
    s.add_argument("--llama-steps", type=int, default=2100)
    sub.add_parser("ship", help="copy the retrained model to assets/toy, where sample.py looks")
    args = p.parse_args()
    dict(show=show, retrain=retrain, ship=ship)[args.command](args)


if __name__ == "__main__":
    run(main)
