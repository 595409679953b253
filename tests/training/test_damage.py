"""A checkpoint that isn't as it was written is noticed, said, and the one before it is taken; a
resume upon something else than the run was begun with is refused; and there is room for all."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import train
from core.common import UserError
from training import checkpoints, damage
from training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = dict(steps=9, lr=0.1)


def begin():
    """Parameters, one of which never gets a gradient, and their optimiser."""
    torch.manual_seed(0)
    trained = {"a": nn.Parameter(torch.randn(5, 3)), "scalar": nn.Parameter(torch.tensor(1.5)),
               "unused": nn.Parameter(torch.randn(4))}
    return trained, torch.optim.AdamW(trained.values(), lr=0.1)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of three steps, and the weights after each."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    trained, optimizer = begin()
    weights = {}
    for step in (1, 2, 3):
        for name in ("a", "scalar"):
            trained[name].grad = torch.randn_like(trained[name])
        optimizer.step()
        Checkpoints(folder, 3).save(step, trained, optimizer, SETTINGS)
        weights[step] = {name: p.detach().clone() for name, p in trained.items()}
    return folder, weights


@pytest.fixture
def run(three, tmp_path):
    shutil.copytree(three[0], tmp_path / "checkpoints")
    return SimpleNamespace(folder=tmp_path / "checkpoints", weights=three[1],
                           newest=tmp_path / "checkpoints" / "step-00000003")


def load(run) -> int:
    """The step that is taken. Parameters and optimiser are that step's, to the bit."""
    trained, optimizer = begin()
    step = Checkpoints(run.folder, 3).load(trained, optimizer, SETTINGS)
    for name, p in trained.items():
        assert torch.equal(p, run.weights[step][name])
    assert {name for name, p in trained.items() if p in optimizer.state} == {"a", "scalar"}
    assert all(state["step"] == step for state in optimizer.state.values())
    return step


def is_damaged(run, capsys, why: str = "") -> None:
    assert load(run) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"note: {run.newest}: is damaged (") and why in said, said
    assert said.endswith("; going on from step 2\n") and said.count("\n") == 1


def change_state(folder, sign: bool = True, **fields):
    """state.json with other fields. sign: with the sha256 of what it is now."""
    path = folder / "state.json"
    state = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps(damage.signed(state) if sign else state))


def change_rank(folder, change):
    """The rank's file with other tensors or metadata, and checksums that fit it."""
    path = folder / "rank-0000.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        metadata = file.metadata()
    tensors, metadata = change(tensors, metadata) or (tensors, metadata)
    save_file(tensors, path, metadata)
    if "files" in json.loads((folder / "state.json").read_text()):
        change_state(folder, files={path.name: damage.sha256_of(path)})


def make_old(folder):
    """As it was written before there were checksums."""
    def old(tensors, metadata):
        return tensors, {"first_rows": json.dumps(json.loads(metadata["checkpoint"])["first_rows"])}

    change_rank(folder, old)
    path = folder / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in state.items() if k not in damage.ADDED}))


def test_what_is_whole_is_taken(run, capsys):
    assert load(run) == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("field", ["step", "updates", "processes", "settings", "shapes"])
def test_fields_of_another_type_or_out_of_range(run, capsys, field, old):
    text = (run.newest / "state.json").read_text()
    if old:
        make_old(run.newest)
        text = (run.newest / "state.json").read_text()
    for value in (None, True, "3", 2.5, -1, 10 ** 9, float("nan"), [], [3]):
        (run.newest / "state.json").write_text(text)
        change_state(run.newest, sign=not old, **{field: value})
        is_damaged(run, capsys, "state.json" if value != 10 ** 9 or field != "processes" else "")
    state = json.loads(text)
    del state[field]
    (run.newest / "state.json").write_text(json.dumps(state))
    is_damaged(run, capsys, field)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0" * 9, '{"step": 3, "step": 3}',
                                  "[" * 99_999, '{"step": ' + "9" * 5000 + "}"])
def test_no_state(run, capsys, text):
    (run.newest / "state.json").write_text(text)
    is_damaged(run, capsys, "state.json")


def test_a_state_changed_by_hand(run, capsys):
    change_state(run.newest, sign=False, settings={**SETTINGS, "lr": 0.2})
    is_damaged(run, capsys, "state.json was changed")
    change_state(run.newest, settings=SETTINGS, files={})
    is_damaged(run, capsys, "is missing")
    (run.newest / "state.json").unlink()
    is_damaged(run, capsys, "no state.json")


def test_bytes_changed_anywhere(run, capsys):
    path = run.newest / "rank-0000.safetensors"
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        is_damaged(run, capsys, "rank-0000.safetensors was changed")
    for other in (b"", content[:-1], content + b"\0", content[:8]):
        path.write_bytes(other)
        is_damaged(run, capsys, "rank-0000.safetensors was changed")


