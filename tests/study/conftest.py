"""The tiny towers, made for the study."""
from types import SimpleNamespace

import pytest

from clip import CLIPVision
from core.tokenizer import Tokenizer
from study import __main__ as program


@pytest.fixture(scope="module")
def world(towers, tmp_path_factory):
    """A place to work (out), where the tiny towers come from (source), and what was made of them
    (towers, tower, tokenizer): the Llama has read on, by two steps."""
    out = tmp_path_factory.mktemp("study")
    made = out / "towers"
    program.main(["towers", "--source", str(towers), "--towers", str(made), "--out", str(out),
                  "--llama-steps", "2"])
    return SimpleNamespace(out=out, source=towers, towers=made,
                           tower=CLIPVision.from_pretrained(made / "clip"),
                           tokenizer=Tokenizer.from_pretrained(made / "llama"))
