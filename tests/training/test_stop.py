"""Who asks a training to end, and how it ends: SIGTERM, Ctrl-C, a closed terminal."""
import csv
import os
import signal
import threading

import pytest

import train
from training.stop import SAID, SIGNALS, Stop

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no signals between processes")


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_every_way_to_ask(number, capfd):
    before = handlers()
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and Stop.by_key == (number == signal.SIGINT)
        again = signal.getsignal(signal.SIGINT)          # a second Ctrl-C ends at once
        assert (again == signal.SIG_DFL) == (number == signal.SIGINT)
    assert handlers() == before
    assert capfd.readouterr().err == (SAID.decode() if number == signal.SIGINT else "")
    with Stop() as stop:
        assert not stop.asked and not Stop.by_key


def test_the_first_process_says_it(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
    assert capfd.readouterr().err == ""


def test_what_is_ignored_stays_so():
    """nohup; a job that a script started with &."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_another_thread_catches_nothing():
    made = []
    thread = threading.Thread(target=lambda: made.append(Stop()))
    thread.start(), thread.join()
    assert made[0].before == {}


def test_ctrl_c_saves_and_the_run_goes_on(towers, tmp_path, monkeypatch, capfd):
    """In the middle of a step."""
    command = ["--stage", "1", "--vision", str(towers / "clip"), "--llm", str(towers / "llama"),
               "--out", str(tmp_path), "--steps", "4", "--batch", "2", "--workers", "0"]
    step, taken = train.train_step, []

    def struck(*given, **more):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*given, **more)

    monkeypatch.setattr(train, "train_step", struck)
    with pytest.raises(SystemExit) as end:
        train.main(command)
    out, err = capfd.readouterr()
    assert end.value.code == 130 and len(taken) == 2 and SAID.decode() in err
    assert "stopped early, after a checkpoint" in out and any((tmp_path / "checkpoints").iterdir())
    train.main(command)
    assert len(taken) == 4 and "model written to" in capfd.readouterr().out
    with open(tmp_path / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
