"""Ask a model many questions and score its answers.

    python eval.py --task toy                    2,000 held-out questions about the embedded world, by kind
    python eval.py --task toy --grey             the same about grey pictures: what can be guessed without looking

Answers are greedy. Beside each kind's accuracy stands its majority rate: that of always giving the commonest answer.
"""
import argparse
import json
import sys
from collections import Counter

import torch
from PIL import Image
from tqdm import tqdm

import toy
from ccra import VLM
from clip import preprocess
from data import collate, prompt, query_of
from llama import Tokenizer
from weights import pick_device, run


def answers(model: VLM, tokenizer: Tokenizer, questions, batch: int, max_new_tokens: int, device):
    """Greedy answers, in order, to [(PIL image, question)]; questions of like length share a batch."""
    rows = [prompt([(question, None)], tokenizer) for _, question in questions]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    texts, size = [""] * len(rows), model.vision.config.image_size
    for at in tqdm(range(0, len(rows), batch), desc="answering", unit="batch", file=sys.stderr):
        chosen = by_length[at:at + batch]
        b = collate([dict(ids=rows[i].ids, labels=rows[i].labels, query=query_of(rows[i].turns, model.query),
                          pixels=preprocess(questions[i][0], size, pad=True)) for i in chosen])
        b = {k: v.to(device) for k, v in b.items() if k != "labels"}
        steps = list(model.generate(**b, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids))
        for row, i in zip(torch.stack(steps, 1).tolist() if steps else [[]] * len(chosen), chosen):
            end = next((t for t, token in enumerate(row) if token in tokenizer.eos_ids), len(row))
            texts[i] = tokenizer.decode(row[:end]).strip()
    return texts


def score_toy(items, texts) -> dict:
    """items: toy.exam's [(scene, kind, question, answer)]. Accuracy is exact equality of the text."""
    kinds = {}
    for kind in toy.QUESTIONS:
        pairs = [(text, item[3]) for text, item in zip(texts, items) if item[1] == kind]
        if pairs:
            commonest = Counter(answer for _, answer in pairs).most_common(1)[0][1]
            kinds[kind] = dict(accuracy=sum(text == answer for text, answer in pairs) / len(pairs), n=len(pairs),
                               majority=commonest / len(pairs))
    return dict(accuracy=sum(k["accuracy"] * k["n"] for k in kinds.values()) / len(items), n=len(items), kinds=kinds)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", required=True, choices=["toy"])
    p.add_argument("--model", default=toy.MODEL, help="a model folder (default: the embedded one)")
    p.add_argument("--seed", type=int, default=0, help="which held-out questions")
    p.add_argument("--n", type=int, default=2000, help="how many")
    p.add_argument("--grey", action="store_true", help="grey pictures instead of the scenes")
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--device", default="auto")
    p.add_argument("--quant", choices=["int8"], help="keep the language model in 8 bits (CPU)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--wrong", type=int, default=0, metavar="K", help="also print the first K wrong answers")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    model = VLM.from_pretrained(args.model, dtype=torch.float32, device=device).eval()
    if args.quant:
        model.llm.pack(int8=True)
    tokenizer = Tokenizer.from_pretrained(args.model)
    items = toy.exam(args.seed, args.n)
    grey = Image.new("RGB", (toy.SIZE, toy.SIZE), (128, 128, 128))
    asked = [(grey if args.grey else toy.draw(scene), question) for scene, _, question, _ in items]
    texts = answers(model, tokenizer, asked, args.batch, 12, device)
    result = score_toy(items, texts)
    if args.json:
        return print(json.dumps(result))
    print(f"{'kind':10} {'n':>5} {'accuracy':>9} {'majority':>9}")
    for kind, row in result["kinds"].items():
        bar = "#" * round(20 * row["accuracy"])
        print(f"{kind:10} {row['n']:5} {row['accuracy']:9.1%} {row['majority']:9.1%}  {bar}")
    print(f"{'all':10} {result['n']:5} {result['accuracy']:9.1%}")
    for text, (scene, kind, question, answer) in [(t, i) for t, i in zip(texts, items) if t != i[3]][:args.wrong]:
        print(f"{scene.key} {kind}: {question} said {text!r}, right {answer!r} [{toy.caption(scene)}]")


if __name__ == "__main__":
    run(main)
