"""A model that is being trained answers a few questions of the toy world (--ask-every)."""
import torch

import data
from clip import preprocess
from core.distributed import say
from toy.exam import exam
from toy.world import draw
from training import sharding


def say_answers(run, step: int, n: int = 4) -> None:
    """Answers to the first questions of the toy world's exam, as the model is trained (dtype,
    mode). Forward passes alone, without a cache, since every process has to take part in each pass
    of a sharded model; all compute the same."""
    for question in exam(0, n):
        last = question.turns[-1]
        turns = [(turn.question, turn.answer) for turn in question.turns[:-1]]
        prompt = data.prompt([*turns, (last.question, None)], run.tokenizer)
        pixels = preprocess(draw(question.scene), run.vlm.vision.config.image_size, pad=True)
        item = data.item(prompt, pixels)
        said = []
        for _ in range(12):
            batch = data.make_batch([item], device=run.device)
            with torch.no_grad(), sharding.products_in(run.dtype, run.device):
                logits = run.model(**batch, mode=run.args.mode)                        # (1, T', V)
            said.append(int(logits[0, -1].argmax()))
            item["ids"].append(said[-1])
        ends = (i for i, token in enumerate(said) if token in run.tokenizer.eos_ids)
        text = run.tokenizer.decode(said[:next(ends, len(said))])
        say(f"  step {step}: {last.question} {text!r}, right {last.answer!r}")
    sharding.sliced_again(run.model)
