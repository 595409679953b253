"""The study's world: what is asked about the background is true, told, balanced and held out."""
import torch

from clip import CLIPVision
from llama import Llama
from study import findings
from study import world as studied
from toy import world as toy


def test_the_background_is_what_toy_draws():
    for i in range(30):
        scene = toy.make_scene(f"ground/{i}")
        often, color = max(toy.draw(scene).getcolors(toy.SIZE ** 2))
        assert list(color) == studied.ground(scene)
        assert studied.tint(scene) in (None, "red" if color[0] > color[2] else "blue")


def test_the_exam_is_balanced_and_held_out():
    items = studied.exam(600)
    places = findings.by_kind(600)
    for kind in studied.KINDS:
        assert {items[i].kind for i in places[kind]} == {kind} and len(places[kind]) == 60
    for kind, most in (("tint", 0.65), ("shade", 0.45)):
        short = [items[i].turns[-1].short for i in places[kind]]
        assert max(map(short.count, short)) < most * len(short)
    assert all(item.scene.key.startswith("test") for item in items)
    scenes = [toy.make_scene(f"train/{i}") for i in range(400)]
    spoken = [turn for scene in scenes for turn in studied.conversation(scene)]
    about = sum("the picture" in question.replace("in the picture", "") for question, _ in spoken)
    assert 0.2 < about / len(spoken) < 0.4


def test_captions_tell_the_background(world):
    for i in range(50):
        scene = toy.make_scene(f"tell/{i}")
        text, tint = studied.background(scene), studied.tint(scene)
        assert studied.caption(scene).startswith(text + ", ")
        assert text.split()[-1] == studied.shade(scene)
        assert tint is None or text.startswith(tint + " ")
    for text in ("red picture 3", "blue picture 1"):
        assert len(world.tokenizer.encode(text)) == 3


def test_texts_tell_the_background_and_ask_for_it(world):
    rows = studied.text_rows(world.tokenizer, 0, batch=8)
    texts = [world.tokenizer.decode(id for id in ids if id >= 0) for ids, _ in rows]
    assert all(" picture " in text for text in texts)
    assert sum("is the picture?" in text for text in texts) >= 2
    for ids, labels in rows:                                  # the answers, and nothing else
        told = world.tokenizer.decode(label for label in labels if label >= 0)
        assert len(ids) == len(labels) and "picture" not in told and told


def test_the_llama_has_read_on_and_the_clip_is_the_same(world):
    before, after = (Llama.from_pretrained(dir / "llama") for dir in (world.source, world.towers))
    assert not torch.equal(before.lm_head.weight.bfloat16(), after.lm_head.weight.bfloat16())
    before, after = (CLIPVision.from_pretrained(dir / "clip")
                     for dir in (world.source, world.towers))
    assert all(torch.equal(p.bfloat16().float(), q)
               for p, q in zip(before.parameters(), after.parameters()))