def test_files_that_are_others(run, capsys):
    path = run.newest / "rank-0000.safetensors"
    shutil.copy(run.folder / "step-00000002" / path.name, path)
    is_damaged(run, capsys, "was changed")
    shutil.copy(path, path.with_name("rank-0001.safetensors"))
    is_damaged(run, capsys, "2 files of ranks, written by 1")
    path.unlink()
    is_damaged(run, capsys, "rank-0000.safetensors is missing, or")
    path.with_name("rank-0001.safetensors").unlink()
    for make in (path.mkdir, lambda: path.symlink_to("nothing"), lambda: os.mkfifo(path)):
        make()
        is_damaged(run, capsys, "0 files of ranks")
        path.rmdir() if path.is_dir() else path.unlink()


CHANGES = {
    "a weight of another type": lambda t, m: t.update({"weight.a": t["weight.a"].half()}),
    "a moment of another type": lambda t, m: t.update({"exp_avg.a": t["exp_avg.a"].bfloat16()}),
    "another shape": lambda t, m: t.update({"weight.a": t["weight.a"].T.contiguous()}),
    "fewer rows": lambda t, m: t.update({"weight.a": t["weight.a"][:4].clone()}),
    "a scalar with rows": lambda t, m: t.update({"weight.scalar": torch.ones(1)}),
    "not finite": lambda t, m: t["weight.a"].fill_(float("nan")),
    "a weight less": lambda t, m: t.pop("weight.a"),
    "a moment less": lambda t, m: t.pop("exp_avg.a"),
    "a name more": lambda t, m: t.update({"weight.b": torch.ones(1)}),
    "no random numbers": lambda t, m: t.pop("rng.0"),
    "short random numbers": lambda t, m: t.update({"rng.0": t["rng.0"][:99].clone()}),
    "random numbers of another type": lambda t, m: t.update({"rng.0": t["rng.0"].float()}),
    "foreign random numbers": lambda t, m: t["rng.0"].fill_(255),
    "no metadata": lambda t, m: m.clear(),
    "metadata of others": lambda t, m: (m.clear(), m.update(format="pt")),
    "metadata of a list": lambda t, m: m.update({next(iter(m)): "[1]"}),
    "metadata of nothing": lambda t, m: m.update({next(iter(m)): ""}),
    "rows elsewhere": lambda t, m: m.update(
        {key: value.replace('"weight.a": 0', '"weight.a": 1') for key, value in m.items()}),
    "rows of another type": lambda t, m: m.update(
        {key: value.replace('"weight.a": 0', '"weight.a": "0"') for key, value in m.items()}),
}


@pytest.mark.parametrize("old", (False, True))
def test_tensors_that_do_not_fit(run, capsys, old):
    """Even where the checksums say nothing, or aren't there."""
    if old:
        make_old(run.newest)
    spare = run.newest.with_name("spare")
    shutil.copytree(run.newest, spare)
    for what, change in CHANGES.items():
        shutil.rmtree(run.newest)
        shutil.copytree(spare, run.newest)

        def changed(tensors, metadata, change=change):
            change(tensors, metadata)
            return tensors, metadata

        change_rank(run.newest, changed)
        try:
            is_damaged(run, capsys)
        except AssertionError as e:
            raise AssertionError(what) from e


def test_the_older_format_goes_on(run, capsys):
    make_old(run.newest)
    assert load(run) == 3 and capsys.readouterr().err == ""
    trained, optimizer = begin()
    upon = {**SETTINGS, "basis": {"tokenizer": "1"}}
    assert Checkpoints(run.folder, 3).load(trained, optimizer, upon) == 3
    assert "of an older version of this code" in capsys.readouterr().err
    change_state(run.folder / "step-00000002", sign=False, sha256=None, files=None)
    shutil.rmtree(run.newest)
    path = run.folder / "step-00000002" / "state.json"       # a new one without its checksums
    state = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in state.items() if k not in damage.ADDED}))
    assert load(run) == 1 and "lacks its checksums" in capsys.readouterr().err


