"""Weights load exactly, or there is an error of one line that names tensor and file."""
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core import weights
from core.folders import read_config
from core.weights import INDEX, SINGLE, Tensors, load, save
from tests.core.helpers import fails, write


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        if tied:
            self.last.weight = self.first.weight


def net(**kw):
    with torch.device("meta"):
        return Net(**kw)


def content():
    torch.manual_seed(0)
    return {"a.first.weight": torch.randn(4, 3), "a.first.bias": torch.randn(4),
            "a.last.weight": torch.randn(4, 3)}


def strip(name):
    return name.removeprefix("a.") if name.startswith("a.") else None


@pytest.mark.parametrize("shard_bytes, files", [(5e9, 1), (60, 3), (70, 2)])
def test_round_trip(tmp_path, shard_bytes, files):
    save(tmp_path, content(), {"x": 1}, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / INDEX).exists() == (files > 1) and not list(tmp_path.glob("*.tmp"))
    tensors = Tensors(tmp_path)
    assert sorted(tensors) == sorted(content())
    assert all(torch.equal(tensors[k], v) for k, v in content().items())
    assert tensors.shape("a.first.bias") == (4,) and tensors.file("a.first.bias").parent == tmp_path
    assert "a.first.bias" in tensors and "b" not in tensors and len(tensors) == 3
    model = load(net(), tensors, strip)
    assert all(torch.equal(v, content()["a." + k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert read_config(tmp_path) == {"x": 1}


def test_transformers_finds_the_format_tag(tmp_path):
    save(tmp_path, content(), {})
    assert Tensors(tmp_path).handles[tmp_path / SINGLE].metadata() == {"format": "pt"}


def test_saving_again_in_fewer_shards_leaves_one_entry_point(tmp_path):
    for shard_bytes in (60, 5e9, 60):
        save(tmp_path, content(), {}, shard_bytes)
        assert len(Tensors(tmp_path)) == 3


def test_dtype_and_frozen(tmp_path):
    save(tmp_path, content() | {"a.last.weight": torch.ones(4, 3, dtype=torch.float16)}, {})
    kept = load(net(), Tensors(tmp_path), strip)
    assert [p.dtype for p in kept.parameters()] == [torch.float32] * 2 + [torch.float16]
    frozen = load(net().requires_grad_(False), Tensors(tmp_path), strip, dtype=torch.float64)
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in frozen.parameters())


def test_tied_weight_is_filled_once_and_stays_tied(tmp_path):
    tensors = content()
    del tensors["a.last.weight"]
    save(tmp_path, tensors, {})
    model = load(net(tied=True), Tensors(tmp_path), strip)
    assert model.last.weight is model.first.weight
    assert torch.equal(model.last.weight, tensors["a.first.weight"])
    save(tmp_path, content(), {})
    with fails("a.first.weight", "a.last.weight", SINGLE):     # two values for one weight
        load(net(tied=True), Tensors(tmp_path), strip)


def test_unfit_tensors_are_named(tmp_path):
    save(tmp_path, content() | {"b": torch.ones(2)}, {})
    load(net(), Tensors(tmp_path), strip, unneeded=("b*",))
    with fails("1 unknown", "b in " + SINGLE):                 # rename doesn't know it
        load(net(), Tensors(tmp_path), strip)
    with fails("1 unknown", "b in " + SINGLE):                 # rename knows it, the module doesn't
        load(net(), Tensors(tmp_path), lambda name: strip(name) or "first.extra")
    save(tmp_path, content() | {"a.first.bias": torch.ones(5)}, {})
    with fails("1 misshapen", "a.first.bias in " + SINGLE, "(5,)", "(4,)"):
        load(net(), Tensors(tmp_path), strip)
    save(tmp_path, {"a.last.weight": torch.ones(4, 3)}, {})
    with fails("2 missing", "first.weight", "first.bias", str(tmp_path)):
        load(net(), Tensors(tmp_path), strip)


def test_a_shard_is_named_in_the_error(tmp_path):
    save(tmp_path, content() | {"a.first.bias": torch.ones(5)}, {}, 60)
    with fails("a.first.bias in model-00002-of-00003.safetensors"):
        load(net(), Tensors(tmp_path), strip)


def test_buffers_count(tmp_path):
    with torch.device("meta"):
        model = nn.BatchNorm1d(2)
    save(tmp_path, {"weight": torch.ones(2), "bias": torch.ones(2)}, {})
    with fails("missing", "running_mean"):
        load(model, Tensors(tmp_path), lambda name: name)


def test_broken_folders(tmp_path):
    with fails("no weights", str(tmp_path)):
        Tensors(tmp_path)
    save(tmp_path, content(), {})
    whole = (tmp_path / SINGLE).read_bytes()
    for cut in (len(whole) - 1, 40, 4, 0):               # in the data, in the header, in its length
        (tmp_path / SINGLE).write_bytes(whole[:cut])
        with fails(SINGLE, "not a complete safetensors file"):
            Tensors(tmp_path)
    entry = b'"x":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = b"{" + entry % (0, 4) + b"," + entry % (4, 8) + b"}"
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with fails(SINGLE):                                  # one name twice in one file
        Tensors(tmp_path)


def test_broken_shards(tmp_path):
    save(tmp_path, content(), {}, 60)
    index = json.loads((tmp_path / INDEX).read_text())

    def with_map(**changes):
        weight_map = {k: v for k, v in {**index["weight_map"], **changes}.items() if v}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return Tensors(tmp_path)

    first, second = index["weight_map"]["a.first.weight"], index["weight_map"]["a.first.bias"]
    with fails("ghost", second, INDEX):                  # the index promises what isn't there
        with_map(ghost=second)
    with fails("a.first.weight", second, INDEX):         # ... or is in another shard
        with_map(**{"a.first.weight": second, "a.first.bias": first})
    save_file({"a.first.bias": torch.ones(4), "stowaway": torch.ones(1)}, tmp_path / second)
    with fails("stowaway", second, INDEX):               # the index doesn't mention it
        with_map()
    save_file({"a.first.bias": torch.ones(4), "a.first.weight": torch.ones(4, 3)},
              tmp_path / second)
    with fails("a.first.weight", first, second):         # two shards hold it
        with_map()
    with fails("x", "not a plain file name"):
        with_map(x="../../" + first)
    (tmp_path / second).unlink()
    with fails(second, "missing"):
        with_map()
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "f", "x": "g"}}')
    with fails(INDEX, "'x' is given twice"):
        Tensors(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": 3}')
    with fails(INDEX, "weight_map"):
        Tensors(tmp_path)
    save_file(content(), tmp_path / SINGLE)
    with fails(SINGLE, INDEX, "both"):
        Tensors(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save(tmp_path, content(), {"x": 1})
    before = (tmp_path / SINGLE).read_bytes()

    def breaks(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", breaks)
    with fails(SINGLE, "no space left"):
        save(tmp_path, {"b": torch.ones(3)}, {"x": 2})
    assert (tmp_path / SINGLE).read_bytes() == before and read_config(tmp_path) == {"x": 1}
    assert not list(tmp_path.glob("*.tmp"))
    with fails("is a file"):
        save(tmp_path / SINGLE, {}, {})


# --------------------------------------------------------------------------------------------------
# Memory, and time

def mapped(file):
    """{start: (end, resident KiB)} of the places where a file is mapped into this process."""
    places, here = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = [int(x, 16) for x in line.split()[0].split("-")]
            here = here if line.endswith(str(file)) else None
        elif here and line.startswith("Rss:"):
            places[here[0]] = (here[1], int(line.split()[1]))
    return places


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))
def test_loading_copies_nothing_and_converting_leaves_nothing_behind(tmp_path, name):
    tensors = {"weight": torch.randn(1024, 2048).half()}                  # 4 MiB
    file = write(tmp_path, {name: tensors}, {}) / name
    before = file.read_bytes()

    def load(dtype):
        with weights.skeleton():
            net = nn.Linear(2048, 1024, bias=False)
        return weights.load(net, Tensors(tmp_path), lambda name: name, dtype=dtype)

    net = load(None)
    address = net.weight.data_ptr()
    assert any(start <= address < end for start, (end, _) in mapped(file).items())
    with torch.no_grad():
        net.weight.add_(1)                                                # stays in this process
    assert torch.equal(net.weight, tensors["weight"] + 1) and file.read_bytes() == before
    del net
    store = Tensors(tmp_path)
    with weights.skeleton():
        net = nn.Linear(2048, 1024, bias=False)
    assert store["weight"].float().sum().isfinite()
    assert sum(rss for _, rss in mapped(file).values()) >= 4000
    weights.load(net, store, lambda name: name, dtype=torch.float32)
    assert torch.equal(net.weight, tensors["weight"].float())
    assert sum(rss for _, rss in mapped(file).values()) < 200
    assert torch.equal(store["weight"], tensors["weight"])                # read again from the file


def test_a_bar_for_large_models_where_somebody_watches(tmp_path, monkeypatch):
    write(tmp_path, {"model.safetensors": {"weight": torch.ones(3, 2)}}, {})
    for terminal, big, shown in ((True, 24, True), (True, 25, False), (False, 24, False)):
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(weights, "BIG", big)
        with weights.skeleton():
            net = nn.Linear(2, 3, bias=False)
        weights.load(net, Tensors(tmp_path), lambda name: name)
        assert ("loading" in screen.getvalue()) == shown
