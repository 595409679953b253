"""The toy world's two towers, from nothing: a small CLIP and a small Llama.

    python -m toy towers

In the paper these are CLIP ViT-L/336 and Vicuna, which others have trained on billions of pictures
and words. Here the CLIP learns from captions and their parts, and the Llama from scenes as text: to
find the asked thing among others, which a small model hardly learns from pictures.
"""
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig, preprocess
from core.tokenizer import IGNORE, Tokenizer
from data import render
from llama import Llama, LlamaConfig
from toy.pretrain import pretrain
from toy.questions import caption, conversation, glimpses, grid, located, record
from toy.vocabulary import BOS, EOS, train_tokenizer
from toy.world import (
    COLORS,
    KINDS,
    LOOKALIKE,
    PATCH,
    SHAPES,
    SIZE,
    WORDS,
    Scene,
    box,
    draw,
    held_out,
    layout,
    make_scene,
)

CLIP_GROW = 100          # CLIP's scenes begin with one thing and grow by one in so many steps
REPEATS = 600            # the Llama's first steps: repeated sequences, before the scenes
TEXT_GROW = 100          # its scenes begin with two things and grow by one in so many steps
Rows = list[tuple[list[int], list[int]]]                                       # [(ids, labels)]


def train_towers(out: Path, clip_steps: int, llama_steps: int) -> None:
    """(a) tokenizer and CLIP, (b) Llama; each saved as a public model folder, out/clip and
    out/llama, the tokenizer beside the latter. What is there already isn't done again."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "llama" / "tokenizer.model").exists():
        train_tokenizer(out / "llama")
    tokenizer = Tokenizer.from_pretrained(out / "llama")
    if not (out / "clip" / "config.json").exists():
        train_clip(out, tokenizer, clip_steps)
    if not (out / "llama" / "config.json").exists():
        train_llama(out, tokenizer, llama_steps)


def contrast(logits: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """logits (B, V), target (B): the mean cross-entropy of the rows, and the share of rows whose
    highest logit is the right one."""
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean().item()


# --------------------------------------------------------------------------------------------------
# (a) CLIP

def clip_config(vocab_size: int) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """8 layers that look and 2 that read. A text ends with an id of its own, above the
    tokenizer's."""
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, hidden_size=128,
                              intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
    text = CLIPTextConfig(vocab_size=vocab_size + 1, hidden_size=128, intermediate_size=512,
                          num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=80,
                          eos_token_id=vocab_size)
    return vision, text


def sibling(scene: Scene) -> Scene:
    """Nearly the same scene: two things have changed places, or one has become another, if it can
    its look-alike. A negative for CLIP, which has to see what and where everything is to tell the
    two apart."""
    rng = random.Random("sibling/" + scene.key)
    things = [replace(thing) for thing in scene.things]
    one = rng.choice(things)
    if rng.random() < 0.5:
        cell = rng.choice([cell for cell in range(9) if cell != one.cell])
        for other in things:
            if other.cell == cell:
                other.cell = one.cell
        one.cell = cell
    elif one.what == "word":
        one.name = rng.choice([word for word in WORDS if word != one.name])
    elif one.what == "shape":
        one.color = rng.choice([color for color in COLORS if color != one.color])
    else:
        others = [thing.name for thing in things if thing.what == "object" and thing is not one]
        fine = [kind for kind in KINDS if kind != one.name and not held_out(others + [kind])]
        alike = LOOKALIKE.get(one.name)
        one.name = alike if alike in fine and rng.random() < 0.5 else rng.choice(fine)
    return Scene(scene.key + "/sibling", things)


def regions(scenes: list[Scene]) -> tuple[Tensor, list[str]]:
    """Which patches show what: (weights (things, B N), the things' phrases, "cat top left").

    A row of weights is the share of a thing's box that falls into each patch of all pictures: their
    sum of all patches' features is the mean over the box.
    """
    side = SIZE // PATCH
    edges = torch.arange(side + 1) * PATCH                                 # (side + 1), in pixels
    rows, phrases = [], []
    for i, scene in enumerate(scenes):
        for thing, x, y, size, _ in layout(scene):
            left, top, right, bottom = box(thing, x, y, size)
            across = edges.clamp(left, right).diff()                # (side), pixels of each column
            down = edges.clamp(top, bottom).diff()                  # (side), pixels of each row
            inside = torch.zeros(len(scenes), side, side)
            inside[i] = torch.outer(down, across)
            rows.append((inside / inside.sum()).flatten())
            phrases.append(located(thing))
    return torch.stack(rows), phrases


