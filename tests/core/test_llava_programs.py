"""Programs take LLaVA's folders: asked, and as the beginning of a training."""
import pytest
import torch

import sample
import train
from ccra import VLM
from core.common import ROOT
from core.layouts import Folder
from tests.core.helpers import fails, worded_llava

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return worded_llava(tmp_path_factory.mktemp("worded"))


def test_sample_asks_llava(worded, capsys):
    ask = ["--image", str(ROOT / "assets" / "scene.png"), "--q", "What is this?",
           "--max-new-tokens", "6", "--device", "cpu"]
    answers = []
    for folder in (["hf"], ["original", "--vision", str(worded / "clip")]):
        sample.main([*ask, "--model", str(worded / folder[0]), *folder[1:]])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()
    sample.main([*ask, "--model", str(worded / "hf"), "--dtype", "bfloat16"])
    with fails("no vision tower", "--vision DIR"):
        sample.main([*ask, "--model", str(worded / "original")])
    with fails("not a vision-language model"):
        sample.main([*ask, "--model", str(worded / "vicuna")])


@pytest.mark.parametrize("vision, llm", [("clip", "vicuna"), ("hf", "original"), ("hf", "hf")])
def test_training_starts_from_every_layout(worded, tmp_path, vision, llm):
    train.main(["--stage", "1", "--vision", str(worded / vision), "--llm", str(worded / llm),
                "--out", str(tmp_path), "--steps", "1", "--batch", "2", "--device", "cpu"])
    model, before = VLM.from_pretrained(tmp_path), VLM.from_pretrained(worded / "hf")
    assert model.fuser.name == "ccra" and model.projector[0].in_features == 32
    for part in ("vision", "llm"):
        state = getattr(before, part).state_dict()
        for name, t in getattr(model, part).state_dict().items():
            assert torch.equal(t, state[name])
    assert Folder(tmp_path).layout == "nanoccra"


def test_plain_llava_trains_too(worded, tmp_path):
    """Stage 2 of LLaVA itself; the tower's last block, which nobody reads, is frozen even if the
    tower is trained."""
    model = VLM.from_pretrained(worded / "hf")
    trained = train.freeze(model, 2, train_vision=True)
    assert "vision.layers.1.mlp.fc1.weight" in trained
    assert not any(name.startswith("vision.layers.2.") for name in trained)
    arguments = ["--stage", "2", "--model", str(worded / "hf"), "--steps", "1", "--batch", "2",
                 "--device", "cpu"]
    train.main([*arguments, "--out", str(tmp_path)])
    assert VLM.from_pretrained(tmp_path).fuser.name == "llava"
    with fails("'llava'", "--norm"):
        train.main([*arguments, "--out", str(tmp_path / "y"), "--norm", "token"])
