"""An hour of trouble: does a training, or an evaluation, come to the end of an undisturbed one?

    python -m tests.attack.soak --minutes 60                     a training: a third of the time
                                                                 alone, in DDP, in FSDP
    python -m tests.attack.soak --minutes 30 --what evaluation   POPE's kind of questions, in one
                                                                 process and in two

A program is started again and again. Each life ends by a trouble at a random moment: SIGKILL to all
of its processes or to one (readers of pictures, too), Ctrl-C, SIGTERM, a pause, or a disk that is
full, read-only or gives errors, once or from then on, below --out (tests/attack/faults.py). When
the time is over, the program may finish, and so does a twin that nobody disturbed: their files have
to be the same bytes. Of every life memory, open files and /dev/shm are watched. (Pictures can
always be read: nothing is learnt from one that can't, so damaged.jsonl and the model would differ.)
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.big import family
from core.common import ROOT
from tests.attack.faults import differences, traces
from tests.training.test_kill import kill
from toy.world import MODEL

EXAMPLE = ROOT / "assets/example"
LIFE = (6, 200)              # seconds, from, to
PATIENCE = 120               # seconds until a program that should end counts as hanging
WARM = 60                    # seconds that a life may take to start, on a busy machine
EVENTS = 1500                # the last event of a life at which a disk may fail
DISKS = ("ENOSPC", "+ENOSPC", "EIO", "+EIO", "+EROFS", "EACCES")
TROUBLES = ("kill all", "kill one", "SIGINT", "SIGTERM", "pause", "disk", "disk")
WELL = {0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM}
SHM = Path("/dev/shm")


@dataclass
class Watched:
    """What a life took: (seconds, bytes of memory, open files) at several moments."""
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def look(self, began: float, pid: int) -> None:
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            pids = family(pid)
            self.samples.append((time.monotonic() - began, sum(map(resident, pids)),
                                 sum(len(os.listdir(f"/proc/{p}/fd")) for p in pids)))

    def growth(self) -> tuple[float, float] | None:
        """Memory and open files in the last third of a life against those in its first third after
        WARM seconds; None of a short one."""
        warm = [sample for sample in self.samples if sample[0] > WARM]
        if not warm or warm[-1][0] < 2 * WARM:
            return None
        n = len(warm) // 3
        early, late = warm[:n], warm[-n:]
        return tuple(statistics.median(s[i] for s in late) / statistics.median(s[i] for s in early)
                     for i in (1, 2))


def resident(pid: int) -> int:
    """Bytes of a process that are in memory, shared ones included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shared_memory() -> list[str]:
    """What lies in /dev/shm of torch's readers that are gone, and of semaphores."""
    found = []
    for name in (p.name for p in SHM.glob("*")):
        owner = re.match(r"torch_(\d+)_", name)
        if owner and not Path(f"/proc/{owner[1]}").exists() or name.startswith(("sem.", "psm_")):
            found.append(name)
    return sorted(found)


# --------------------------------------------------------------------------------------------------
# A life and its end

def start(program: list[str], size: int, out: Path, said: Path, fault: str | None
          ) -> subprocess.Popen:
    """program: a file of the root and its flags; size: processes; fault: "7:EIO", or None."""
    launch = [sys.executable]
    if size > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={size}", "--standalone"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if fault:
        launch += ["-m", "tests.attack.faults"]
        environment["FAULT"] = f"{out}:{fault}"
    with open(said, "w") as file:
        return subprocess.Popen([*launch, *program], cwd=ROOT, stdout=file, stderr=file,
                                stdin=subprocess.DEVNULL, env=environment, start_new_session=True)


def disturb(process: subprocess.Popen, trouble: str, rng: random.Random) -> None:
    """Do to a running program what the trouble's name says."""
    with suppress(FileNotFoundError, ProcessLookupError):
        pids = family(process.pid)
        if trouble == "kill all":
            kill(pids)
        elif trouble == "kill one":
            os.kill(rng.choice(pids[1:] or pids), signal.SIGKILL)
        elif trouble == "SIGINT":
            for pid in pids:                              # as a terminal does
                os.kill(pid, signal.SIGINT)
        elif trouble == "pause":
            for how in (signal.SIGSTOP, signal.SIGCONT):
                for pid in pids:
                    os.kill(pid, how)
                time.sleep(3)
        if trouble not in ("kill all", "kill one", "SIGINT"):
            process.terminate()


