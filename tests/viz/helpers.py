"""Models, batches and Sights to look at."""
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ccra import VLM, CCRAConfig
from clip import CLIPVision, preprocess
from core.common import ROOT
from data import item, make_batch, prompt
from llama import Llama
from toy import world as toy
from viz.maps import Sight, visible

SCENE = ROOT / "assets" / "scene.png"


def build(towers, **changes) -> VLM:
    """A VLM of random weights, large enough that attention is far from even: 4 patches, 3 layers, 2
    blocks. changes: to its CCRAConfig."""
    torch.manual_seed(0)
    vision = CLIPVision.from_pretrained(towers / "clip")
    llm = Llama.from_pretrained(towers / "llama")
    model = VLM.build(vision, llm, CCRAConfig(32, 16, 3, 8, **changes))
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5)
    return model.eval()


def batch_of(model: VLM, tokenizer, question: str, image: Image.Image) -> dict[str, Tensor]:
    """What model.generate takes."""
    row = prompt([(question, None)], tokenizer)
    return make_batch([item(row, preprocess(image, **model.image))], model.query)


def scene(i: int = 0) -> Image.Image:
    """One of the toy world's pictures."""
    return toy.draw(toy.make_scene(f"viz/{i}"))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """What a JPEG stores worst."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_sight(A=5, L=24, grid=24, size=(336, 336), words=("Where", " is", " it", "?"),
                 tokens=None) -> Sight:
    """A Sight without a model."""
    g, N = torch.Generator().manual_seed(0), grid ** 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    maps = dict(alpha=draw(len(words)).softmax(-1), W_lp=draw(L, N), w_l=draw(L),
                w_hat=draw(L).softmax(-1), w_p=draw(N), layer_map=draw(L, N))
    image, box = visible(noise(*size), True)
    return Sight(image, box, grid, "".join(words), list(words), tokens or [" word"] * A,
                 draw(2, A, N).softmax(-1), [2, 3], maps)


def bare_sight(image: Image.Image, grid: int, pad: bool = True) -> Sight:
    """A picture as a model sees it, of which nothing is known."""
    return Sight(*visible(image, pad), grid, "", [], [], torch.zeros(1, 1, grid ** 2), [1], {})
