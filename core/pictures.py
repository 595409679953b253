"""A picture file -> a picture in RGB as a viewer shows it, or a line that says what to do.

    what is in the file            what comes out                                         noted
    8 bits: grey, RGB, palette     its pixels, as they are stored
    1, 2 and 4 bits, CMYK, YCbCr,  as Pillow turns them into RGB (colour profiles are
      LAB, HSV; RGB of 16 bits     not applied, as in LLaVA; LAB goes through its own)
    alpha, of a channel, of a      laid on white, whatever colours lie hidden below       yes
      palette, one colour (tRNS)
    grey of 9 to 16 bits           divided by the greatest number that so many bits hold  yes
    grey of signed, of 32-bit and  no range is agreed upon. Read as 0..1 (floats alone),  yes
      of float numbers             0..255 or 0..65535, the first that holds them all;
                                   else stretched from the least to the greatest
    NaN or infinite numbers        refused
    several frames or pages        the first                                              yes
    an orientation tag (EXIF)      as it is stored, as in LLaVA; turned if `upright`      yes
                                   (a TIFF is always turned: Pillow does)
    longer than 4,096 times its    refused: CLIP's preprocessing would fill the memory
      width, or than 23,170
    HEIC, SVG, PDF, camera raw..   refused, with a way on (FOREIGN); HEIC is read where
                                   pillow-heif is installed
    no file: pipes, web addresses  refused; `pipes` lets sample.py read those to its stdin

The notes are short and the same for all pictures of a kind, so that `data.py prepare` can count
them. What is refused here is refused everywhere: training, evaluation and sample.py all read by
`read`, and prepare's `inspect`, which needn't decode a picture of the common kinds, opens it in the
same way.
"""
import io
import os
import re
import select
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.common import UserError

MAX_PIXELS = 2 ** 29           # of a square that holds the picture: at 3 bytes 1.6 GB
MAX_RATIO = 2 ** 12            # long side : short side; 336 x (336 * 2 ** 12) are within MAX_PIXELS
MAX_PIPED = 100 * 2 ** 20      # bytes that come through a pipe
PATIENCE = 10                  # seconds until somebody has to write into a named pipe

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
HEIC = "a HEIC picture"
RAW = "a camera's raw picture"
POSTSCRIPT = "a PostScript drawing"
# What people take for a picture: what it is, how its bytes begin, its endings, what to do.
FOREIGN = (
    (HEIC, rb"....ftyp(hei[cmsx]|hev[cx]|mif1|msf1)", ".heic .heif .hif",
     "convert it to JPEG or PNG, e.g. `heif-convert IN.heic OUT.jpg`, or pip install pillow-heif"),
    ("an AVIF picture", rb"....ftypavi[fs]", ".avif",
     "convert it to PNG or JPEG, e.g. `avifdec IN.avif OUT.png`"),
    ("a JPEG XL picture", rb"\xff\x0a|\0\0\0\x0cJXL ", ".jxl",
     "convert it to PNG or JPEG, e.g. `djxl IN.jxl OUT.png`"),
    ("an SVG drawing", rb"(\xef\xbb\xbf)?\s*(<[?!][^<]*)*<(\w+:)?svg\b", ".svg .svgz",
     "convert it to PNG, e.g. `rsvg-convert -w 1024 IN.svg -o OUT.png`"),
    ("a PDF document", rb"%PDF", ".pdf",
     "convert its page to PNG, e.g. `pdftoppm -r 150 -png IN.pdf OUT`"),
    (POSTSCRIPT, rb"%!PS|\xc5\xd0\xd3\xc6", ".eps .ps .ai",
     "convert it to PNG, e.g. `gs -sDEVICE=png16m -r150 -o OUT.png IN.eps`"),
    (RAW, rb"II\*\0....CR|....ftypcrx |FUJIFILMCCD-RAW|IIU\0|IIR[OS]\x08|\0MRM|FOVb",
     ".arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .rw2 .srw .x3f",
     "develop it to JPEG or PNG, e.g. with darktable or `dcraw -w -T`"),
    ("a film", rb"....ftyp(isom|iso\d|mp4\d|qt  |M4V )|\x1aE\xdf\xa3|RIFF....AVI ",
     ".mp4 .mov .avi .mkv .webm", "save one of its frames as PNG, e.g. `ffmpeg -i IN -vframes 1 "
     "OUT.png`"),
    ("a web page", rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)", ".html .htm",
     "download the picture itself"),
    ("a pointer of large-file storage", rb"version https://git-lfs", "",
     "fetch the picture itself, e.g. `git lfs pull`"),
)

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
STORED = {2: "mirrored", 3: "upside down", 4: "upside down"}     # the others: on its side
TURNED = "EXIF orientation"                                      # in every note about one