def test_all_are_damaged(run):
    for path in run.folder.glob("*/rank*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="3: is damaged .*so are those before it; put a copy back"):
        load(run)
    shutil.rmtree(run.folder / "step-00000001")
    shutil.rmtree(run.folder / "step-00000002")
    with pytest.raises(UserError, match="there is none before it; .*remove it to begin anew"):
        load(run)


def test_what_was_damaged_is_replaced_in_time(run, capsys):
    """Going on from step 2, step 3 is written again; had it another number, the damaged one would
    go all the same. Nothing half-written or half-removed stays."""
    (run.newest / "state.json").write_text("{")
    (run.folder / "step-00000004.tmp").mkdir()
    (run.folder / "step-00000001.old.tmp").mkdir()
    (run.folder / "step-00000009").mkdir()
    shutil.copytree(run.newest, run.folder / "step-00000007")
    assert load(run) == 2
    names = {path.name for path in run.folder.iterdir()}
    assert names == {f"step-0000000{i}" for i in (1, 2, 3, 7)}
    trained, optimizer = begin()
    ours = Checkpoints(run.folder, 2)
    assert ours.load(trained, optimizer, SETTINGS) == 2
    ours.save(3, trained, optimizer, SETTINGS)
    assert {path.name for path in run.folder.iterdir()} == {"step-00000002", "step-00000003"}
    capsys.readouterr()
    assert ours.load(trained, optimizer, SETTINGS) == 3 and capsys.readouterr().err == ""


def test_unreadable_is_not_damaged(run, monkeypatch):
    """Another user's files are whole: nothing is thrown away."""
    def refuses(file, digest):
        raise PermissionError(13, "Permission denied", "rank")

    monkeypatch.setattr(damage.hashlib, "file_digest", refuses)
    with pytest.raises(UserError, match="rank: cannot read it .Permission denied"):
        load(run)


def test_room_for_all_that_lies_there_at_once(run, monkeypatch):
    trained, optimizer = begin()
    each = checkpoints.size_of(trained)
    free = SimpleNamespace(free=0)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: free)
    # keep, checkpoints to come, bytes of the model -> bytes that are needed (there are 3)
    for keep, left, model, need in ((3, 9, 0, each), (5, 9, 0, 3 * each), (5, 1, 0, each),
                                    (5, 9, 7 * each, 9 * each), (3, 0, 7, 7), (1, 2, 0, each)):
        ours = Checkpoints(run.folder, keep)
        free.free = need * 1.05 + 1
        ours.check_room(trained, left, model)
        free.free = need * 1.05 - 1
        with pytest.raises(UserError, match="make room, give a smaller --keep"):
            ours.check_room(trained, left, model)
    free.free = each - 1
    with pytest.raises(UserError, match="a checkpoint takes .* same command goes on from step 3"):
        Checkpoints(run.folder, 3).save(4, trained, optimizer, SETTINGS)
    assert load(run) == 3
    shutil.rmtree(run.folder.parent)
    with pytest.raises(UserError, match="cannot make this folder .*nothing was saved before"):
        Checkpoints(run.folder, 3).save(4, trained, optimizer, SETTINGS)


def test_a_run_knows_what_it_was_begun_with(stage1, tmp_path):
    """Weights frozen or trained, its configuration, its tokenizer: in the middle of the run, and
    after it."""
    def flip_last(content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1])

    def other_eps(content: bytes) -> bytes:
        return content.replace(b'"rms_norm_eps": 1e-0', b'"rms_norm_eps": 2e-0')

    def field_that_nobody_reads(content: bytes) -> bytes:
        return content + b"\xfa\x01\x00"

    changes = (("model.safetensors", flip_last, "(picture tower|language model)"),
               ("config.json", other_eps, "configuration"),
               ("tokenizer.model", field_that_nobody_reads, "tokenizer"))
    model = tmp_path / "model"
    shutil.copytree(stage1, model, ignore=shutil.ignore_patterns("checkpoints"))
    words = ["--stage", "2", "--model", str(model), "--out", str(tmp_path / "out"), "--batch", "2",
             "--workers", "0", "--steps", "2"]
    for more in (["--stop-after", "1"], []):
        train.main([*words, *more])
        for name, change, what in changes:
            before = (model / name).read_bytes()
            (model / name).write_bytes(change(before))
            assert (model / name).read_bytes() != before
            with pytest.raises(UserError, match=f"was begun with another {what} .sha256"):
                train.main(words)
            (model / name).write_bytes(before)
    train.main(words)


def test_a_base_changed_while_stage_1_goes_on(towers, tmp_path, monkeypatch):
    """What it doesn't train is read again in the end: it shall be what was trained with."""
    shutil.copytree(towers, tmp_path / "towers")
    file = tmp_path / "towers" / "llama" / "model.safetensors"
    loop = train.loop

    def meanwhile(*args):
        done = loop(*args)
        content = file.read_bytes()
        file.with_name("new").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.replace(file.with_name("new"), file)
        return done

    monkeypatch.setattr(train, "loop", meanwhile)
    with pytest.raises(UserError, match="the language model was changed on the disk while"):
        train.main(["--stage", "1", "--vision", str(tmp_path / "towers" / "clip"), "--llm",
                    str(tmp_path / "towers" / "llama"), "--out", str(tmp_path / "out"), "--batch",
                    "2", "--workers", "0", "--steps", "1"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
