"""The embedded world: reproducible, balanced, honest about what is held out."""
import random
from collections import Counter

import pytest
import torch
from PIL import Image

import toy


def test_a_scene_is_a_function_of_its_key():
    assert toy.make_scene("train/3") == toy.make_scene("train/3") != toy.make_scene("train/4")
    assert toy.draw(toy.make_scene("train/3")).tobytes() == toy.draw(toy.make_scene("train/3")).tobytes()


def test_every_thing_has_a_cell_of_its_own():
    for i in range(500):
        things = toy.make_scene(f"cells/{i}").things
        assert len({t.cell for t in things}) == len(things)
        assert 1 <= sum(t.what == "object" for t in things) <= 6


def test_names_do_not_collide():
    names = toy.KINDS + toy.SHAPES + list(toy.COLORS) + toy.WORDS
    assert len(set(names)) == len(names) and len(toy.KINDS) == 32
    assert all(toy.emoji(kind).size == (48, 48) for kind in toy.KINDS)


@pytest.mark.parametrize("kind", toy.QUESTIONS)
def test_answers_are_balanced(kind):
    """No kind's commonest answer exceeds 45%, or 55% where the answer is yes or no."""
    answers = Counter()
    for i in range(3000):
        if turn := toy.ask(toy.make_scene(f"balance/{i}"), kind, random.Random(i)):
            answers[turn[1]] += 1
    commonest = answers.most_common(1)[0][1] / answers.total()
    assert answers.total() > 1000
    assert commonest <= (0.55 if set(answers) == {"yes", "no"} else 0.45)


def test_answers_are_right():
    """Each answer against the scene, by rules written a second time."""
    for i in range(600):
        scene = toy.make_scene(f"right/{i}")
        cell = {t.name: t.cell for t in scene.things}
        objects = [t.name for t in scene.things if t.what == "object"]
        for kind in toy.QUESTIONS:
            turn = toy.ask(scene, kind, random.Random(i))
            if turn is None:
                continue
            question, answer = turn
            said = question.rstrip("?.").split()
            named = [n for n in toy.KINDS + toy.SHAPES if n in said]
            if kind == "presence":
                assert answer == ("yes" if named[0] in objects else "no")
            elif kind == "count":
                plural = [n for n in toy.KINDS if toy.plural(n) in said]
                assert answer == str(objects.count(plural[0]))
            elif kind == "category":
                category = [c for c in toy.CATEGORIES if toy.plural(c) in said][0]
                assert answer == str(sum(o in toy.CATEGORIES[category] for o in objects))
            elif kind == "where":
                assert answer == (toy.PLACES[cell[named[0]]] if named[0] in cell else "nowhere")
            elif kind == "left-of":
                a, b = sorted(named, key=said.index)
                assert answer == ("yes" if cell[a] % 3 < cell[b] % 3 else "no")
            elif kind == "colour":
                assert [t.color for t in scene.things if t.name == named[0]] == [answer]
            else:
                assert answer in cell and answer in toy.WORDS


def test_a_missing_kind_is_asked_for_as_often_as_not():
    """Presence can't be guessed from which kind is asked for: yes and no come from the same set of kinds."""
    yes, no = Counter(), Counter()
    for i in range(6000):
        scene = toy.make_scene(f"prior/{i}")
        question, answer = toy.ask(scene, "presence", random.Random(i))
        (yes if answer == "yes" else no)[next(k for k in toy.KINDS if k in question.rstrip("?").split())] += 1
    assert all(0.35 < yes[k] / (yes[k] + no[k]) < 0.65 for k in toy.KINDS)


def test_held_out_scenes_are_not_training_scenes():
    keys = {scene.key for scene, *_ in toy.exam(0, 70)}
    assert len(keys) == 70 and all(key.startswith("test0/") for key in keys)
    # a held-out scene as a whole (things and places) doesn't occur among many training scenes either
    def content(scene):
        return tuple(sorted((t.what, t.name, t.cell, t.color) for t in scene.things))
    trained = {content(toy.make_scene(f"train2/{i}")) for i in range(3000)}
    assert sum(content(scene) in trained for scene, *_ in toy.exam(0, 70)) <= 3      # one of a single object can be


def test_it_knows_its_own_pictures():
    assert all(toy.knows(toy.draw(toy.make_scene(f"knows/{i}"))) for i in range(200))
    noise = Image.frombytes("RGB", (96, 96), random.Random(0).randbytes(96 * 96 * 3))
    assert not toy.knows(noise) and not toy.knows(Image.new("RGB", (640, 480), (200, 200, 200)))


def test_muon_step_is_orthogonal():
    """With one gradient and no history, Muon moves a matrix by a multiple of U V^T (up to Newton-Schulz's accuracy)."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(12, 20))
    p.grad = torch.randn(12, 20)
    toy.Muon([p], lr=1.0).step()
    singular = torch.linalg.svdvals(p.detach() / (0.2 * 20 ** 0.5))
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(-p.detach().flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_pretraining_goes_on_where_it_stopped(tmp_path):
    """Stopped by an error in step 150 and started again: the weights of a run that wasn't, and one log row a step."""
    def run(out, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([torch.nn.Linear(6, 4)])

        def loss_of_step(model, step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            return (model.layers[0](x) - x[:, :4]).square().mean(), 0.5
        out.mkdir(exist_ok=True)
        toy.pretrain("x", model, loss_of_step, 220, 1e-2, out)
        return model.layers[0].weight
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=150)
    assert torch.equal(whole, run(tmp_path / "parts"))
    logs = [(tmp_path / name / "x.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 12
