"""Ways to come to a CCRA, in the toy world: from stage 1, or put into a LLaVA that is trained.

    python -m study.starts                      all rows, one after the other; goes on where it was
    python -m study.starts --rows ccra kept     some of them
    python -m study.starts --table              what there is, as docs/your_data.md shows it

Every row ends with as many steps of stage 2. Those that begin with a LLaVA have its stage 2 behind
them, so "longer" is that LLaVA with as many steps more: what is gained beside it is CCRA's.
"""
import csv
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from core import flags
from core.common import ROOT, UserError, run, write_text

FILE = ROOT / "study" / "starts.csv"
COLUMNS = ("row", "seed", "steps", "accuracy", "minutes", "trained", "saved_mb")
TOWERS = ("--vision", str(ROOT / "study/towers/clip"), "--llm", str(ROOT / "study/towers/llama"))


@dataclass
class Row:
    """A training: what it begins with, its flags, and what it is called in the table."""
    begins: str
    more: tuple[str, ...]
    title: str


ROWS = {
    "llava": Row("llava-1", (), "plain LLaVA"),
    "longer": Row("llava", (), "plain LLaVA, trained on"),
    "ccra": Row("ccra-1", (), "CCRA from stage 1"),
    "kept": Row("ccra-1", ("--start", "kept"), "CCRA from stage 1, started kept"),
    "full": Row("llava", ("--fuser", "ccra"), "CCRA in that LLaVA: all but the tower trained"),
    "lora": Row("llava", ("--fuser", "ccra", "--lora", "16"), "... LoRA 16, fuser, projector"),
    "thin": Row("llava", ("--fuser", "ccra", "--train", "fuser", "projector"),
                "... fuser and projector alone")}


def call(program: str, *words: str) -> str:
    """Run a program of the root; what it prints. UserError if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / program), *words], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{program} ended with status {done.returncode}; see above")
    return done.stdout


def common(args, out: Path) -> list[str]:
    return ["--world", "toy", "--threads", str(args.threads), "--device", "cpu", "--dtype",
            "float32", "--out", str(out)]


def train(name: str, args) -> Path:
    """The folder of a row, or of a stage 1 ("ccra-1"), trained if it isn't yet."""
    out = args.out / f"{name}-{args.seed}"
    seed = ["--seed", str(args.seed)]
    if name.endswith("-1"):
        call("train.py", "--stage", "1", *TOWERS, "--fuser", name[:-2], *seed, *common(args, out))
        return out
    row = ROWS[name]
    begins = train(row.begins, args)
    if row.begins == "llava":
        seed = ["--seed", str(args.seed + 1000)]                # another order than it has learnt
    call("train.py", "--stage", "2", "--model", str(begins), "--steps", str(args.steps), *row.more,
         *seed, *common(args, out))
    return out


def measure(name: str, args) -> dict:
    """A row of the table, trained and examined."""
    out = train(name, args)
    asked = ["--model", str(out)]
    if (out / "nanoccra.json").exists():
        asked = ["--model", str(args.out / f"llava-{args.seed}"), "--adapter", str(out)]
    result = json.loads(call("eval.py", "--task", "toy", *asked, "--n", str(args.questions),
                             "--threads", str(args.threads), "--device", "cpu", "--json"))
    with open(out / "log.csv") as file:
        seconds = sum(32 / float(row["samples_per_s"]) for row in csv.DictReader(file))
    state = json.loads(max(out.glob("checkpoints/step-*/state.json")).read_text())
    saved = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    return dict(row=name, seed=args.seed, steps=args.steps, accuracy=f"{result['accuracy']:.4f}",
                minutes=f"{seconds / 60:.1f}", saved_mb=f"{saved / 1e6:.1f}",
                trained=sum(math.prod(shape) for shape in state["shapes"].values()))


def known() -> list[dict]:
    """The rows of starts.csv."""
    if not FILE.exists():
        return []
    with open(FILE, newline="") as file:
        return list(csv.DictReader(file))


def add(row: dict) -> None:
    """Put a row into starts.csv, in the place of an older one."""
    others = [r for r in known() if (r["row"], int(r["seed"])) != (row["row"], row["seed"])]
    lines = [",".join(str(r[key]) for key in COLUMNS) for r in (*others, row)]
    write_text(FILE, "\n".join([",".join(COLUMNS), *lines, ""]))


def table(rows: list[dict]) -> str:
    """Markdown, in the order of ROWS."""
    lines = ["| model | accuracy | minutes | parameters trained | saved, MB |",
             "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        for r in (r for r in rows if r["row"] == name):
            lines.append(f"| {row.title} | {100 * float(r['accuracy']):.1f}% | {r['minutes']} | "
                         f"{int(r['trained']):,} | {r['saved_mb']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = flags.Parser(description=__doc__)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--table", action="store_true", help="print what there is, and end")
    p.add_argument("--steps", type=flags.whole(1, flags.MANY), default=1500, help="of stage 2")
    p.add_argument("--questions", type=flags.whole(1, flags.MANY), default=4000)
    p.add_argument("--seed", type=flags.seed, default=0)
    p.add_argument("--threads", type=flags.threads, default=1)
    p.add_argument("--out", type=Path, default=Path("out/starts"))
    args = p.parse_args(argv)
    if not args.table:
        for name in args.rows:
            add(measure(name, args))
    print(table(known()))


if __name__ == "__main__":
    run(main, "what was trained stays in --out, and the same command goes on from there")
