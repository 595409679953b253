"""A page to explore what the model looked at: page.html, with the numbers of one Sight in it."""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from core.canvas import COLOURS
from viz.figures import HEAT, blocks
from viz.maps import Sight

TEMPLATE = Path(__file__).resolve().parent / "page.html"
LONGEST = 672            # pixels of a side of the picture
SMALL = 128              # up to so many it is a PNG


def packed(values: Tensor) -> str:
    """A tensor's numbers for the page, as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values.numpy(), dtype="<f4").tobytes()).decode()


def data_url(image: Image.Image) -> str:
    """A picture, as a page holds it."""
    file = io.BytesIO()
    if max(image.size) <= SMALL:
        kind = "png"
        image.save(file, format="PNG")
    else:
        kind = "jpeg"
        image.save(file, format="JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def small(image: Image.Image) -> Image.Image:
    """A picture no larger than a page shows it."""
    image = image.copy()
    image.thumbnail((LONGEST, LONGEST))
    return image


def sight_data(sight: Sight) -> dict:
    """What the page knows of one question: JSON's values alone."""
    image, maps = small(sight.image), sight.maps
    data = dict(question=sight.question, words=sight.words, tokens=sight.tokens, grid=sight.grid,
                box=sight.box, blocks=blocks(sight), image=data_url(image), size=image.size,
                heat=HEAT, colours=["#%02x%02x%02x" % tuple(c) for c in COLOURS.tolist()],
                llm=packed(sight.llm.mean(0)), layers=0)
    if "w_hat" in maps:
        data |= dict(layers=len(maps["w_hat"]), alpha=maps["alpha"].tolist(),
                     w_hat=maps["w_hat"].tolist(), raw=maps["w_l"].softmax(-1).tolist(),
                     W_lp=packed(maps["W_lp"]), w_p=packed(maps["w_p"]),
                     layer_map=packed(maps["layer_map"]))
    return data


def page(data: dict) -> str:
    """page.html with these data. Text goes in as JSON without "<", and from there by textContent
    alone, so no question is markup."""
    text = json.dumps(data).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    if "serve" not in data:                      # a file has nobody to talk to
        template = template.replace("; connect-src 'self'", "", 1)
    return template.replace("DATA", text, 1)


def explorer(sight: Sight) -> str:
    """One HTML page that needs nothing else."""
    return page(sight_data(sight))
