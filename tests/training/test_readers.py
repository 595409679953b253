"""What can go wrong between a picture's file and a batch: readers that are killed, silent or
without shared memory, pictures that go bad, a signal while nothing comes."""
import json
import os
import signal
import threading
import time

import pytest
import torch

import data
import train
from core.common import UserError
from tests.training.helpers import log_of, mixed_json, same_parameters
from training import readers
from training.readers import Lenient, Notes, limit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_small_set_is_not_let_through_whole():
    assert [limit(n) for n in (0, 1, 2, 4, 10, 20, 30, 999, 1100, 350_000)] == [
        0, 0, 1, 2, 5, 10, 10, 10, 11, 3500]


def flags(stage1, out, *more):
    return ["--stage", "2", "--model", str(stage1), "--out", str(out), "--batch", "2", "--steps",
            "6", "--micro", "2", "--save-every", "100", "--workers", "1", "--threads", "1", *more]


def in_step_3(monkeypatch, out, what):
    """A reader does this when it should read a picture for step 3, after step 2."""
    real, count = data.LlavaJson.pixels, [0]

    def pixels(self, i):
        count[0] += 1
        if count[0] == 5:
            while not (out / "log.csv").exists() or len(log_of(out)) < 2:
                time.sleep(0.02)
            what()
        return real(self, i)

    monkeypatch.setattr(data.LlavaJson, "pixels", pixels)


def kill(number):
    os.kill(os.getpid(), number)


def no_memory(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left")


FAULTS = {
    "killed": (lambda m, out: in_step_3(m, out, lambda: kill(signal.SIGKILL)),
               "was killed .out of memory..: give fewer --workers"),
    "bus error": (lambda m, out: in_step_3(m, out, lambda: kill(signal.SIGBUS)),
                  "no room in shared memory: .* make /dev/shm larger"),
    "left": (lambda m, out: in_step_3(m, out, lambda: os._exit(3)), "ended with status 3"),
    "stopped": (lambda m, out: in_step_3(m, out, lambda: kill(signal.SIGSTOP)),
                "no picture came from the readers for 2 s"),
    "without memory": (lambda m, out: m.setattr(torch.Tensor, "share_memory_", no_memory),
                       "no room in shared memory for a batch of 0 MB .unable to allocate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_that_is_gone(fault, stage1, tmp_path, monkeypatch):
    """A line, a checkpoint of the last finished step, no process left behind, and the resumed run
    is that without the fault."""
    given, out = mixed_json(tmp_path), tmp_path / "out"
    how, words = FAULTS[fault]
    with monkeypatch.context() as patch:
        if fault == "stopped":
            patch.setattr(readers, "PATIENCE", 2)
        how(patch, out)
        began = time.monotonic()
        with pytest.raises(UserError, match=words) as e:
            train.main(flags(stage1, out, *given))
    assert time.monotonic() - began < 30 and "\n" not in str(e.value)
    assert not [p for p in readers.multiprocessing.active_children() if p.is_alive()]
    done = len(log_of(out))
    assert done < 6 and len(list(out.glob("checkpoints/step-*"))) == (done > 0)
    if fault == "killed":
        assert done == 2
        train.main(flags(stage1, out, *given))
        train.main(flags(stage1, tmp_path / "whole", *given, "--workers", "0"))
        assert log_of(out) == log_of(tmp_path / "whole")
        assert same_parameters(out, tmp_path / "whole")


def test_a_signal_while_nothing_comes(stage1, tmp_path, monkeypatch, capsys):
    """SIGTERM ends the waiting, too, long before patience does."""
    monkeypatch.setattr(readers, "GRACE", 0.5)
    in_step_3(monkeypatch, tmp_path / "out", lambda: kill(signal.SIGSTOP))

    def ask():
        while not (tmp_path / "out" / "log.csv").exists() or len(log_of(tmp_path / "out")) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    began = time.monotonic()
    train.main(flags(stage1, tmp_path / "out", *mixed_json(tmp_path)))
    thread.join()
    assert time.monotonic() - began < 30
    assert "stopped early, after a checkpoint" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_a_picture_of_a_json_goes_bad(stage1, tmp_path, monkeypatch, capsys):
    """As in a prepared folder: noted with record and path, learnt nothing from; too many end it."""
    given, out = mixed_json(tmp_path), tmp_path / "out"

    def spoil(*names):
        def after(*_):
            for name in names:
                (tmp_path / name).write_bytes(b"gone")
            return {}, {}
        monkeypatch.setattr(data, "survey", after)

    spoil("1.png")
    short = ["--batch", "8", "--steps", "3", "--workers", "0"]
    train.main(flags(stage1, out, *given, *short))
    (note,) = map(json.loads, (out / "damaged.jsonl").read_text().splitlines())
    assert note["path"] == str(tmp_path / "1.png") and note["start"] == 1
    assert note["message"].startswith(f"record 1 (id '1'): {tmp_path}/1.png: cannot be read")
    assert "damaged picture" in capsys.readouterr().err
    spoil(*(f"{i}.png" for i in range(22) if i % 3))
    with pytest.raises(UserError, match=r"8 of 14 pictures .*damaged.jsonl.*record \d+ .*\.png"):
        train.main(flags(stage1, tmp_path / "out2", *given, *short))


def test_notes_of_this_start_are_counted(tmp_path, capsys):
    file = tmp_path / "damaged.jsonl"
    first = Notes(file)
    assert [first.add("a", "m"), first.add("b", "m"), first.add("a", "m")] == [1, 2, 2]
    again = Notes(file)
    assert again.start == 2 and again.add("b", "m") == 1
    whole = file.read_text()
    for edited in (whole + whole[:20], whole + "[]\n", "\n" + whole, whole + '{"start": "x"}\n',
                   whole + "\x00" * 9, whole.replace("1", "-9" * 900, 1)):
        file.write_text(edited)
        assert Notes(file).add("c", "m") == 1
        assert all(json.loads(line)["start"] for line in file.read_text().splitlines())
    file.unlink()
    for make in (file.mkdir, lambda: (file.rmdir(), os.mkfifo(file))):
        make()
        with pytest.raises(UserError, match="damaged.jsonl: isn't a file"):
            Notes(file)


def test_the_folder_vanishes(tmp_path):
    class Two:
        image_root, size = tmp_path / "images", 8
        sample, path = (lambda self, i: data.Sample()), (lambda self, i: "p")

        def pixels(self, i):
            raise UserError("p: no such image")

        def record_id(self, i):
            return "record 7"

        def picture_count(self):
            return 1000

    with pytest.raises(UserError, match="record 7: p: no such image .the whole folder"):
        Lenient(Two(), Notes(tmp_path / "damaged.jsonl"))[0]