# Pillow warns of large pictures below its limit, odd tags and the like: several lines, no way on
warnings.filterwarnings("ignore", module=r"PIL|core\.pictures")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Source = str | Path | bytes | BinaryIO


# --------------------------------------------------------------------------------------------------
# What others call

def open_image(path: Source, upright: bool = False) -> Image.Image:
    """A picture file as a PIL image in RGB, as a viewer shows it: see this module's table. upright:
    turn it as its orientation tag says, which LLaVA doesn't.

    UserError naming the path when it is missing, not a picture, cut short, absurdly large or
    without pixels.
    """
    return read(path, upright)[0]


def read(source: Source, upright: bool = False,
         pipes: bool = False) -> tuple[Image.Image, list[str]]:
    """`open_image`, and notes on what isn't shown as it is stored.

    source: a path, or the file's content, or an open file. pipes: a path may be one; "-" is stdin.
    """
    with _opened(source, pipes) as image:
        depth = _stored_mode(image)
        image.load()
        shown, notes = _in_rgb(image, depth)
        orientation = _orientation(image)
        if upright and orientation > 1:
            shown = shown.transpose(TURNS[orientation])
        notes += _frames(image) + _stored(orientation, upright)
    return shown, notes


def inspect(source: str | Path | bytes, decode: bool = False) -> tuple[str, list[str]]:
    """Whether a file can be read: (what it is, in Pillow's words: "JPEG"; `read`'s notes).

    UserError only where `read` has one, and then always, as far as it can be told without decoding
    a PNG or a JPEG in full.
    decode: decode these, too (a JPEG to an eighth of its size).
    """
    with _opened(source) as image:
        kind = image.format
        plain = image.mode in ("1", "L", "P", "RGB", "CMYK") and not _has_alpha(image)
        if not plain or kind not in ("PNG", "JPEG") or decode and kind == "PNG":
            return kind, read(source)[1]
        orientation = _orientation(image) if kind == "JPEG" or "exif" in image.info else 1
        notes = _frames(image) + _stored(orientation)
        if kind == "PNG":
            try:
                image.verify()                           # reads it all, and compares its checksums
            except Exception:                            # maybe of what nobody needs
                return kind, read(source)[1]
        elif decode or not _ends_well(source):
            image.draft("RGB", (1, 1))                   # to an eighth of its size: cheaper, and
            image.load()                                 # all of its bytes are read
    return kind, notes


def survey(sources: Iterable[str | Path | bytes]) -> tuple[Counter, dict]:
    """`inspect` many: how often each note, and what is wrong with those that can't be read."""
    notes, faults = Counter(), {}
    for source in sources:
        try:
            notes.update(inspect(source)[1])
        except UserError as e:
            faults[source] = str(e)
    return notes, faults


def remarks(notes: dict[str, int], upright: bool) -> list[str]:
    """What to say before work on pictures begins. notes: how often each. Lines."""
    turned = sum(count for note, count in notes.items() if TURNED in note)
    others = [f"{count} {note}" for note, count in notes.items() if TURNED not in note]
    lines = []
    if others:
        lines.append(f"note: pictures, not all as they are stored: {', '.join(others)}")
    if turned:
        how = "turned upright" if upright else "taken so, as LLaVA does: --upright turns them"
        lines.append(f"note: {turned} picture{'s' * (turned > 1)} stored on the side, mirrored or "
                     f"upside down (EXIF), {how}")
    return lines


def is_address(path: str) -> bool:
    """Whether it is a web address, or a picture written as text, where a file should be."""
    return re.match(r"(?:https?|ftp|file|s3|gs|data):", path, re.IGNORECASE) is not None


def label(source: Source) -> str:
    """What to call a picture in a message, in one line."""
    if not isinstance(source, str | Path):
        return "picture"
    path = str(source)
    return path if path.isprintable() else repr(path)


# --------------------------------------------------------------------------------------------------
# Opening

@contextmanager
def _opened(source: Source, pipes: bool = False) -> Iterator[Image.Image]:
    """Pillow's image, not yet decoded. Whatever goes wrong with it inside of the `with`, too, is a
    UserError: on bad bytes Pillow's decoders raise OSError, SyntaxError, ValueError and others."""
    what = label(source)
    try:
        content = _content(source, what, pipes)
        suffix = Path(source).suffix.lower() if isinstance(source, str | Path) else ""
        with _identified(content, suffix, what) as image:
            _check_size(image, what)
            yield image
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{what}: no such image") from e
    except Exception as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{what}: cannot be read as an image ({reason})") from e