def as_text(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Texts as CLIP's text tower takes them: (B, T), filled up with the id that ends a text, at the
    first of which it is pooled."""
    ids = [tokenizer.encode(text) for text in texts]
    end = tokenizer.vocab_size
    width = 1 + max(map(len, ids))
    return torch.tensor([row + [end] * (width - len(row)) for row in ids])


def clip_scenes(step: int, batch: int) -> list[Scene]:
    """A step's scenes, and after them their siblings."""
    rng = random.Random(f"clip/{step}")
    scenes = [make_scene(f"clip/{step}/{i}", limit=rng.randint(1, 1 + step // CLIP_GROW))
              for i in range(batch)]
    return scenes + [sibling(scene) for scene in scenes]


def clip_loss(model: CLIP, tokenizer: Tokenizer, scenes: list[Scene]) -> tuple[Tensor, float]:
    """The contrastive loss of pictures against captions, both ways, plus that of the things in them
    against their phrases; and the share of things whose phrase is found."""
    def told(texts: list[str]) -> Tensor:
        return F.normalize(model.encode_text(as_text(tokenizer, texts)).float(), dim=-1)

    pixels = torch.stack([preprocess(draw(scene), SIZE, pad=True) for scene in scenes])
    weights, phrases = regions(scenes)                                            # (things, B N)
    names = sorted(set(phrases))
    hidden = model.vision.states(pixels)[-1]                                      # (B, 1+N, d)
    features = model.visual_projection(model.vision.post_layernorm(hidden))       # (B, 1+N, P)
    things = F.normalize(weights @ features[:, 1:].flatten(0, 1).float(), dim=-1)   # (things, P)
    parts, right = contrast(model.logit_scale.exp() * things @ told(names).T,
                            torch.tensor([names.index(phrase) for phrase in phrases]))
    whole = F.normalize(features[:, 0].float(), dim=-1)                           # (B, P)
    captions = told([caption(scene) for scene in scenes])                         # (B, P)
    logits = model.logit_scale.exp() * whole @ captions.T                         # (B, B)
    target = torch.arange(len(scenes))
    return parts + (contrast(logits, target)[0] + contrast(logits.T, target)[0]) / 2, right


def train_clip(out: Path, tokenizer: Tokenizer, steps: int, batch: int = 48) -> None:
    """Contrastive learning (CLIP, Radford et al. 2021) on pictures and captions, half of the batch
    being siblings; and on the parts of both, as RegionCLIP (Zhong et al. 2022) has it: the patches
    where a thing lies against its phrase. Written to out/clip.

    The real CLIP has seen 12.8 billion pictures and learns from whole captions alone what lies
    where; here the parts make up for that.
    """
    torch.manual_seed(1)
    model = CLIP(*clip_config(tokenizer.vocab_size), projection_dim=128)

    def loss_of_step(model, step):
        model.logit_scale.data.clamp_(max=math.log(100))              # as OpenAI's training does
        return [clip_loss(model, tokenizer, clip_scenes(step, batch))]

    pretrain("clip", model, loss_of_step, steps, 1e-3, out)
    model.save_pretrained(out / "clip")


# --------------------------------------------------------------------------------------------------
# (b) Llama

def llama_config(vocab_size: int) -> LlamaConfig:
    """6 layers of width 192."""
    return LlamaConfig(vocab_size=vocab_size, hidden_size=192, intermediate_size=512,
                       num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
                       rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=1024,
                       tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS)


def text_rows(tokenizer: Tokenizer, step: int, batch: int) -> Rows:
    """What the Llama learns to read in one step.

    First repeated sequences of random names: to predict the second half is to find the earlier
    token and copy what followed it, and that head is what every later question needs. Then scenes
    as text. They are small at first and grow: what finds the asked thing among two carries over to
    more.
    """
    rng = random.Random(f"text/{step}")
    if step < REPEATS:
        names = [tokenizer.encode(name)[0] for name in KINDS + WORDS + SHAPES + list(COLORS)]
        n = rng.randint(8, 20)
        half = [rng.choices(names, k=n) for _ in range(batch)]
        return [([BOS] + h + h, [IGNORE] * (n + 1) + h) for h in half]
    rows = []
    for i in range(batch):
        limit = 2 + rng.randrange(1 + (step - REPEATS) // TEXT_GROW)
        rows += scene_rows(tokenizer, make_scene(f"text/{step}/{i}", limit), i)
    return rows


def scene_rows(tokenizer: Tokenizer, scene: Scene, i: int) -> Rows:
    """A step's i-th scene as one row, or none: one in twelve is a grid and its caption ("plain",
    like stage 1), the others a conversation about one of three ways to tell the scene ("v1")."""
    if i % 12 == 0:
        seen = tokenizer.encode(grid(scene))
        told = tokenizer.encode(caption(scene)) + tokenizer.encode("\n", continues=True)
        return [([BOS] + seen + told, [IGNORE] * (1 + len(seen)) + told)]
    turns = conversation(scene, 12)
    if not turns:
        return []
    tell = (caption, grid, glimpses, glimpses)[i % 4]
    question, answer = turns[0]
    turns[0] = (f"{tell(scene)}\n{question}", answer)
    sample = render(record(turns), tokenizer, "v1")
    return [(sample.ids, sample.labels)]


def text_loss(rows_of_step: Callable[[int], Rows], piece: int = 8) -> Callable:
    """pretrain's loss_of_step for rows_of_step(step): next-token prediction where there are labels.
    A step's rows are sorted by length and taken `piece` at a time, to save padding."""
    def loss_of_step(model: Llama, step: int) -> Iterator[tuple[Tensor, float]]:
        rows = sorted(rows_of_step(step), key=lambda row: len(row[0]))
        supervised = sum(label != IGNORE for _, labels in rows for label in labels)
        for at in range(0, len(rows), piece):
            part = rows[at:at + piece]
            width = len(part[-1][0])
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in part])   # (piece, T)
            labels = torch.tensor([row + [IGNORE] * (width - len(row)) for _, row in part])
            keep = labels[:, 1:] != IGNORE                                          # (piece, T-1)
            logits = model.lm_head(model.hidden(tokens=ids)[:, :-1][keep]).float()  # (answers, V)
            loss, right = contrast(logits, labels[:, 1:][keep])
            yield loss * (len(logits) / supervised), right * (len(logits) / supervised)
    return loss_of_step


def train_llama(out: Path, tokenizer: Tokenizer, steps: int, batch: int = 32) -> None:
    """Learn to answer from texts: the part that Vicuna plays in the paper. Written to out/llama."""
    def rows_of_step(step: int) -> Rows:
        return text_rows(tokenizer, step, batch)

    torch.manual_seed(2)
    model = Llama(llama_config(tokenizer.vocab_size))
    pretrain("llama", model, text_loss(rows_of_step), steps, 2e-3, out)
    model.save_pretrained(out / "llama")