def live(program: list[str], size: int, out: Path, said: Path, rng: random.Random,
         seconds: float) -> tuple[str, int | None, Watched]:
    """One life of at most so many seconds: (its trouble, exit status or None for one that didn't
    end, what it took)."""
    trouble = rng.choice(TROUBLES)
    fault = None
    if trouble == "disk":
        fault = f"{int(math.exp(rng.uniform(0, math.log(EVENTS))))}:{rng.choice(DISKS)}"
        trouble = f"disk {fault.split(':')[1]}"
    length = min(seconds, math.exp(rng.uniform(*map(math.log, LIFE))))
    process, began, watched = start(program, size, out, said, fault), time.monotonic(), Watched()
    while process.poll() is None and time.monotonic() - began < length:
        watched.look(began, process.pid)
        time.sleep(1)
    if process.poll() is not None and not fault:
        trouble = "none"
    elif process.poll() is None:
        disturb(process, trouble, rng)
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        kill(family(process.pid))
        process.wait()
        status = None
    return trouble, status, watched


def complaints(status: int | None, size: int, said: str) -> list[str]:
    """What a life may not do: hang, end in a traceback or another status. Of several processes the
    status is torchrun's, and so are tracebacks without a file of ours."""
    found = ["it didn't end"] if status is None else []
    if size == 1 and status not in WELL | {None}:
        found.append(f"status {status}")
    said = re.sub(r"(?m)^\[rank\d+\]: ", "", said)
    for trace in re.findall(r"Traceback \(most recent call last\):\n(?: .*\n|\n)*.*", said):
        if size == 1 or str(ROOT) in trace:
            found.append(f"traceback: {trace.splitlines()[-1][:200]}")
    return found


@dataclass
class Tally:
    """What happened in a soak."""
    lives: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    growths: list[tuple[float, float]] = field(default_factory=list)
    most: list[int] = field(default_factory=lambda: [0, 0])           # bytes, open files

    def add(self, name: str, trouble: str, problems: list[str], watched: Watched) -> None:
        self.lives[trouble] += 1
        self.growths += [g] if (g := watched.growth()) else []
        for _, *values in watched.samples:
            self.most = list(map(max, self.most, values))
        for problem in problems:
            self.fault(f"{name}, {trouble}: {problem}")

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT {text}", flush=True)

    def report(self) -> None:
        print(f"{self.lives.total()} lives: " +
              ", ".join(f"{n} x {trouble}" for trouble, n in self.lives.most_common()))
        print(f"at most {self.most[0] / 2**30:.2f} GiB and {self.most[1]} open files at once")
        if self.growths:
            memory, files = (max(values) for values in zip(*self.growths))
            print(f"within {len(self.growths)} lives of more than {2 * WARM} s, after the first "
                  f"{WARM}: memory x {memory:.3f} at most, open files x {files:.3f}")
        print(f"{len(self.faults)} ended badly")


def soak(name: str, program: list[str], sizes: list[int], out: Path, minutes: float,
         rng: random.Random, tally: Tally) -> None:
    """Start the program again and again for so long, or until it has come to its end."""
    said, ends = out.with_suffix(".said"), time.monotonic() + 60 * minutes
    while (left := ends - time.monotonic()) > 0:
        size, before = rng.choice(sizes), shared_memory()
        trouble, status, watched = live(program, size, out, said, rng, left)
        text = said.read_text(errors="replace")
        problems = complaints(status, size, text)
        if stays := set(shared_memory()) - set(before):
            problems.append(f"left in /dev/shm: {sorted(stays)}")
        if problems:
            shutil.copy(said, out.with_suffix(f".{tally.lives.total()}.failed"))
        tally.add(name, trouble, problems, watched)
        print(f"{name}: {trouble}, status {status}", flush=True)
        if trouble == "none" and status == 0:
            break


def finish(name: str, program: list[str], size: int, out: Path, tally: Tally) -> bool:
    """Let it come to its end undisturbed."""
    said = out.with_suffix(".said")
    process, began, watched = start(program, size, out, said, None), time.monotonic(), Watched()
    while process.poll() is None:
        watched.look(began, process.pid)
        time.sleep(1)
    tally.add(name, "none", [], watched)
    if process.returncode:
        tally.fault(f"{name}: doesn't go on: {said.read_text(errors='replace')[-500:]}")
    return process.returncode == 0