def _content(source: Source, what: str, pipes: bool) -> str | Path | BinaryIO:
    """What Pillow opens: a file's path, or bytes in memory."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        return source
    path = str(source)
    if is_address(path) and not os.path.exists(path):
        raise UserError(f"{what[:80]}: is a web address, not a file; download it first "
                        "(e.g. `curl -LO ADDRESS`), and give the file")
    if pipes and path == "-":
        return _from_stdin()
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return source
    if stat.S_ISDIR(mode):
        raise UserError(f"{what}: is a folder, not a picture")
    if pipes and path in STDIN:
        return _from_stdin()
    if not pipes or not stat.S_ISFIFO(mode):
        raise UserError(f"{what}: is a pipe or a device, not a picture file; save the picture in a "
                        "file first")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        if not select.select([pipe], [], [], PATIENCE)[0]:   # opened as usual, it would wait
            raise UserError(f"{what}: nobody writes into this pipe")
        os.set_blocking(pipe.fileno(), True)
        return _all_of(pipe, what)


def _from_stdin() -> io.BytesIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("-: no picture comes through stdin; give a file, or one through a pipe: "
                        "curl ... | python sample.py --image - --q ...")
    return _all_of(sys.stdin.buffer, "stdin")


def _all_of(pipe: BinaryIO, what: str) -> io.BytesIO:
    """What comes through a pipe can be read once, so it is kept."""
    content = pipe.read(MAX_PIPED + 1)
    if not content:
        raise UserError(f"{what}: no picture came through this pipe, it was empty")
    if len(content) > MAX_PIPED:
        raise UserError(f"{what}: more than {MAX_PIPED >> 20} MB came through this pipe; save the "
                        "picture in a file first")
    return io.BytesIO(content)


def _identified(content: str | Path | BinaryIO, suffix: str, what: str) -> Image.Image:
    """Pillow's image, of a kind that is what it looks like there."""
    try:
        image = _open_by_pillow(content)
    except UnidentifiedImageError:
        head = _head(content)
        if not head:
            raise UserError(f"{what}: cannot be read as an image (it is empty, 0 bytes)") from None
        if foreign := _foreign(head, suffix):
            raise _not_read(what, foreign) from None
        raise UserError(f"{what}: cannot be read as an image (its content is of no known kind: "
                        "PNG, JPEG, WebP, GIF, BMP, TIFF ...)") from None
    if image.format in ("EPS", "TIFF"):
        # Pillow would run Ghostscript, or take a raw picture's thumbnail for the picture
        foreign = _foreign(_head(content), suffix)
        if foreign is None and 50706 in getattr(image, "tag_v2", ()):        # DNGVersion
            foreign = _foreign(b"", ".dng")
        if foreign and foreign[0] in (POSTSCRIPT, RAW):
            image.close()
            raise _not_read(what, foreign)
    return image


def _foreign(head: bytes, suffix: str) -> tuple | None:
    """The row of FOREIGN that says what a file is: by its first bytes, else by its ending."""
    for row in FOREIGN:
        if re.match(row[1], head, re.DOTALL | re.IGNORECASE):
            return row
    return next((row for row in FOREIGN if suffix and suffix in row[2].split()), None)


def _open_by_pillow(content: str | Path | BinaryIO) -> Image.Image:
    """HEIC with pillow-heif, which knows how to add itself to Pillow."""
    try:
        return Image.open(content)
    except UnidentifiedImageError:
        foreign = _foreign(_head(content), "")
        if foreign is None or foreign[0] != HEIC or not find_spec("pillow_heif"):
            raise
        from pillow_heif import register_heif_opener
        register_heif_opener()
        return Image.open(content)


def _not_read(what: str, foreign: tuple) -> UserError:
    kind, _, _, way_on = foreign
    return UserError(f"{what}: is {kind}, which isn't read here; {way_on}")


def _head(content: str | Path | BinaryIO) -> bytes:
    """The first bytes."""
    if isinstance(content, str | Path):
        with open(content, "rb") as file:
            return file.read(1024)
    place = content.tell()
    content.seek(0)
    head = content.read(1024)
    content.seek(place)
    return head


def _check_size(image: Image.Image, what: str) -> None:
    """UserError for a picture that clip.preprocess couldn't make square, or cut out."""
    short, long = sorted(image.size)
    size = f"{image.width} x {image.height}"
    if short == 0:
        raise UserError(f"{what}: this image has no pixels ({size})")
    if long * long > MAX_PIXELS or long > MAX_RATIO * short:
        raise UserError(f"{what}: a picture of {size} is too narrow to be made square: that would "
                        f"be {long} x {long}; cut it, or make it smaller")


