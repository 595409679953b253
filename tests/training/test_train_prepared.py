"""train.py --data: a training on a prepared folder."""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from ccra import VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from llama import Llama, LlamaConfig
from tests.training.records import LLM, make, noise, record


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_pretrained(LLM)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVision(vision)
    llm = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
                            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
                            eos_token_id=2))
    llm.init_weights()
    config = CCRAConfig(text_dim=32, vision_dim=16, n_layers=2, d_hidden=8)
    VLM.build(vision, llm, config).save_pretrained(folder, tokenizer_file=tokenizer.file)
    return folder


@pytest.fixture
def trainable(tmp_path):
    """22 records that mix text and pictures, with answers of very different lengths."""
    (tmp_path / "images").mkdir()
    records = []
    for i in range(22):
        noise(tmp_path / "images" / f"{i}.png")
        answer = "yes " * (1 + 3 * (i % 7))
        if i % 3:
            records.append(record("<image>\nHow?", answer, id=i, image=f"{i}.png"))
        else:
            records.append(record("How?", answer, id=i))
    (tmp_path / "x.json").write_text(json.dumps(records))
    make(tmp_path)
    return tmp_path


def flags(model, world, out, *more):
    return ["--stage", "2", "--model", str(model), "--out", str(world / out), "--steps", "5",
            "--batch", "7", "--lr", "1e-2", "--device", "cpu", "--workers", "0",
            "--dtype", "float32", *more]


def weights_of(world, out):
    return load_file(world / out / "model.safetensors")


def log_of(world, out):
    return [row.split(",")[:4] for row in (world / out / "log.csv").read_text().splitlines()[1:]]


def test_training_is_that_on_the_json(model, trainable):
    train.main(flags(model, trainable, "a", "--json", str(trainable / "x.json"),
                     "--images", str(trainable / "images")))
    train.main(flags(model, trainable, "b", "--data", str(trainable / "out"), "--group", "none"))
    assert log_of(trainable, "a") == log_of(trainable, "b")
    one, two = weights_of(trainable, "a"), weights_of(trainable, "b")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_plan_counts_what_was_prepared(model, trainable, capsys):
    train.main(["--stage", "2", "--plan", "--model", str(model), "--data", str(trainable / "out"),
                "--gpus", "1", "--parallel", "ddp", "--max-length", "99", "--batch", "2"])
    n = json.loads((trainable / "out" / "report.json").read_text())["kept"]
    assert f"{n} samples in {-(-n // 2)} steps of 2" in capsys.readouterr().out


def test_a_grouped_run_goes_on_in_mid_epoch(model, trainable):
    grouped = ["--data", str(trainable / "out"), "--micro", "3"]
    train.main(flags(model, trainable, "whole", *grouped))
    train.main(flags(model, trainable, "parts", *grouped, "--stop-after", "2"))   # of 4 in an epoch
    with pytest.raises(UserError, match="group modality-length, not length"):
        train.main(flags(model, trainable, "parts", *grouped, "--group", "length"))
    train.main(flags(model, trainable, "parts", *grouped))
    assert log_of(trainable, "whole") == log_of(trainable, "parts")
    assert len(log_of(trainable, "whole")) == 5
    one, two = weights_of(trainable, "whole"), weights_of(trainable, "parts")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resume_is_of_the_same_json(model, trainable):
    """As many records of the same lengths, but another answer: not the run that was begun."""
    train.main(flags(model, trainable, "a", "--data", str(trainable / "out"), "--stop-after", "1"))
    text = (trainable / "x.json").read_text()
    (trainable / "x.json").write_text(text.replace("yes yes", "yes no", 1))
    make(trainable, "out2")
    why = "is of a run with sha256_of_json [0-9a-f]{64}, not [0-9a-f]{64}; remove it"
    with pytest.raises(UserError, match=why):
        train.main(flags(model, trainable, "a", "--data", str(trainable / "out2")))
    os.rename(trainable / "out", trainable / "moved")     # the same folder in another place is fine
    train.main(flags(model, trainable, "a", "--data", str(trainable / "moved")))
    assert len(log_of(trainable, "a")) == 5


def test_processes_stay_in_step_over_damaged_pictures(model, trainable):
    """Two processes and one, a share of whose pictures went bad after prepare: one loss curve, and
    it is said once."""
    for i in (1, 2, 4, 5):
        (trainable / "images" / f"{i}.png").write_bytes(b"gone")
    both = ["--data", str(trainable / "out"), "--micro", "2", "--threads", "1"]
    train.main(flags(model, trainable, "one", *both))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(ROOT / "train.py"), *flags(model, trainable, "two", *both)]
    torchrun = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    runs = [subprocess.Popen(command, env={**torchrun, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in "01"]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    for a, b in zip(log_of(trainable, "one"), log_of(trainable, "two"), strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-3, abs=1e-4)
    assert "".join(said).count("damaged picture") == 4
    assert len((trainable / "two" / "damaged.jsonl").read_text().splitlines()) == 4


def test_flags_that_need_each_other(model, trainable):
    for more, why in ((["--data", "x", "--json", "y"], "two ways"),
                      (["--group", "length"], "needs lengths"),
                      (["--data", str(trainable / "images")], "not a prepared folder")):
        with pytest.raises(UserError, match=why):
            train.main(flags(model, trainable, "x", *more))
