"""core/pictures.py: what a file shows, against what was drawn; what is refused says what to do."""
import io
import os
import sys
import threading
import types
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from clip import read_pixels
from core import pictures
from core.common import UserError
from core.pictures import FOREIGN, inspect, open_image, read, remarks, survey

RAMP = np.tile(np.arange(256), (8, 1))                                      # (8, 256)
GREY = RAMP.astype(np.uint8)
WIDE = (RAMP * 257).astype(np.uint16)                                       # all of 16 bits
FLOAT = (RAMP / 255).astype(np.float32)


def content(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def white_is_0(array):
    """A TIFF with these numbers, whose tag 262, photometric interpretation, says so."""
    data = content(Image.fromarray(array), "TIFF")
    old, new = (b"\x06\x01\x03\x00\x01\x00\x00\x00" + bytes([value, 0]) for value in (1, 0))
    assert data.count(old) == 1
    return data.replace(old, new)


def shown(source, **how):
    """(grey values, notes) of a picture whose channels are the same."""
    image, notes = read(source, **how)
    array = np.asarray(image).astype(int)                                   # (H, W, 3)
    assert image.mode == "RGB" and (array == array[..., :1]).all()
    return array[..., 0], notes


# --------------------------------------------------------------------------------------------------
# Pictures of the common kind stay as they are

@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "LAB"])
def test_the_common_kinds_are_pillows_pixels(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(
        "RGB" if mode == "LAB" else mode)
    image = Image.fromarray(np.asarray(image), "LAB") if mode == "LAB" else image
    kinds = {"CMYK": ("JPEG", "TIFF"), "YCbCr": ("JPEG",), "LAB": ("TIFF",), "P": ("PNG", "GIF")}
    for kind in kinds.get(mode, ("PNG", "BMP", "TIFF")):
        data = content(image, kind)
        got, notes = read(data)
        want = Image.open(io.BytesIO(data)).convert("RGB")
        assert notes == [] and np.array_equal(got, want), kind
        assert inspect(data) == (kind, []) == inspect(data, decode=True)


# --------------------------------------------------------------------------------------------------
# Grey of more than 8 bits

DEEP = {
    "PNG": (content(Image.fromarray(WIDE), "PNG"), "16-bit grey scaled to 8 bits"),
    "TIFF": (content(Image.fromarray(WIDE), "TIFF"), "16-bit grey scaled to 8 bits"),
    "TIFF, big-endian": (content(Image.fromarray(WIDE.astype(">u2")), "TIFF"),
                         "16-bit grey scaled to 8 bits"),
    "TIFF, 0 is white": (white_is_0(65535 - WIDE), "16-bit grey scaled to 8 bits"),
    "PGM": (b"P5 256 8 65535\n" + WIDE.astype(">u2").tobytes(), "16-bit grey scaled to 8 bits"),
    "PGM, 12 bits": (b"P5 256 8 4095\n" + (RAMP * 4095 // 255).astype(">u2").tobytes(),
                     "16-bit grey scaled to 8 bits"),
    "JPEG 2000": (content(Image.fromarray(WIDE), "JPEG2000"), "16-bit grey scaled to 8 bits"),
    "32 bits": (content(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), "taken as 0 to 65535"),
    "32 bits, small": (content(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
                       "taken as 0 to 255"),
    "signed": (content(Image.fromarray((RAMP * 10 ** 6 - 10 ** 8).astype(np.int32)), "TIFF"),
               "stretched from its least"),
    "float": (content(Image.fromarray(FLOAT), "TIFF"), "float numbers, taken as 0 to 1"),
    "float, 0 is white": (white_is_0(1 - FLOAT), "float numbers, taken as 0 to 1"),
    "float, 255": (content(Image.fromarray(FLOAT * 255), "TIFF"), "taken as 0 to 255"),
    "float, any": (content(Image.fromarray(FLOAT * 999 - 500), "TIFF"), "stretched from its least"),
    "PFM": (b"Pf\n256 8\n-1.0\n" + FLOAT.astype("<f4").tobytes(), "taken as 0 to 1"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_shown(kind):
    data, note = DEEP[kind]
    values, notes = shown(data)
    assert abs(values - RAMP).max() <= 1
    assert len(notes) == 1 and note in notes[0]
    assert inspect(data)[1] == notes


def test_deep_grey_with_little_in_it():
    values, notes = shown(content(Image.fromarray(GREY.astype(np.uint16)), "PNG"))
    assert values.max() == 1 and "nearly black" in notes[0]         # as a viewer shows it
    for value in (0.0, 7e9):                                        # one value alone
        flat = np.full((4, 4), value, np.float32)
        assert (shown(content(Image.fromarray(flat), "TIFF"))[0] == 0).all()
    for value in (np.nan, np.inf, -np.inf):
        odd = FLOAT.copy()
        odd[3, 3] = value
        with pytest.raises(UserError, match="picture: .*aren't finite"):
            read(content(Image.fromarray(odd), "TIFF"))


# --------------------------------------------------------------------------------------------------
# Alpha

def logo(hidden, alpha=0):
    """A dark square on nothing, (40, 40, 4)."""
    array = np.full((40, 40, 4), (hidden, hidden, hidden, alpha), np.uint8)
    array[10:30, 10:30] = 9, 9, 9, 255
    return array


def one_colour(mode, depth):
    """A PNG of two values, of which the first is transparent."""
    array = np.zeros((40, 40), np.uint16 if depth == 16 else np.uint8)
    array[10:30, 10:30] = {1: 255, 8: 9, 16: 9 * 257}[depth]
    if mode == "P":
        image = Image.fromarray(np.minimum(array, 1), "P")
        image.putpalette([77, 0, 0, 9, 9, 9])
    else:
        image = Image.fromarray(array) if depth == 16 else Image.fromarray(array).convert(mode)
    return content(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)


@pytest.mark.parametrize("hidden", [0, 128, 255])
def test_what_lies_below_transparent_pixels_is_not_seen(hidden):
    want = np.full((40, 40), 255)
    want[10:30, 10:30] = 9
    image = Image.fromarray(logo(hidden))
    palette = image.quantize(8, Image.Quantize.FASTOCTREE)          # alpha in the palette
    sources = [content(image, "PNG"), content(image.convert("LA"), "PNG"),
               content(image, "WEBP", lossless=True, exact=True), content(image, "TIFF"),
               content(palette, "PNG"), content(image, "GIF")]
    for data in sources:
        values, notes = shown(data)
        assert abs(values - want).max() <= 1 and notes == ["transparent: shown on white"]
        assert inspect(data)[1] == notes
    values, _ = shown(content(Image.fromarray(logo(hidden, alpha=128)), "PNG"))
    assert abs(values[0, 0] - (127 + hidden / 255 * 128)) <= 1      # half of each


@pytest.mark.parametrize("mode, depth, value", [
    ("L", 8, 9), ("RGB", 8, 9), ("P", 8, 9), ("L", 16, 9), ("1", 1, 255)])
def test_one_transparent_colour(mode, depth, value):
    data = one_colour(mode, depth)
    values, notes = shown(data)
    assert values[0, 0] == 255 and values[20, 20] == value
    assert "transparent: shown on white" in notes and inspect(data)[1] == notes


def test_alpha_that_hides_nothing_and_all():
    solid = logo(77, alpha=255)
    image, notes = read(content(Image.fromarray(solid), "PNG"))
    assert notes == [] and np.array_equal(image, solid[..., :3])
    values, notes = shown(content(Image.new("RGBA", (4, 4), (1, 2, 3, 0)), "PNG"))
    assert (values == 255).all() and notes == ["wholly transparent: shown white"]
    for mode in ("RGBa", "La"):                                     # colours times alpha
        image = Image.fromarray(logo(0)).convert("LA" if mode == "La" else "RGBA").convert(mode)
        values = np.asarray(pictures._in_rgb(image, "")[0])
        assert (values[0, 0] == 255).all() and (values[20, 20] == 9).all()


# --------------------------------------------------------------------------------------------------
# Orientation, frames

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_orientation(kind):
    image = Image.fromarray(np.arange(12 * 20, dtype=np.uint8).reshape(12, 20))
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
        data = content(image, kind, exif=exif, **options)
        plain = Image.open(io.BytesIO(data))
        as_stored, notes = read(data)
        assert np.array_equal(as_stored, plain.convert("RGB")) and len(notes) == (tag > 1)
        assert notes == inspect(data)[1] and all(f"(EXIF orientation {tag})" in n for n in notes)
        upright, notes = read(data, upright=True)
        assert np.array_equal(upright, ImageOps.exif_transpose(plain).convert("RGB"))
        assert all(note.endswith("turned upright") for note in notes)


def test_a_damaged_tag_is_none():
    image = Image.fromarray(GREY)
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"Exif\0\0" + b"\xff" * 40):
        assert read(content(image, "JPEG", exif=exif), upright=True)[0].size == (256, 8)
        assert inspect(content(image, "JPEG", exif=exif)) == ("JPEG", [])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame(kind):
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = content(first, kind, save_all=True, append_images=[second], **options)
    values, notes = shown(data)
    assert np.array_equal(values, RAMP) and notes == ["several frames or pages: the first is taken"]
    assert inspect(data)[1] == notes
    cut = data[:-200]                                               # in the second one
    if kind == "GIF":
        assert np.array_equal(shown(cut)[0], RAMP)


# --------------------------------------------------------------------------------------------------
# What is refused

def refused(path, **how):
    """What both ways of looking at a file say about it, in one line that names it."""
    with pytest.raises(UserError) as e:
        read(path, **how)
    with pytest.raises(UserError) as other:
        inspect(path)
    said = str(e.value)
    assert str(other.value).split("(")[0] == said.split("(")[0] and "\n" not in said
    return said


def test_refused_files_are_named(tmp_path, monkeypatch):
    noise = Image.effect_noise((200, 200), 99)
    files = {"half.jpg": content(noise, "JPEG")[:9000], "half.png": content(noise, "PNG")[:9000],
             "text.jpg": b"no picture", "empty.jpg": b"", "zero.ppm": b"P6 0 4 255\n"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    wanted = {"half.jpg": "truncated", "text.jpg": "no known kind", "empty.jpg": "0 bytes",
              "folder.png": "folder", "pipe.png": "pipe", "missing.png": "no such image",
              "dangling.png": "no such image", "empty.jpg/a.png": "no such image",
              "half.png": "", "zero.ppm": "", "loop.png": "", "x" * 300: "", "nul\0.png": ""}
    for name, word in wanted.items():
        said = refused(tmp_path / name)
        assert name.replace("\0", "\\x00") in said and word in said
    (tmp_path / "two\nlines.png").write_bytes(b"")
    assert r"two\nlines.png" in refused(tmp_path / "two\nlines.png")
    assert "device" in refused("/dev/zero")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    (tmp_path / "a.png").write_bytes(DEEP["PNG"][0])
    assert "bomb" in refused(tmp_path / "a.png")


def test_inspect_refuses_nothing_that_is_read():
    """A PNG may be broken where nobody looks."""
    info = PngImagePlugin.PngInfo()
    info.add_text("by", "nobody")
    whole = content(Image.fromarray(GREY), "PNG", pnginfo=info)
    for at in range(8, len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 16
        with suppress(UserError):
            _, notes = read(bytes(broken))
            assert inspect(bytes(broken)) == ("PNG", notes)


def test_too_narrow(tmp_path):
    """Refused when it is opened, and what is opened can be made square and cut out."""
    for size in ((1, 30000), (30000, 1), (1, 4097), (23171, 6)):
        Image.new("L", size).save(tmp_path / "a.png")
        assert "a.png: a picture of {} x {} is too narrow".format(*size) in refused(
            tmp_path / "a.png")
    Image.new("L", (1, 4096)).save(tmp_path / "a.png")
    for pad in (True, False):
        assert read_pixels(tmp_path / "a.png", 28, pad).shape == (3, 28, 28)
    assert 336 * (336 * pictures.MAX_RATIO) <= pictures.MAX_PIXELS
    with pytest.raises(UserError, match="a.png: .*too narrow"):
        read_pixels(tmp_path / "a.png", 1344, False)


HEADS = {
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an SVG drawing":
    b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn -->\n<!DOCTYPE svg []>\n<svg width='9'>",
    "a PDF document": b"%PDF-1.7", "a PostScript drawing":
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "a JPEG XL picture": b"\xff\x0a\0\0", "a film": b"\0\0\0\x18ftypisom\0\0", "a web page":
    b"\n<!DOCTYPE html><html>", "a pointer of large-file storage":
    b"version https://git-lfs.github.com/spec/v1\noid", "a camera's raw picture":
    b"FUJIFILMCCD-RAW 0201"}


def test_foreign_files_by_bytes_or_ending(tmp_path):
    for kind, _, endings, way_on in FOREIGN:
        assert way_on
        if kind in HEADS:
            (tmp_path / "x.jpg").write_bytes(HEADS[kind] + bytes(200))
            assert f"is {kind}" in refused(tmp_path / "x.jpg")
        for ending in endings.split():
            (tmp_path / f"x{ending}").write_bytes(b"whatever")
            assert f"is {kind}" in refused(tmp_path / f"x{ending}")
            if kind != "a camera's raw picture":         # a picture with a wrong name is one
                (tmp_path / f"x{ending}").write_bytes(DEEP["PNG"][0])
                assert read(tmp_path / f"x{ending}")[1]
    thumbnail = content(Image.fromarray(GREY), "TIFF")
    (tmp_path / "x.nef").write_bytes(thumbnail)          # which Pillow would take for the picture
    assert "raw" in refused(tmp_path / "x.nef")
    dng = content(Image.fromarray(GREY), "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    assert "raw" in refused(dng)


def test_heic_by_pillow_heif(monkeypatch):
    """Where it is installed, it adds itself to Pillow."""
    def register():
        Image.register_open("HEIF", lambda *_: Image.new("RGB", (3, 2)),
                            lambda head: head[4:12] == b"ftypheic")
        Image.ID.append("HEIF") if "HEIF" not in Image.ID else None

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener, module.__spec__ = register, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    assert open_image(HEADS["a HEIC picture"]).size == (3, 2)


@pytest.mark.parametrize("address", ["https://a.org/b.png", "HTTP://a.org/b", "ftp://a/b.png",
                                     "file:///etc/x.png", "data:image/png;base64," + "A" * 5000])
def test_addresses(address):
    said = refused(address)
    assert "download it first" in said and len(said) < 250


# --------------------------------------------------------------------------------------------------
# Pipes

def test_pipes_are_read_where_they_are_allowed(tmp_path, monkeypatch):
    data = content(Image.fromarray(GREY), "PNG")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def sent(some, path):
        """What is shown of it."""
        def send():
            with open(pipe, "wb") as file:
                file.write(some)
        writer = threading.Thread(target=send)
        writer.start()
        try:
            return shown(path, pipes=True)[0]
        finally:
            writer.join()

    assert np.array_equal(sent(data, pipe), RAMP)
    with pytest.raises(UserError, match="pipe: .*empty"):
        sent(b"", pipe)
    monkeypatch.setattr(pictures, "MAX_PIPED", len(data) - 1)
    with pytest.raises(UserError, match="pipe: more than"):
        sent(data, pipe)
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "PATIENCE", 0.05)
    with pytest.raises(UserError, match="pipe: nobody writes"):
        read(pipe, pipes=True)
    assert "save the picture" in refused(pipe)           # and nobody waits
    out, into = os.pipe()
    os.write(into, data)
    os.close(into)
    assert np.array_equal(shown(f"/dev/fd/{out}", pipes=True)[0], RAMP)
    os.close(out)


def test_stdin(monkeypatch):
    data = content(Image.fromarray(GREY), "PNG")

    def stdin(some, terminal=False):
        return types.SimpleNamespace(buffer=io.BytesIO(some), isatty=lambda: terminal)

    monkeypatch.setattr(sys, "stdin", stdin(data))
    assert np.array_equal(shown("-", pipes=True)[0], RAMP)
    for nothing in (stdin(b""), stdin(data, terminal=True), None):
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UserError, match="stdin"):
            read("-", pipes=True)
    assert "no such image" in refused("-")


# --------------------------------------------------------------------------------------------------
# Many

def test_what_is_said_of_many(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(GREY)
    for i in range(3):
        image.save(tmp_path / f"{i}.jpg", exif=exif)
    Image.fromarray(logo(0)).save(tmp_path / "a.png")
    image.save(tmp_path / "plain.png")
    (tmp_path / "bad.png").write_bytes(b"")
    notes, faults = survey(sorted(tmp_path.iterdir()))
    assert notes == {"stored on its side (EXIF orientation 6)": 3, "transparent: shown on white": 1}
    assert list(faults) == [tmp_path / "bad.png"] and "0 bytes" in faults[tmp_path / "bad.png"]
    for upright, words in ((False, "--upright turns them"), (True, "turned upright")):
        first, second = remarks(notes, upright)
        assert "1 transparent" in first and "3 pictures" in second and words in second
    assert remarks({}, False) == []
