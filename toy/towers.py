"""How the embedded world's two towers are pretrained: a tokenizer, a small CLIP, a small Llama,
from nothing.

    python toy.py retrain

does it, and both stages of train.py after it. What the world looks like and what is asked about it
is toy.py's. In the paper these towers are CLIP ViT-L/336 and Vicuna, which others have trained.
"""
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig, preprocess
from core.device import autocast_dtype
from core.tokenizer import Tokenizer
from data import IGNORE, SYSTEM, render
from fast.memory import keep_memory
from llama import Llama, LlamaConfig
from toy.questions import QUESTIONS, ask, caption, conversation, glimpses, grid, record
from toy.world import (
    CATEGORIES,
    COLORS,
    KINDS,
    LOOKALIKE,
    PATCH,
    PLACES,
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

VOCAB, BOS, EOS = 896, 1, 2


def train_tokenizer(out: Path):
    """A sentencepiece BPE in Llama-2's style (byte fallback, dummy prefix) from sentences of this
    world.

    The names of things are pieces from the start, so that "peaches" comes apart into "peach" and
    "es": the question then holds the very token that names the thing, and looking it up is a match
    of equal tokens. So is what the prompt repeats in every sample: the system's sentences would be
    a third of the tokens of a short question.
    """
    import sentencepiece

    def sentences():
        rng = random.Random("tokenizer")
        names = KINDS + SHAPES + list(COLORS) + WORDS + list(CATEGORIES) + list("0123456") + [
            "yes", "no"]
        for i in range(3000):
            scene = make_scene(f"tokenizer/{i}")
            for turn in ask(scene, rng.choice(QUESTIONS), rng) or []:
                yield turn.question + " " + turn.answer
                # a question after a picture's newline begins without a space
                yield f"({turn.question}"
            yield grid(scene) + " " + caption(scene)
            yield " ".join(rng.sample(names, 40))
        yield from (chr(c) for c in range(32, 127))

    whole = [" " + SYSTEM, " USER:", "USER:", " ASSISTANT:"] + [
        " " + name for name in KINDS + list(CATEGORIES)]
    whole = [text.replace(" ", "\u2581") for text in whole]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "tokenizer.model.tmp", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=f, model_type="bpe", vocab_size=VOCAB,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, user_defined_symbols=whole, unk_id=0, bos_id=1, eos_id=2,
            pad_id=-1, num_threads=1, minloglevel=2)
    os.replace(out / "tokenizer.model.tmp", out / "tokenizer.model")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024),
    for matrices.

    torch.optim.Muon does these steps in bfloat16, which takes a CPU that can't three seconds a
    step; this does them in what suits the machine.
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
                u = (u / (u.norm() + 1e-7)).to(autocast_dtype(p.device))
                for _ in range(5):
                    gram = u @ u.T
                    u = 3.4445 * u + (-4.775 * gram + 2.0315 * gram @ gram) @ u
                u = u.T if p.shape[0] > p.shape[1] else u
                # as large as AdamW's steps
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def optimizers(model, lr):
    """Muon for the matrices inside the blocks, AdamW for everything else.

    Stage 1 and 2 are AdamW alone, as in the paper (train.py); here, where two cores have to teach a
    small model to look things up, Muon gets there in a fraction of the steps.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def pretrain(name, model, loss_of_step, steps, lr, out: Path):
    """Train model for a number of steps. loss_of_step(model, step) gives, in one part or several,
    the loss on the step's own, reproducible batch, and the share of its predictions that are right:
    [(loss, right)], to be summed.

    Warm-up over 50 steps, constant, linear to zero over the last quarter. Every 100 steps
    everything is written to out/NAME.ckpt, beside and renamed, and a run that was stopped goes on
    from there.
    """
    opts, start, log, dtype = optimizers(model, lr), 0, out / f"{name}.csv", autocast_dtype(
        torch.device("cpu"))
    ckpt = out / f"{name}.ckpt"
    if ckpt.exists():
        state = torch.load(ckpt, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        start = state["step"]
    # what was logged after the checkpoint is done again
    rows = log.read_text().splitlines()[1:] if start else []
    rows = ["step,loss,right"] + [row for row in rows if int(row.split(",")[0]) <= start]
    log.write_text("".join(f"{row}\n" for row in rows))
    keep_memory(torch.device("cpu"))
    began = time.perf_counter()
    for step in range(start, steps):
        rate = min(1, (step + 1) / 50, (steps - step) / (steps / 4))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * rate
        loss = right = 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for part, share in loss_of_step(model, step):
                part.backward()
                loss, right = loss + part.item(), right + share
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            each = (time.perf_counter() - began) / (step + 1 - start)
            print(f"{name} {step + 1}/{steps} loss {loss:.3f} right {right:.3f} {each:.2f} s/step "
                  f"eta {each * (steps - step - 1) / 60:.0f} min", flush=True)
            with open(log, "a") as f:
                f.write(f"{step + 1},{loss:.4f},{right:.3f}\n")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            torch.save(
                dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step + 1),
                f"{ckpt}.tmp")
            os.replace(f"{ckpt}.tmp", ckpt)


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


CLIP_GROW = 100


def regions(scenes: list) -> tuple:
    """Which patches show what: (weights (things, pictures * N), the things' phrases).

    A phrase is a thing's part of the caption, "cat top left". A row of weights is the share of a
    thing's box that falls into each patch: their sum of all patches' features is the mean over the
    box.
    """
    grid = SIZE // PATCH
    edges = torch.arange(grid + 1) * PATCH
    rows, phrases = [], []
    for i, scene in enumerate(scenes):
        for thing, x, y, side, _ in layout(scene):
            left, top, right, bottom = box(thing, x, y, side)
            across = (edges.clamp(left, right)).diff()              # (grid), pixels of every column
            down = (edges.clamp(top, bottom)).diff()
            inside = torch.zeros(len(scenes), grid, grid)
            inside[i] = torch.outer(down, across)
            rows.append((inside / inside.sum()).flatten())
            phrases.append(f"{thing.text()} {PLACES[thing.cell]}")
    return torch.stack(rows), phrases


def clip_config(vocab_size):
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, hidden_size=128,
                              intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
    text = CLIPTextConfig(vocab_size=vocab_size + 1, hidden_size=128, intermediate_size=512,
                          num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=80,
                          eos_token_id=vocab_size)
    return vision, text          # a text ends with an id of its own, above the tokenizer's


def as_text(tokenizer, texts: list):
    """Texts as CLIP's text tower takes them: (B, T), filled up with the id that ends a text."""
    ids, end = [tokenizer.encode(text) for text in texts], tokenizer.vocab_size
    width = 1 + max(map(len, ids))
    # pooled at the first end
    return torch.tensor([row + [end] * (width - len(row)) for row in ids])


def contrast(logits, target):
    """Cross-entropy of every row, and the share of rows whose highest logit is the right one."""
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean().item()


def train_clip(out: Path, tokenizer, steps, batch=48):
    """Contrastive learning (CLIP, Radford et al. 2021) on pictures and captions, half of the batch
    being siblings; and on the parts of both, as RegionCLIP (Zhong et al. 2022) has it: the patches
    where a thing lies against its phrase.

    The real CLIP has seen 12.8 billion pictures and learns from whole captions alone what lies
    where; here the parts make up for that. Scenes of one thing come first and grow by one in
    CLIP_GROW steps.
    """
    torch.manual_seed(1)
    model = CLIP(*clip_config(tokenizer.vocab_size), projection_dim=128)

    def loss_of_step(model, step):
        model.logit_scale.data.clamp_(max=math.log(100))  # as OpenAI's training does
        rng = random.Random(f"clip/{step}")
        scenes = [
            make_scene(f"clip/{step}/{i}", limit=rng.randint(1, 1 + step // CLIP_GROW))
            for i in range(batch)]
        scenes += [sibling(scene) for scene in scenes]
        pixels = torch.stack([preprocess(draw(scene), SIZE, pad=True) for scene in scenes])
        weights, phrases = regions(scenes)  # (things, B N)
        names = sorted(set(phrases))
        hidden = model.vision.states(pixels)[-1]  # (B, 1 + N, d)
        features = model.visual_projection(model.vision.post_layernorm(hidden))  # (B, 1 + N, P)
        things = F.normalize(weights @ features[:, 1:].flatten(0, 1).float(), dim=-1)  # (things, P)
        told = F.normalize(model.encode_text(as_text(tokenizer, names)).float(), dim=-1)
        parts, right = contrast(model.logit_scale.exp() * things @ told.T,
                                torch.tensor([names.index(phrase) for phrase in phrases]))
        whole = F.normalize(features[:, 0].float(), dim=-1)                            # (B, P)
        captions = F.normalize(
            model.encode_text(as_text(tokenizer, [caption(s) for s in scenes])).float(), dim=-1)
        logits, target = model.logit_scale.exp() * whole @ captions.T, torch.arange(len(scenes))
        return [(parts + (contrast(logits, target)[0] + contrast(logits.T, target)[0]) / 2, right)]

    pretrain("clip", model, loss_of_step, steps, 1e-3, out)
    model.save_pretrained(out / "clip")


def llama_config(vocab_size):
    return LlamaConfig(vocab_size=vocab_size, hidden_size=192, intermediate_size=512,
                       num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
                       rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=1024,
                       tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS)


# steps of repeated sequences before the scenes; steps until these grow by one thing
REPEATS, TEXT_GROW = 600, 100


def text_rows(tokenizer, step, batch):
    """What the Llama learns to read in one step: [(ids, labels)].

    First repeated sequences of random names: to predict the second half is to find the earlier
    token and copy what followed it, and that head is what every later question needs. Then scenes
    as text, as captions of grids ("plain", like stage 1) or with a conversation ("v1"), told in one
    of three ways. They are small at first and grow: what finds the asked thing among two carries
    over to more.
    """
    rng = random.Random(f"text/{step}")
    if step < REPEATS:
        names = [tokenizer.encode(name)[0] for name in KINDS + WORDS + SHAPES + list(COLORS)]
        n = rng.randint(8, 20)
        half = [rng.choices(names, k=n) for _ in range(batch)]
        return [([BOS] + h + h, [IGNORE] * (n + 1) + h) for h in half]
    rows = []
    for i in range(batch):
        scene = make_scene(f"text/{step}/{i}",
                           limit=2 + rng.randrange(1 + (step - REPEATS) // TEXT_GROW))
        if i % 12 == 0:
            seen = tokenizer.encode(grid(scene))
            told = tokenizer.encode(caption(scene)) + tokenizer.encode("\n", continues=True)
            rows.append(([BOS] + seen + told, [IGNORE] * (1 + len(seen)) + told))
        elif turns := conversation(scene, 12):
            context = (caption, grid, glimpses, glimpses)[i % 4](scene)
            sample = render(record([(context + "\n" + turns[0][0], turns[0][1])] + turns[1:]),
                            tokenizer, "v1")
            rows.append((sample.ids, sample.labels))
    return rows


def text_loss(rows_of_step, piece=8):
    """pretrain's loss_of_step for rows_of_step(step), [(ids, labels)]: next-token prediction where
    there are labels. A step's rows are sorted by length and taken `piece` at a time, to save
    padding."""
    def loss_of_step(model, step):
        rows = sorted(rows_of_step(step), key=lambda row: len(row[0]))
        supervised = sum(label != IGNORE for _, labels in rows for label in labels)
        for at in range(0, len(rows), piece):
            part = rows[at:at + piece]
            width = len(part[-1][0])
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in part])   # (piece, T)
            labels = torch.tensor([row + [IGNORE] * (width - len(row)) for _, row in part])
            keep = labels[:, 1:] != IGNORE
            logits = model.lm_head(model.hidden(tokens=ids)[:, :-1][keep]).float()    # (answers, V)
            loss, right = contrast(logits, labels[:, 1:][keep])
            yield loss * (len(logits) / supervised), right * (len(logits) / supervised)
    return loss_of_step


def train_llama(out: Path, tokenizer, steps, batch=32):
    """The loss on answers and captions of texts: the part that Vicuna plays in the paper."""
    torch.manual_seed(2)
    model = Llama(llama_config(tokenizer.vocab_size))
    pretrain("llama", model, text_loss(lambda step: text_rows(tokenizer, step, batch)), steps, 2e-3,
             out)
    model.save_pretrained(out / "llama")


def train_towers(out: Path, clip_steps, llama_steps):
    """(a) tokenizer and CLIP, (b) Llama; each saved as a public model folder with the tokenizer
    beside it. What is there already isn't done again."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "llama" / "tokenizer.model").exists():
        train_tokenizer(out / "llama")
    tokenizer = Tokenizer.from_pretrained(out / "llama")
    if not (out / "clip" / "config.json").exists():
        train_clip(out, tokenizer, clip_steps)
    if not (out / "llama" / "config.json").exists():
        train_llama(out, tokenizer, llama_steps)
