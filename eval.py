"""Ask a model many questions and score its answers.

    python eval.py --task toy                    4,000 held-out questions about the embedded world, by kind
    python eval.py --task toy --grey             and the same about grey pictures: what can be guessed without looking
    python eval.py --score pope --annotations coco --predictions answers.jsonl     a benchmark's score, without a model

Answers are greedy, and right if they are the same text. Beside each kind's accuracy stands its majority rate: that of
always giving the commonest answer. A follow-up's first question is answered by the model as well.
"""
import argparse
import json
import sys
from collections import Counter

import errors
import submit

if __name__ == "__main__" and any(word.startswith("--score") for word in sys.argv):
    sys.exit(errors.run(submit.main))          # here, since a score needs nothing of what follows, which takes seconds

import torch
from PIL import Image
from tqdm import tqdm

import toy
from ccra import VLM
from clip import preprocess
from data import collate, prompt, query_of
from llama import Tokenizer
from scores import SCORERS
from weights import pick_device, pick_dtype, run, stored_bytes


def answers(model: VLM, tokenizer: Tokenizer, asked, batch: int, max_new_tokens: int, device):
    """Greedy answers, in order, to [(PIL image, turns as for data.prompt)]; prompts of like length share a batch."""
    rows = [prompt(turns, tokenizer) for _, turns in asked]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    texts = [""] * len(rows)
    for at in tqdm(range(0, len(rows), batch), desc="answering", unit="batch", file=sys.stderr):
        chosen = by_length[at:at + batch]
        b = collate([dict(ids=rows[i].ids, labels=rows[i].labels, query=query_of(rows[i].turns, model.query),
                          pixels=preprocess(asked[i][0], **model.image)) for i in chosen])
        b = {k: v.to(device) for k, v in b.items() if k != "labels"}
        steps = list(model.generate(**b, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids))
        for row, i in zip(torch.stack(steps, 1).tolist() if steps else [[]] * len(chosen), chosen):
            end = next((t for t, token in enumerate(row) if token in tokenizer.eos_ids), len(row))
            texts[i] = tokenizer.decode(row[:end]).strip()
    return texts


def sit(model, tokenizer, items, batch, device, grey=False):
    """A model's answers to the last questions of toy.exam's Items, those before being answered by itself."""
    image = Image.new("RGB", (toy.SIZE, toy.SIZE), (128, 128, 128))
    images, past = [image if grey else toy.draw(item.scene) for item in items], [[] for _ in items]
    longer = [i for i, item in enumerate(items) if len(item.turns) > 1]
    first = answers(model, tokenizer, [(images[i], [(items[i].turns[0].question, None)]) for i in longer], batch, 24,
                    device) if longer else []
    for i, text in zip(longer, first):
        past[i] = [(items[i].turns[0].question, text or " ")]
    asked = [(image, turns + [(item.turns[-1].question, None)]) for image, turns, item in zip(images, past, items)]
    return answers(model, tokenizer, asked, batch, 24, device)


def score_toy(items, texts) -> dict:
    """items: toy.exam's. Accuracy overall, by kind (with its majority rate), by what was held out; what the worst kind
    took for what, among the questions that didn't ask for a sentence: {right: {said: how often}}."""
    right = [text == item.turns[-1].answer for text, item in zip(texts, items)]

    def part(those):
        return dict(accuracy=sum(right[i] for i in those) / len(those), n=len(those)) if those else dict(n=0)

    kinds, numbers = {}, range(len(items))
    for kind in toy.QUESTIONS:
        if those := [i for i in numbers if items[i].kind == kind]:
            commonest = Counter(items[i].turns[-1].short for i in those).most_common(1)[0][1]
            kinds[kind] = part(those) | dict(majority=commonest / len(those))
    groups = {f"{known} {name}": part([i for i in numbers if getattr(items[i], "new_" + name) == (known == "new")])
              for name in ("phrasing", "pair") for known in ("known", "new")}
    groups["sentences"] = part([i for i in numbers if items[i].turns[-1].answer != items[i].turns[-1].short])
    worst, confusion = min(kinds, key=lambda kind: kinds[kind]["accuracy"]), {}
    for text, item in zip(texts, items):
        if item.kind == worst and item.turns[-1].answer == item.turns[-1].short:
            confusion.setdefault(item.turns[-1].short, Counter())[text] += 1
    return dict(accuracy=sum(right) / len(right), n=len(right), kinds=kinds, groups=groups, worst=worst,
                confusion=confusion)


def show(result, grey=None):
    """score_toy's result as a table; grey: the same for grey pictures."""
    print(f"{'kind':15} {'n':>5} {'accuracy':>9} {'majority':>9}" + (f" {'grey':>9}" if grey else ""))
    for kind, row in result["kinds"].items():
        guessed = f" {grey['kinds'][kind]['accuracy']:9.1%}" if grey else ""
        print(f"{kind:15} {row['n']:5} {row['accuracy']:9.1%} {row['majority']:9.1%}{guessed}  "
              + "#" * round(20 * row["accuracy"]))
    for name, row in {"all": result, **result["groups"]}.items():
        print(f"{name:15} {row['n']:5} " + (f"{row['accuracy']:9.1%}" if row["n"] else ""))
    said = sorted({text for row in result["confusion"].values() for text in row})
    columns = [text for text in said if sum(row[text] for row in result["confusion"].values()) > 1]
    print(f"\n{result['worst']}: right answers down, given ones across\n{'':13}" + "".join(f"{c:>13}" for c in columns))
    for name in sorted(result["confusion"]):
        print(f"{name:13}" + "".join(f"{result['confusion'][name][c] or '.':>13}" for c in columns))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=["toy"])
    what.add_argument("--score", choices=SCORERS, metavar="TASK", help="score answers: " + ", ".join(SCORERS))
    p.add_argument("--model", default=toy.MODEL, help="a model folder (default: the embedded one)")
    p.add_argument("--seed", type=int, default=0, help="which held-out questions")
    p.add_argument("--n", type=int, default=4000, help="how many")
    p.add_argument("--grey", action="store_true", help="answer about grey pictures, too")
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--vision", help="the CLIP folder for a model that has no vision tower (liuhaotian's LLaVA)")
    p.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: as in sample.py")
    p.add_argument("--device", default="auto")
    p.add_argument("--quant", choices=["int8"], help="keep the language model in 8 bits (CPU)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--wrong", type=int, default=0, metavar="K", help="also print the first K wrong answers")
    submit.options(p)
    args = p.parse_args(argv)
    if args.score:
        return submit.command(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, stored_bytes(args.model))
    model = VLM.from_pretrained(args.model, dtype=dtype, device=device, vision=args.vision).eval()
    if args.quant:
        model.llm.pack(int8=True)
    tokenizer = Tokenizer.from_pretrained(args.model)
    items = toy.exam(args.seed, args.n)
    texts = sit(model, tokenizer, items, args.batch, device)
    result = score_toy(items, texts)
    grey = score_toy(items, sit(model, tokenizer, items, args.batch, device, grey=True)) if args.grey else None
    if args.json:
        for kind in result["kinds"] if grey else ():
            result["kinds"][kind]["grey"] = grey["kinds"][kind]["accuracy"]
        return print(json.dumps(result))
    show(result, grey)
    for text, item in [(t, i) for t, i in zip(texts, items) if t != i.turns[-1].answer][:args.wrong]:
        asked = " / ".join(turn.question for turn in item.turns)
        print(f"{item.scene.key} {item.kind}: {asked} said {text!r}, right {item.turns[-1].answer!r} "
              f"[{toy.caption(item.scene)}]")


if __name__ == "__main__":
    run(main)
