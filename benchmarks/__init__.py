"""The ten benchmarks of the paper's Table 1, a file each: where its files lie, what it asks and in
which words, how it is scored.

A benchmark lies where LLaVA's evaluation has it (playground/data/eval there, --data here), as its
authors publish it. Its questions are put in the words of LLaVA-1.5's prompts, by the rules behind
LLaVA's own question files. A model's answer is a text; what counts as right differs from benchmark
to benchmark, and moves scores by points: one takes "B." for a B and another doesn't, one drops
articles, one guesses when it can't read the answer. So each `score` does exactly what the scorer
behind LLaVA-1.5's published numbers does, its quirks included, and says what that is. What other
people's harnesses make of the same answers stands beside it (others.py).

A benchmark's file holds

    FOLDER, ANNOTATIONS, PICTURES, SOURCE   under --data, in FOLDER, and where both come from
    TEMPLATE, MAX_NEW_TOKENS                the user's words behind the picture; an answer's length
    questions(path, folder)                 what it asks, in the annotations' order
    score(path, answers, limited)           the published number (None: judged elsewhere) and a dict
                                            of all numbers; in percent, but MME's
    SUBMISSION, submit(path, answers, to)   of three: write what is judged elsewhere; what to do

path: the annotations. limited: only a part of the questions was asked, so that the others don't
count. To add a benchmark, write its file and name it below. Nothing here needs torch but
reply.py and table2.py.
"""
from benchmarks import (
    exam,
    gqa,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
)

TASKS = dict(gqa=gqa, scienceqa=scienceqa, textvqa=textvqa, vizwiz=vizwiz, mmbench=mmbench,
             mmvet=mmvet, seed=seed, mmmu=mmmu, mme=mme, pope=pope)
ASKED = {**TASKS, exam.NAME: exam}      # and what is one's own, which has no published score