def _ends_well(source: str | Path | bytes) -> bool:
    """Whether a JPEG file ends with its end marker, which one that was cut doesn't. (Some whole
    ones don't either.)"""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as f:
        f.seek(-2, os.SEEK_END)
        return f.read() == b"\xff\xd9"


# --------------------------------------------------------------------------------------------------
# What it shows

def _stored_mode(image: Image.Image) -> str:
    """How a pixel lies in the file, in Pillow's words ("L;4"). Forgotten by decoding."""
    mode = image.tile[0][3] if getattr(image, "tile", None) else ""
    mode = mode[0] if isinstance(mode, tuple) and mode else mode
    return mode if isinstance(mode, str) else ""


def _in_rgb(image: Image.Image, depth: str) -> tuple[Image.Image, list[str]]:
    """A decoded picture -> RGB, notes."""
    notes, alpha = [], None
    if image.mode in ("LA", "La", "P", "PA", "RGBA", "RGBa") and _has_alpha(image):
        if image.mode in ("La", "RGBa"):                     # colours times alpha
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        shown, alpha = image.convert("RGB"), image.getchannel("A")
    else:
        alpha = _one_transparent(image, depth)
        grey = image
        if image.mode == "F" or image.mode.startswith("I"):
            grey, note = _grey(image, depth)
            notes.append(note)
        shown = grey.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        seen = alpha.getextrema()[1] > 0
        notes.append("transparent: shown on white" if seen else "wholly transparent: shown white")
        white = Image.new("RGB", shown.size, "white")
        white.paste(shown, mask=alpha)
        shown = white
    return shown, notes


def _has_alpha(image: Image.Image) -> bool:
    with suppress(AssertionError):                           # a palette picture without a palette
        return image.has_transparency_data
    return False


def _one_transparent(image: Image.Image, depth: str) -> Image.Image | None:
    """The alpha (L) of a picture in which one colour is transparent, as PNG's tRNS says it."""
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple) and len(colour) == 3:
        if depth.startswith("RGB;16"):                       # Pillow keeps the upper byte of each
            colour = tuple(value >> 8 for value in colour)
        same = (np.asarray(image) == np.array(colour)).all(-1)              # (H, W)
    elif image.mode in ("1", "L", "I", "I;16") and isinstance(colour, int):
        wider = {"L;2": 85, "L;4": 17}.get(depth, 1)         # Pillow spreads values over 8 bits
        same = np.asarray(image) == colour * wider                          # (H, W)
    else:
        return None
    return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def _grey(image: Image.Image, depth: str) -> tuple[Image.Image, str]:
    """Grey of more than 8 bits -> (L, a note). ValueError for numbers that aren't finite."""
    values = np.asarray(image)                                              # (H, W)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") and image.mode == "I":
        bits = 12 if depth == "I;12" else 16
        top = 2 ** bits - 1
        table = np.rint(np.arange(2 ** 16) * (255 / top)).clip(0, 255).astype(np.uint8)
        dark = int(values.max()) < top / 16
        shown = table[values.clip(0, 2 ** 16 - 1)]
        note = f"{bits}-bit grey scaled to 8 bits"
        note += ", nearly black: less than a sixteenth of its range is used" if dark else ""
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("it holds numbers that aren't finite")
        kind = "float" if image.mode == "F" else "signed or 32-bit"
        tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        top = next((top for top in tops if 0 <= low and high <= top), None)
        how = f"taken as 0 to {top}" if top else "stretched from its least to its greatest number"
        low, top = (0, top) if top else (low, high - low or 1)
        shown = np.rint((values - np.float64(low)) * (255 / top)).astype(np.uint8)
        note = f"grey of {kind} numbers, {how}"
    if getattr(image, "tag_v2", {}).get(262) == 0:           # TIFF: 0 is white
        shown = 255 - shown
    return Image.fromarray(shown), note


def _frames(image: Image.Image) -> list[str]:
    """A note on an animation, or on a document of several pages. (A phone's MPO isn't one.)"""
    several = False
    if image.format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        with suppress(Exception):                            # a later frame may be broken
            several = image.is_animated
    return ["several frames or pages: the first is taken"] if several else []


def _orientation(image: Image.Image) -> int:
    """EXIF's tag, 1 for none. A damaged tag is none."""
    with suppress(Exception):
        orientation = image.getexif().get(0x0112, 1)
        return orientation if orientation in TURNS else 1
    return 1


def _stored(orientation: int, upright: bool = False) -> list[str]:
    if orientation == 1:
        return []
    note = f"stored {STORED.get(orientation, 'on its side')} ({TURNED} {orientation})"
    return [note + (": turned upright" if upright else "")]
