"""The tables say what the rows say, and docs/study.md and README.md say what the tables do."""
import random
import re
import shutil

import pytest
import torch

from core.common import ROOT, UserError
from study import __main__ as program
from study import findings, protocol, results, tables


def test_the_tables(tmp_path, capsys):
    rng = random.Random(0)
    file = tmp_path / "results.csv"
    for name, chance in (("ccra", 0.9), ("llava", 0.3)):
        for seed in (0, 1, 2, *protocol.PILOT_SEEDS):
            right = "".join(str(int(rng.random() < chance)) for _ in range(200))
            row = dict(row=name, seed=seed, steps="2+2", questions=200, accuracy=0, train_s=1,
                       exam_s=1, commit="", right=f"{int('1' + right, 2):x}")
            results.add(file, row)
    program.main(["table", "--results", str(file)])
    out = capsys.readouterr().out
    assert "| ccra | 3 | " in out and "| llava | 3 | **-" in out
    assert "pilot, 3 seeds, all: llava - ccra = -" in out
    assert "| llava | -2.3 | -5.0 | -2.0 | -3.2 | -" in out      # the paper's, beside this one's
    assert (tmp_path / "differences-from-ccra.png").stat().st_size > 1000
    assert "neutral" not in out
    for off, right, same in (("", "1110", 1), ("lwca", "0110", 0.5)):
        row = dict(row="ccra", seed=0, off=off, same=same, negative_W_lp=0, negative_w_p=0.25,
                   accuracy=0, commit="", right=f"{int('1' + right, 2):x}")
        results.add(tmp_path / "off.csv", row, ("row", "seed", "off"))
    program.main(["table", "--results", str(file)])
    out = capsys.readouterr().out
    assert "| ccra | lwca | 1 | 50.0% | -25.0 ± 317" in out and "| 0.0% | 25.0% |" in out
    with pytest.raises(UserError, match="no row 'dci'"):
        program.main(["table", "--results", str(file), "--base", "dci"])


def test_the_claims(capsys):
    """On answers made so that the truth is known: what is below is told, on either side, and what
    isn't, isn't."""
    rng, Q = random.Random(0), 1000
    places = findings.by_kind(Q)

    def draw(chance, kind=range(Q)):              # 0.5 of other kinds
        chances = [chance if i in kind else 0.5 for i in range(Q)]
        return torch.tensor([100.0 * (rng.random() < c) for c in chances])

    chances = {"ccra": 0.8, "llava": 0.6, "wide": 0.95, "sti": 0.8, "kernel 3": 0.6}
    rows = {name: {seed: draw(chance) for seed in range(4)} for name, chance in chances.items()}
    rows["without pwca"] = {seed: draw(0.2, set(places["word"])) for seed in range(4)}
    tables.show_claims(rows)
    said = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 5:
            said[tuple(cells[2:5])] = cells[-2]
    assert said["llava", "ccra", "all"] == "holds" and said["wide", "ccra", "all"] == "reversed"
    assert said["sti", "ccra", "all"] == "can't be told"
    assert said["kernel 3", "ccra", "all"] == "reversed"
    assert said["without pwca", "ccra", "word"] == "holds" and ("dci", "ccra", "all") not in said
    study_rows = {*protocol.ROWS, *protocol.SWEEPS}
    for parts in protocol.CLAIMS.values():
        assert all({row, base} <= study_rows and kind in places for row, base, kind, _ in parts)


# --------------------------------------------------------------------------------------------------
# The pages

def test_the_papers_figures_are_those_of_docs_study():
    """Its table of the paper's differences, and what `table` sets beside ours, are the same
    numbers."""
    lines = (ROOT / "docs" / "study.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    table = {row[0]: row[1:] for row in cells if len(row) == 10}
    columns = table[""]
    names = {"llava": "LLaVA-1.5-7B", "dci": "DenseConnector", "mmfuser": "MMFuser (on Vicuna-13B)",
             "igva": "IGVA", "without smooth": "without smoothing", "without pwca": "without PWCA",
             "without lwca": "without LWCA", "without lpwca": "without LPWCA",
             "decoupled": "decoupled", "shuffled": "shuffled"}
    assert tables.PAPER.keys() - names.keys() == {"sti", "sci"}
    for name, title in names.items():
        said = {column: -float(value) for column, value in zip(columns, table[title]) if value}
        assert said == pytest.approx(tables.reported(name), abs=1e-9), name


def test_the_tables_of_docs_study_are_those_of_its_rows(tmp_path):
    for file in ("study/results.csv", "study/off.csv", "docs/study.md"):
        shutil.copy(ROOT / file, tmp_path)
    page = tmp_path / "study.md"
    text = page.read_text()
    page.write_text(text.replace("%", "").replace(" ± 1.", " ± 2."))
    table = ["table", "--results", str(tmp_path / "results.csv"), "--into", str(page)]
    program.main(table)

    def tables_of(text):
        return tables.TABLE.findall(text.split("\n## Results\n")[1])

    assert tables_of(page.read_text()) == tables_of(text)
    page.write_text(text + "\n| one | more |\n")
    with pytest.raises(UserError, match="has 6 tables .* but 5 are printed"):
        program.main(table)


def test_differences_in_words_are_those_of_the_tables(tmp_path, capsys):
    """`+1.2 ± 3.4` in the words of docs/study.md and README is a cell of what `table` prints from
    the committed rows."""
    for file in ("results.csv", "off.csv"):
        shutil.copy(ROOT / "study" / file, tmp_path)
    tables.show_tables(tmp_path / "results.csv", "ccra")
    quoted = re.compile(r"[+-]\d+\.\d ± \d+\.\d")
    printed = set(quoted.findall(capsys.readouterr().out))
    for file in ("docs/study.md", "README.md"):
        assert set(quoted.findall((ROOT / file).read_text())) <= printed, file
