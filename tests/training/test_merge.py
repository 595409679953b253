"""python -m training.merge, and the programs that take --adapter: base with adapter and the merged
folder are one model."""
import json
import shutil

import pytest
import torch

import eval as evaluation
import sample
from ccra import VLM
from core.common import ROOT
from core.layouts import Folder
from tests.core.helpers import fails, worded_llava
from tests.training.adapted import learn, near
from tests.training.helpers import mixed_json
from toy import world as toy
from training import adapters, merge
from viz import __main__ as viz

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
SCENE = str(ROOT / "assets" / "scene.png")


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return worded_llava(tmp_path_factory.mktemp("worded"))


@pytest.fixture(scope="module")
def kept(worded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    learn(worded / "hf", folder / "lora")
    learn(worded / "hf", folder / "both", 2, True, query="first")
    return folder


def run(base, adapter, out, *more):
    merge.main(["--model", str(base), "--adapter", str(adapter), "--out", str(out), *more])
    return out


# --------------------------------------------------------------------------------------------------
# The folder that is written

@pytest.mark.parametrize("which", ("lora", "both"))
def test_merged_is_base_and_adapter(worded, kept, tmp_path, which, capsys):
    out = run(worded / "hf", kept / which, tmp_path / "out")
    assert capsys.readouterr().out == (f"{worded / 'hf'} with {kept / which} written to {out}\n")
    merged = VLM.from_pretrained(out)
    assert Folder(out).layout == "nanoccra" and merged.query == {"lora": "all", "both": "first"}[
        which]
    assert near(merged, adapters.load(worded / "hf", kept / which)) == 0
    assert (out / "tokenizer.model").read_bytes() == (toy.MODEL / "tokenizer.model").read_bytes()
    again = run(worded / "original", kept / which, tmp_path / "again", "--vision",
                str(worded / "clip"))
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_in_the_number_format_of_the_base(kept, tmp_path):
    toy_base = VLM.from_pretrained(toy.MODEL)
    stored = {name: p.dtype for name, p in toy_base.named_parameters()}
    learn(toy.MODEL, tmp_path / "learnt", 2)
    out = run(toy.MODEL, tmp_path / "learnt", tmp_path / "out")
    merged = dict(VLM.from_pretrained(out).named_parameters())
    assert {name: p.dtype for name, p in merged.items()} == stored
    moved = {name for name, p in toy_base.named_parameters() if not torch.equal(p, merged[name])}
    assert moved == {name for name in stored if "_proj.weight" in name and "llm.layers" in name}


def test_for_transformers(worded, kept, tmp_path):
    out = run(worded / "hf", kept / "lora", tmp_path / "out", "--llava-hf")
    assert Folder(out).layout == "llava_hf"
    transformers.LlavaForConditionalGeneration.from_pretrained(out)
    assert near(VLM.from_pretrained(out), adapters.load(worded / "hf", kept / "lora")) == 0
    with fails("--llava-hf", "plain LLaVA"):
        run(worded / "hf", kept / "both", tmp_path / "x", "--llava-hf")
    assert not (tmp_path / "x").exists()


def test_refused(worded, kept, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(worded / "hf", base)
    for out in (base, kept / "lora"):
        with fails(f"--out {out}", "read from"):
            run(base, kept / "lora", out)
    with fails("no such folder"):
        run(base, kept / "nothing", tmp_path / "out")
    other = VLM.from_pretrained(base)
    with torch.no_grad():
        other.llm.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other", toy.MODEL / "tokenizer.model")
    with fails("another base than", tmp_path / "other", "language model", worded / "hf"):
        run(tmp_path / "other", kept / "lora", tmp_path / "out")
    monkeypatch.setattr(merge, "free_bytes", lambda folder: 1000)
    with fails(f"--out {tmp_path / 'out'}", "free"):
        run(base, kept / "lora", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_is_not_buried(worded, kept, tmp_path):
    shutil.copytree(kept / "lora", tmp_path / "x")
    with fails(tmp_path / "x", "holds an adapter"):
        run(worded / "hf", kept / "both", tmp_path / "x")


# --------------------------------------------------------------------------------------------------
# Programs

def test_sample(worded, kept, tmp_path, capsys):
    ask = ["--image", SCENE, "--q", "What is this?", "--max-new-tokens", "12", "--device", "cpu"]
    merged = run(worded / "hf", kept / "both", tmp_path / "out")
    capsys.readouterr()
    answers = []
    for how in (["--model", str(merged)], ["--model", str(worded / "hf")],
                ["--model", str(worded / "hf"), "--adapter", str(kept / "both")],
                ["--model", str(worded / "original"), "--vision", str(worded / "clip"),
                 "--adapter", str(kept / "both")]):
        sample.main([*ask, *how])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[2] == answers[3] != answers[1] and answers[0].strip()
    with fails(kept / "both", "--adapter"):
        sample.main([*ask, "--model", str(kept / "both")])
    with fails(worded / "hf", "a model's folder"):
        sample.main([*ask, "--model", str(worded / "hf"), "--adapter", str(worded / "hf")])


def test_beside_its_own_base(worded, kept, tmp_path, capsys):
    """--beside is another model, also when it is the adapter's base."""
    learn(toy.MODEL, tmp_path / "learnt", 2)
    seen = []

    class Seen(sample.Asker):
        def __init__(self, *given):
            super().__init__(*given)
            seen.append((self.name, self.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "Asker", Seen)
        sample.main(["--image", SCENE, "--q", "How many donuts are there?", "--device", "cpu",
                     "--adapter", str(tmp_path / "learnt"), "--beside", str(toy.MODEL),
                     "--heatmap", str(tmp_path / "x.png")])
    assert [name for name, _ in seen] == ["learnt", toy.MODEL.name]
    assert near(seen[1][1], VLM.from_pretrained(toy.MODEL, torch.float32)) < 1e-5
    assert near(seen[0][1], seen[1][1]) > 1e-3
    assert (tmp_path / "x.png").stat().st_size


def test_eval(worded, kept, tmp_path, capsys, monkeypatch):
    """The toy world's exam, and one's own: whose answers another adapter doesn't take over."""
    monkeypatch.chdir(tmp_path)
    ask = ["--device", "cpu", "--threads", "1", "--json"]
    merged = run(worded / "hf", kept / "both", tmp_path / "out")
    capsys.readouterr()
    with_adapter = ["--model", str(worded / "hf"), "--adapter", str(kept / "both")]
    said = []
    for how in (["--model", str(merged)], with_adapter):
        evaluation.main(["--task", "toy", "--n", "4", *how, *ask])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    mixed_json(tmp_path, 2)
    exam = ["--task", str(tmp_path / "data.json"), *ask]
    evaluation.main([*exam, *with_adapter])
    [file] = (tmp_path / "out" / "exam").glob("both/*/results.json")
    content = json.loads(file.read_text())
    assert content["adapter"].startswith("sha256:") and content["model"] == str(kept / "both")
    there = ["--out", str(file.parent)]
    evaluation.main([*exam, *with_adapter, *there])                 # goes on
    for other in (["--adapter", str(kept / "lora")], []):
        with fails(file, "adapter", "choose another --out"):
            evaluation.main([*exam, "--model", str(worded / "hf"), *other, *there])


def test_viz(tmp_path, capsys):
    learn(toy.MODEL, tmp_path / "learnt", 2)
    viz.main(["--pointing", "--n", "3", "--device", "cpu"])
    plain = capsys.readouterr().out
    viz.main(["--pointing", "--n", "3", "--device", "cpu", "--adapter", str(tmp_path / "learnt")])
    assert capsys.readouterr().out != plain