# --------------------------------------------------------------------------------------------------
# What is soaked

def training(place: Path, minutes: float, rng: random.Random, tally: Tally,
             ways: list[str]) -> None:
    """Stage 2 of the bundled model on the example's records; a checkpoint every five steps. ways:
    of --parallel, which share the time."""
    common = ["train.py", "--stage", "2", "--model", str(MODEL), "--batch", "8", "--micro", "4",
              "--json", str(EXAMPLE / "stage2.json"), "--images", str(EXAMPLE), "--steps", "20000",
              "--save-every", "5", "--workers", "1", "--threads", "1", "--device", "cpu"]
    for how in ways:
        size = 1 if how == "none" else 2
        name, out, twin = f"training {how}", place / how, place / f"{how}-twin"
        program = [*common, "--parallel", how]
        soak(name, [*program, "--out", str(out)], [size], out, minutes / len(ways), rng,
             tally)
        steps = [int(p.name[5:]) for p in out.glob("checkpoints/step-????????")]
        last = ["--stop-after", str(max(steps, default=0) + 5)]
        print(f"{name}: {last[1]} steps", flush=True)
        if all(finish(name, [*program, *last, "--out", str(o)], size, o, tally)
               for o in (out, twin)):
            if wrong := differences(out, traces(twin)):
                tally.fault(f"{name}: differs from its twin: {wrong[:5]}")


def pope(folder: Path) -> Path:
    """A benchmark in POPE's files, of the example's pictures."""
    (folder / "pope/coco").mkdir(parents=True)
    (folder / "pope/val2014").mkdir()
    pictures = sorted(EXAMPLE.glob("*.png"))
    for picture in pictures:
        shutil.copy(picture, folder / "pope/val2014")
    things = ("crab", "saw", "key", "square", "tool", "vehicle", "circle")
    for category in ("adversarial", "popular", "random"):
        rows = [json.dumps(dict(question_id=i + 1, image=pictures[i % len(pictures)].name,
                                text=f"Is there a {things[i % len(things)]} in the image?",
                                label="yes" if i % 2 else "no")) for i in range(800)]
        (folder / f"pope/coco/coco_pope_{category}.json").write_text("\n".join(rows) + "\n")
    return folder


def answers(out: Path) -> dict[str, bytes]:
    """What two evaluations with the same end have in common: everything but the seconds."""
    found = {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != ".lock"}
    results = json.loads(found["results.json"])
    results.pop("seconds", None)
    return found | {"results.json": json.dumps(results).encode()}


def evaluation(place: Path, minutes: float, rng: random.Random, tally: Tally) -> None:
    """2,400 questions; one process or two answer them, as it comes."""
    program = ["eval.py", "--task", "pope", "--data", str(pope(place / "data")), "--batch", "16",
               "--threads", "1", "--device", "cpu", "--out"]
    twin = place / "twin"
    if not finish("evaluation", [*program, str(twin)], 1, twin, tally):
        return
    ends, round = time.monotonic() + 60 * minutes, 0
    while (left := (ends - time.monotonic()) / 60) > 0:
        name, out, round = f"evaluation {round}", place / f"eval-{round}", round + 1
        soak(name, [*program, str(out)], [1, 2], out, left, rng, tally)
        if finish(name, [*program, str(out)], 1, out, tally) and answers(out) != answers(twin):
            tally.fault(f"{name}: differs from its twin")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60.0, help="of trouble; the twins come besides")
    p.add_argument("--what", choices=("training", "evaluation"), default="training")
    p.add_argument("--parallel", nargs="+", choices=("none", "ddp", "fsdp"), metavar="HOW",
                   default=["none", "ddp", "fsdp"], help="of a training (default: all three)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--place", type=Path, help="a folder for all of it, kept")
    args = p.parse_args()
    place = (args.place or Path(tempfile.mkdtemp())).absolute()
    place.mkdir(parents=True, exist_ok=True)
    tally, before = Tally(), shared_memory()
    # in the background a shell has it ignored, and what is started here would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(args.seed)
    if args.what == "training":
        training(place, args.minutes, rng, tally, args.parallel)
    else:
        evaluation(place, args.minutes, rng, tally)
    if shared_memory() != before:
        tally.fault(f"/dev/shm: {before} before, {shared_memory()} now")
    tally.report()
    if args.place is None:
        shutil.rmtree(place)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
