"""The toy world's scenes and pictures: reproducible, each thing in its place."""
import hashlib
import random

from PIL import Image, ImageChops

from toy import world as toy

PIXELS = "a711be7428d459badc45f46723bd31353722a63e6fb4d60c89a5f21c2916b932"


def test_a_scene_is_a_function_of_its_key():
    assert toy.make_scene("train/3") == toy.make_scene("train/3") != toy.make_scene("train/4")
    one, two = (toy.draw(toy.make_scene("train/3")) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_pictures_are_what_they_were():
    """To the pixel: a faster way to draw is no reason for others. (A new world is; then write down
    its hash.)"""
    pictures = b"".join(toy.draw(toy.make_scene(f"pixels/{i}")).tobytes() for i in range(40))
    assert hashlib.sha256(pictures).hexdigest() == PIXELS


def test_every_thing_has_a_place_of_its_own():
    for i in range(500):
        things = toy.make_scene(f"cells/{i}").things
        assert len({t.cell for t in things}) == len(things)
        assert 1 <= sum(t.what == "object" for t in things) <= 6


def test_things_are_drawn_in_their_places(monkeypatch):
    """The middle of each lies in its place; taking a thing away changes pixels there, and none far
    away."""
    for i in range(60):
        scene = toy.make_scene(f"where/{i}")
        rows = toy.layout(scene)
        assert len(rows) == len(scene.things)
        for row in rows:
            assert int(row.y // toy.CELL) * 3 + int(row.x // toy.CELL) == row.thing.cell
        _, x, y, _, _ = rows[-1]                     # on top of all others
        whole = toy.draw(scene)
        with monkeypatch.context() as patch:
            patch.setattr(toy, "layout", lambda scene, rows=rows[:-1]: rows)
            box = ImageChops.difference(whole, toy.draw(scene)).getbbox()
        assert box and x - 28 <= box[0] and box[2] <= x + 28 and y - 28 <= box[1]
        assert box[3] <= y + 28


def test_names_do_not_collide():
    names = toy.KINDS + toy.SHAPES + list(toy.COLORS) + toy.WORDS
    assert len(set(names)) == len(names) and len(toy.KINDS) == 40
    assert all(toy.emoji(kind).size == (48, 48) for kind in toy.KINDS)


def test_it_knows_its_own_pictures():
    assert all(toy.knows(toy.draw(toy.make_scene(f"knows/{i}"))) for i in range(200))
    noise = Image.frombytes("RGB", (96, 96), random.Random(0).randbytes(96 * 96 * 3))
    assert not toy.knows(noise) and not toy.knows(Image.new("RGB", (640, 480), (200, 200, 200)))
