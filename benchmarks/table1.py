"""Table 1: what the paper reports, and what eval.py measured, side by side."""
from pathlib import Path

from benchmarks.kept import read_results
from core.flags import shown

COLUMNS = dict(gqa="GQA", scienceqa="SQA", textvqa="TextVQA", vizwiz="VizWiz", mmbench="MMB-en",
               mmvet="MM-Vet", seed="SEED-I", mmmu="MMMU", mme="MME-p", pope="POPE")
REPORTED = {            # as printed in the paper; letters: see NOTES
    "LLaVA-v1.5-7B (a)": "61.9 67.1 58.1 53.2 63.9 32.8 67.2 34.9 1480.6 86.9",
    "LLaVA-v1.5-13B": "63.3 71.0 61.3 53.6 67.7 36.1 68.2 34.9 - 87.2",
    "MiniGPT-v2": "60.1 - - 53.6 9.4 - - - - -",
    "IDEFICS": "38.4 - 25.9 35.5 48.2 - - - - -",
    "LLaMA-Adapter-v2 (b)": "- - - 41.0 31.5 32.7 29.8 972.7 - -",
    "mPLUG-Owl2": "56.1 68.7 54.3 54.5 64.5 36.2 57.8 - 1450.2 86.2",
    "Qwen-VL-Chat": "57.5 68.2 61.5 38.9 60.6 - 65.4 35.9 1487.6 -",
    "Flamingo": "- - 37.9 49.8 - - - - - -",
    "DenseConnector": "63.8 69.5 59.2 - 66.8 32.7 - 34.8 - 86.6",
    "MMFuser": "62.8 68.7 58.8 53.4 67.5 32.6 60.8 - 1479.7 86.3",
    "IGVA": "63.1 70.2 59.4 54.3 66.9 33.5 68.3 36.4 1519.8 87.8",
    "CCRA (c)": "64.2 71.3 63.1 54.6 67.9 37.5 69.6 37.6 1525.6 88.9"}
NOTES = """\
Reported: as printed in the paper's Table 1, none of it measured here.
Measured: by eval.py, and half its 95% interval.
(a) not LLaVA's own figures: those are 50.0 on VizWiz and 1510.7 on MME, among others
(b) shifted one column to the left: 41.0 is MMB-en's, 972.7 MME-p's
(c) 63.1 on TextVQA, while all of its ablations (Tables 3 and 4) have 58.2 to 59.3
SQA is ScienceQA's questions with pictures, SEED-I SEED-Bench's.
VizWiz is the test split in the paper, whose answers are hidden; measured figures are of val."""


def figure(entry: dict | None) -> str:
    """One task of a results.json, as "score ± half the interval"."""
    if entry is None or entry["score"] is None:
        return "-"
    digits = 1 if entry["score"] > 200 else 2
    off = entry["interval"][1] - entry["score"]
    return f"{entry['score']:.{digits}f} ±{off:.{digits}f}"


def show(files: list[Path]) -> None:
    """Print the table. UserError for a file that isn't one of eval.py's results."""
    results = [read_results(file) for file in files]
    print(f"{'reported':32}" + "".join(f"{name:>14}" for name in COLUMNS.values()))
    for name, row in REPORTED.items():
        print(f"{name:32}" + "".join(f"{value:>14}" for value in row.split()))
    print("\nmeasured")
    for content in results:
        name = shown(f"{Path(content['model']).name} {content['weights'][7:15]}")
        name += f" (first {content['limit']})" if content["limit"] else ""
        figures = [figure(content["tasks"].get(task)) for task in COLUMNS]
        print(f"{name:32}" + "".join(f"{value:>14}" for value in figures))
    print("\n" + NOTES)
