"""How the ten benchmarks are scored: the official annotations and a model's answers in, the
published numbers out.

    python eval.py --score pope --annotations coco --predictions answers.jsonl

A model's answer is a text; what counts as right differs from benchmark to benchmark, and moves
scores by points: one takes "B." for a B and another doesn't, one drops articles, one guesses when
it can't read the answer. So each scorer here does exactly what the one behind LLaVA-1.5's published
numbers does, its quirks included, and says what that is. Where other people's numbers come from
another rule (lmms-eval, VLMEvalKit), that rule's score stands beside it.

An answers file has one JSON object a line: "question_id" and "text", and "prompt" where the
official scorer joins by it. Every scorer but MM-Vet's takes (annotations: Path, answers:
list[Answer], limited: whether only a part of the questions was asked, so that the others don't
count) and gives (the published number, dict of all numbers, and its 95% `margin`); all are in
percent but MME's. What the official scorer tolerates is a warning with a count, all else a
UserError.
"""
import math
import random
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.answers import (
    Answer,
    absent,
    are_texts,
    expect,
    expect_rows,
    join,
    mmbench_rows,
    mme_task,
    mmmu_rows,
    read_json,
    read_lines,
    warn,
)
from core.common import UserError


def percent(right) -> float:
    """Of truth values or scores in 0..1; multiplied last, as the official scorers do."""
    right = list(right)
    return sum(right) / len(right) * 100 if right else 0.0


def margin(*parts: list) -> float:
    """Half the width of the 95% interval of a percentage, or of a sum of some: 1.96 standard
    errors.

    parts: of each mean in the sum, its values in 0..1, one for everything that was drawn
    independently: a question, in MME a picture with its two, in MMBench a question with its
    rotations. (Questions about one picture are not quite independent, and of a few dozen nothing
    should be concluded.)
    """
    def variance(values):
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)

    return 1.96 * 100 * math.sqrt(sum(variance(values) / len(values) for values in parts))


def by(groups, right) -> dict[str, float]:
    """Percent right of each group, in the order of the names."""
    parts = defaultdict(list)
    for group, ok in zip(groups, right, strict=True):
        parts[group].append(ok)
    return {group: percent(parts[group]) for group in sorted(parts)}


# --------------------------------------------------------------------------------------------------
# Short answers, as the VQA challenges compare them

NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6",
               seven="7", eight="8", nine="9", ten="10")
ARTICLES = ("a", "an", "the")
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
PERIOD = re.compile(r"\.(?!\d)")  # meant to spare "3.5" only, but a look-behind was mistyped
PERIOD_VLMEVALKIT = re.compile(r"(?<!\d)\.(?!\d)")  # as it was meant


def contractions() -> dict[str, str]:
    """What a contraction without (all of) its apostrophes becomes. From the VQA evaluation, with
    its gaps and slips."""
    regular = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
        how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
        should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
        there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
        what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
        y'all you'd you'll you're you've"""
    table = {word.replace("'", ""): word for word in regular.split()}
    for who in "he I it she somebody someone something there they we who you".split():
        table[f"{who}d've"] = table[f"{who}'dve"] = f"{who}'d've"
    for verb in "could had might should would".split():
        table[f"{verb}nt've"] = table[f"{verb}n'tve"] = f"{verb}n't've"
    table |= dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at")
    table |= dict.fromkeys(["yall'll", "y'allll"], "y'all'll")
    table |= dict.fromkeys(["yall'd've", "y'alld've", "y'all'dve"], "y'all'd've")
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def curly(table: dict[str, str]) -> dict[str, str]:
    """The same table as VizWiz's evaluation has it: with ’ for ' in all keys but two and all values
    but eight."""
    straight = {
        "couldn'tve", "hadn'tve", "aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres",
        "whove"}
    return {
        key if key in straight else key.replace("'", "’"):
            value if key in straight and "'" not in key else value.replace("'", "’")
        for key, value in table.items()}


CONTRACTIONS = contractions()
CONTRACTIONS_VIZWIZ = curly(CONTRACTIONS)


def strip_punctuation(text: str, period: re.Pattern = PERIOD) -> str:
    """A mark goes where it stands beside a space anywhere in the text, else it becomes a space.

    A comma between two digits anywhere makes all marks go. At most 32 periods do: a flag
    (re.UNICODE, 32) is passed where the count belongs, by all three scorers that do this.
    """
    out, thousands = text, re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        out = out.replace(mark,
                          "" if thousands or mark + " " in text or " " + mark in text else " ")
    return period.sub("", out, count=32)


def words(text: str, table: dict[str, str]) -> str:
    """Lower case, number words to digits, articles dropped, then contractions mended."""
    kept = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(table.get(word, word) for word in kept if word not in ARTICLES)


def evalai(text: str) -> str:
    """TextVQA's normal form, of both sides; also that of uploads to VizWiz, and of both sides in
    lmms-eval's VizWiz.

    "The 1,000 dogs!" -> "1000 dogs", "None" -> "0", "levi's" -> "levi 's", "dont" -> "don't", and
    "A" -> "".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()),
                 CONTRACTIONS)


def vqa(text: str, table: dict[str, str], period: re.Pattern = PERIOD) -> str:
    """The older normal form, without evalai's first line: VizWiz's (of the uploaded side alone),
    VLMEvalKit's."""
    return words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), period),
                 table)


def vqa_accuracy(answer: str, humans: list[str]) -> float:
    """The mean over ten humans of min(1, how many of the *other nine* said this / 3).

    So 1, 2, 3, 4 humans give 0.3, 0.6, 0.9, 1, and not the 1/3, 2/3, 1, 1 of the formula that is
    usually quoted.
    """
    same = [human == answer for human in humans]
    return sum(min(1, (sum(same) - own) / 3) for own in same) / len(same)


def textvqa(path: Path, answers: list[Answer], limited: bool = False):
    """TextVQA_0.5.1_val.json: {"data": [{"image_id", "question", "answers" of ten humans, ...}]}.

    Both sides are normalised by `evalai`; the score is `vqa_accuracy`, averaged over the answers
    given. The ids are those of pictures, which have several questions: the prompt tells which, and
    may have a line of OCR tokens between question and instruction. Without that line, as in other
    harnesses, LLaVA-1.5-7B is reported at 46 instead of 58.2.
    """
    what = "TextVQA's annotations (TextVQA_0.5.1_val.json)"
    data = read_json(path, dict, what).get("data")
    expect(isinstance(data, list) and data, path, what)
    expect_rows(data, path, what, image_id=(str, int), question=str, answers=list)
    expect(all(len(row["answers"]) == 10 and are_texts(row["answers"]) for row in data), path,
           "a split with ten human answers a question")
    rows = {(str(row["image_id"]), row["question"].lower()): row for row in data}
    known = Counter((str(row["image_id"]), row["question"].lower()) for row in data)
    joined = join(answers, known, lambda answer: (answer.id, textvqa_question(answer)),
                  strangers=False)
    absent(known, joined, "left out of the mean", limited)
    ours = [
        vqa_accuracy(evalai(a.text), [evalai(h) for h in rows[key]["answers"]])
        for key, a in joined.items()]
    kit = [vqa_accuracy(vqa(a.text, CONTRACTIONS, PERIOD_VLMEVALKIT),
                        [vqa(h, CONTRACTIONS, PERIOD_VLMEVALKIT) for h in rows[key]["answers"]])
           for key, a in joined.items()]
    return percent(ours), dict(accuracy=percent(ours), margin=margin(ours), vlmevalkit=percent(kit),
                               n=len(joined))


def textvqa_question(answer: Answer) -> str:
    """The question in LLaVA's prompts: three lines with the OCR tokens, two without, or the older
    single line."""
    prompt, lines = answer.asked(), answer.asked().split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserError(
        f"{answer.at}: can't find the question in the prompt (question, OCR line if any, instruction)"
    )


def vizwiz(path: Path, answers: list[Answer], limited: bool = False):
    """val.json: [{"image", "question", "answers": [{"answer"} of ten], "answer_type"}]; an id is a
    place in the list.

    LLaVA uploads `evalai` of the answers. The official scorer normalises the upload once more, by
    `vqa` with its own table, and the humans' answers not at all: "joe's", uploaded as "joe 's",
    misses "joe's", and "2" misses "two". lmms-eval normalises both sides by `evalai`, and this is
    the number most papers give for val. LLaVA's own is of test, whose answers are hidden: it is
    uploaded.
    """
    rows, texts = zip(*vizwiz_upload(path, answers, limited))
    if not any("answers" in row for row in rows):
        return None, {}
    what = "VizWiz's val.json"
    expect_rows(rows, path, what, answers=list, answer_type=str)
    expect(all(row["answers"] for row in rows), path, f"{what}: a question without answers")
    expect_rows((human for row in rows for human in row["answers"]), path, what, answer=str)
    humans = [[human["answer"] for human in row["answers"]] for row in rows]
    right = [
        vqa_accuracy(vqa(text, CONTRACTIONS_VIZWIZ), said) for text, said in zip(texts, humans)]
    lmms = [vqa_accuracy(text, [evalai(h) for h in said]) for text, said in zip(texts, humans)]
    types = defaultdict(list)
    for row, score in zip(rows, right):
        types[row["answer_type"]].append(score)
    official = round(100 * sum(right) / len(right), 2)        # the official scorer rounds, so we do
    return official, dict(
        vizwiz_official=official, vizwiz_lmms=percent(lmms), margin=margin(right), n=len(rows),
        answer_type={
            kind: round(100 * sum(scores) / len(scores), 2)
            for kind, scores in sorted(types.items())})


def vizwiz_upload(path: Path, answers: list[Answer],
                  limited: bool = False) -> list[tuple[dict, str]]:
    """(record, normalised answer) of each record. The official server wants them all."""
    what = "VizWiz's annotations (val.json or test.json)"
    rows = read_json(path, list, what)
    expect_rows(rows, path, what, image=str, question=str)
    ids = [str(i) for i in range(len(rows))]
    joined = join(answers, ids)
    return [(rows[int(id)], evalai(joined[id].text)) for id in absent(ids, joined, None, limited)]


def gqa(path: Path, answers: list[Answer], limited: bool = False):
    """testdev_balanced_questions.json: {id: {"question", "answer", "isBalanced", "types": {...},
    ...}}.

    Periods at the end go and the text is lowered: that is all. "a dog", "dogs", "dog!" are wrong
    where "dog" is right. The mean over balanced questions; open are those whose structure is a
    query, all others are binary.
    """
    what = "GQA's questions (testdev_balanced_questions.json)"
    questions = read_json(path, dict, what)
    expect_rows(questions.values(), path, what, question=str, answer=str, isBalanced=bool,
                types=dict)
    expect_rows((q["types"] for q in questions.values()), path, what, structural=str, semantic=str)
    balanced = {id: q for id, q in questions.items() if q["isBalanced"]}
    expect(balanced, path, "a GQA split with balanced questions")
    joined = join(answers, questions)
    balanced = {id: questions[id] for id in absent(balanced, joined, None, limited)}
    expect(balanced, path,
           "a GQA split with balanced questions among those answered (--limit more?)")
    right = [joined[id].text.rstrip(".").lower() == q["answer"] for id, q in balanced.items()]
    shape = ["open" if q["types"]["structural"] == "query" else "binary" for q in balanced.values()]
    delete = str.maketrans("", "", string.punctuation)
    lmms = [joined[id].text.lower().translate(delete) == q["answer"].lower().translate(delete)
            for id, q in balanced.items()]
    kit = [
        joined[id].text.strip().lower() == q["answer"].strip().lower()
        for id, q in balanced.items()]
    return percent(right), dict(
        accuracy=percent(right),
        **dict(binary=0.0, open=0.0) | by(shape, right), margin=margin(right), n=len(right),
        structural=by([q["types"]["structural"] for q in balanced.values()],
                      right), semantic=by([q["types"]["semantic"] for q in balanced.values()],
                                          right), lmms_eval=percent(lmms), vlmevalkit=percent(kit))


# --------------------------------------------------------------------------------------------------
# Multiple choice

def can_infer(answer: str, options: dict[str, str]) -> str | None:
    """The letter that VLMEvalKit reads from an answer without asking a language model; None if it
    finds none.

    options: {letter: text}. One letter alone among the words, unless four or more follow it ("A dog
    is on the left"); else "answer is B" in words; else the one option whose text is part of the
    answer.
    """
    if "Failed to obtain answer via API" not in answer:
        refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                    "I'm sorry, but without the image provided", "Cannot determine the answer")
        if any(refusal in answer for refusal in refusals):
            return "Z"
        tokens = answer.translate(str.maketrans(".()[],:;!*#{}", " " * 13)).split()
        letters = [letter for letter in options if letter in tokens]
        if len(letters) == 1 and tokens.index(letters[0]) > len(tokens) - 5:
            return letters[0]
        if not letters and "Z" in tokens:
            return "Z"
        said = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer)
        if said and said[1].upper() in options:
            return said[1].upper()
    if len(answer.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def scienceqa(path: Path, answers: list[Answer], limited: bool = False):
    """A folder with problems.json ({pid: {"choices", "answer": index, ...}}) and pid_splits.json
    ({"test": [pids]}).

    A letter counts if it is all of the text, or begins it as in "B. a dog", or if "The answer is B"
    with something behind it occurs once. "B.", "(B)", "b" and "Answer: B" are wrong, and nothing is
    guessed instead. IMG, the published number, is of the questions whose prompt holds <image>;
    where no prompts were written down, of those that have a picture in LLaVA's
    llava_test_CQM-A.json.
    """
    problems = read_json(path / "problems.json", dict, "ScienceQA's problems.json")
    test = read_json(path / "pid_splits.json", dict, "ScienceQA's pid_splits.json").get("test")
    expect(
        isinstance(test, list) and test and are_texts(test)
        and all(pid in problems for pid in test), path / "pid_splits.json",
        "the splits of this problems.json")
    expect_rows((problems[pid] for pid in test), path / "problems.json", "ScienceQA", choices=list,
                answer=int)
    expect(
        all(
            are_texts(problems[pid]["choices"]) and problems[pid]["answer"] in range(
                len(problems[pid]["choices"])) and problems[pid]["answer"] < 5 for pid in test),
        path / "problems.json", "ScienceQA: an answer that is none of the choices, or beyond E")
    joined = join(answers, test)
    test = absent(test, joined, "wrong, and not counted as IMG", limited)
    if any(answer.prompt is None for answer in joined.values()):
        asked = read_json(path / "llava_test_CQM-A.json", list,
                          "LLaVA's question file (or write down the prompts)")
        pictured = {str(row.get("id")) for row in asked if isinstance(row, dict) and "image" in row}
    img, right, lmms, kit = [], [], [], []
    for pid in test:
        answer, choices, letter = joined.get(pid), problems[pid]["choices"], "ABCDE"[problems[pid]
                                                                                     ["answer"]]
        text = answer.text if answer else "FAILED"
        right.append(scienceqa_letter(text) == letter)
        img.append(answer is not None
                   and (pid in pictured if answer.prompt is None else "<image>" in answer.prompt))
        lmms.append(text.strip().lower() == letter.lower() or text.strip()[:2] == letter + ".")
        kit.append(answer is not None and can_infer(text, dict(zip("ABCDE", choices))) == letter)
    if not any(img):
        raise UserError(
            f"none of the {len(joined)} answers is to a question with a picture: no prompt holds <image>"
        )
    disagree = sum("image" in problems[pid] and (problems[pid]["image"] is not None) != seen
                   for pid, seen in zip(test, img) if pid in joined)
    if disagree:
        warn(
            f"{disagree} prompts and problems.json disagree about whether there is a picture: IMG goes by the prompts"
        )

    def of_img(those, number=percent):
        return number([ok for ok, seen in zip(those, img) if seen])

    return of_img(right), dict(img=of_img(right), all=percent(right), margin=of_img(right, margin),
                               n_img=sum(img), n=len(test), lmms_eval=of_img(lmms),
                               vlmevalkit=of_img(kit))


def scienceqa_letter(text: str) -> str | None:
    if text in tuple("ABCDE"):
        return text
    if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)
    return said[0] if len(said) == 1 else None


def mmbench(path: Path, answers: list[Answer], limited: bool = False):
    """mmbench_dev_20230712.tsv: columns index, question, hint, A, B, C, D, answer, category, image,
    l2-category, ...

    Circular: a question comes again with its options rotated, as index + k * 1,000,000, and is
    right if all its rows are. (Count rows, not options: 53 questions have a row less.) Letters are
    found by `can_infer`; where that finds none, the server asks a language model, and here the
    answer is wrong. Plain accuracy, of each row for itself, is eight points higher. The answers of
    the test split are hidden: it is uploaded.
    """
    rows = mmbench_rows(path)
    ids = [row["index"] for row in rows]
    joined = join(answers, ids)
    kept = set(absent(ids, joined, "wrong", limited))
    rows = [row for row in rows if row["index"] in kept]
    if not any(row.get("answer") for row in rows):
        return None, {}
    expect(all(row["answer"] for row in rows), path,
           "a table with an answer in every row, or in none")
    inferred, bare = {}, {}
    for row in rows:
        text = joined[row["index"]].text if row["index"] in joined else None
        options = {
            letter: row[letter] for letter in string.ascii_uppercase if row.get(letter) is not None}
        inferred[row["index"]] = text is not None and can_infer(text, options) == row["answer"]
        bare[row["index"]] = text == row["answer"]
    base = [row for row in rows if int(row["index"]) < 10 ** 6]
    expect(base, path, "a table with MMBench's unrotated questions")
    groups = defaultdict(list)
    for row in rows:
        groups[int(row["index"]) % 10 ** 6].append(row["index"])

    def circular(right):
        return [all(right[i] for i in groups[int(row["index"])]) for row in base]

    circle = circular(inferred)
    metrics = dict(circular=percent(circle), plain_base=percent(inferred[row["index"]]
                                                                for row in base),
                   plain_all=percent(inferred.values()), margin=margin(circle), n=len(base),
                   n_rows=len(rows))
    for column in ("category", "l2-category"):
        if column in rows[0]:
            metrics[column] = by([str(row[column]) for row in base], circle)
    metrics["bare_letters"] = dict(circular=percent(circular(bare)),
                                   plain_all=percent(bare.values()),
                                   plain_base=percent(bare[row["index"]] for row in base))
    return metrics["circular"], metrics


def seed(path: Path, answers: list[Answer], limited: bool = False):
    """SEED-Bench.json: {"questions": [{"question_id", "answer", "data_type", ...}],
    "question_type": {name: id}}.

    The text has to be the letter, and nothing else: "B." is wrong. Image questions are the
    published number, videos are shown by one frame. One id stands twice in the file; its last
    answer counts for both. lmms-eval takes the first character, so that "Because" is a B.
    """
    what = "SEED-Bench's annotations (SEED-Bench.json, version 1)"
    content = read_json(path, dict, what)
    rows, types = content.get("questions"), content.get("question_type")
    expect(isinstance(rows, list) and rows and isinstance(types, dict), path, what)
    expect(all(isinstance(number, int) for number in types.values()), path, what)
    expect_rows(rows, path, what, question_id=(str, int), answer=str, data_type=str,
                question_type_id=int)
    names = {number: name for name, number in types.items()}
    expect(all(row["question_type_id"] in names for row in rows), path,
           f"{what}: a question of unknown type")
    ids = [str(row["question_id"]) for row in rows]
    joined = join(answers, Counter(ids))
    kept = set(absent(ids, joined, "wrong", limited))
    ids, rows = zip(*[(id, row) for id, row in zip(ids, rows) if id in kept])
    texts = [joined[id].text if id in joined else None for id in ids]
    right = [text == row["answer"] for text, row in zip(texts, rows)]
    lmms = [text is not None and text.strip()[:1].lower() == row["answer"].strip().lower()
            for text, row in zip(texts, rows)]
    choices = [{x.upper(): str(row.get(f"choice_{x}")) for x in "abcd"} for row in rows]
    kit = [text is not None and can_infer(text, those) == row["answer"]
           for text, those, row in zip(texts, choices, rows)]
    kinds = [row["data_type"] for row in rows]
    expect("image" in kinds, path, "SEED-Bench with its image questions")
    parts = by(kinds, right)
    return parts["image"], dict(
        **parts, all=percent(right),
        margin=margin([ok for ok, kind in zip(right, kinds) if kind == "image"]),
        n_image=kinds.count("image"), n=len(rows), lmms_eval=by(kinds, lmms)["image"],
        vlmevalkit=by(kinds,
                      kit)["image"], types=by([names[row["question_type_id"]] for row in rows],
                                              right))


MMMU_SEED = 42
MMMU_DOMAINS = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"], "Health and Medicine": [
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy", "Public_Health"],
    "Humanities and Social Science": ["History", "Literature", "Sociology",
                                      "Psychology"], "Tech and Engineering": [
                                          "Agriculture", "Architecture_and_Engineering",
                                          "Computer_Science", "Electronics", "Energy_and_Power",
                                          "Materials", "Mechanical_Engineering"]}


def mmmu(path: Path, answers: list[Answer], limited: bool = False):
    """The rows from Hugging Face (.jsonl, .parquet, or the folder of the subjects' .parquet), or
    answer_dict_val.json.

    Rows: "id" (validation_Accounting_1), "question_type", "options" (a list, or a string that holds
    one), "answer". A choice is read from the text by `mmmu_choice`; where it finds none, one is
    drawn at random (seed 42), so some points are luck: `without_luck` counts such answers as wrong.
    The draws depend on the order, which is that of the subjects' names, and within one that of the
    annotations. An open answer is right if a reading by `mmmu_open` is. answer_dict_val.json has no
    options, so nothing can be read or drawn: a choice has to be the bare letter. (lmms-eval's
    number isn't here: its draws depend on the run, and its open questions are all wrong of late.)
    """
    rows = mmmu_rows(path)
    subjects = {subject for those in MMMU_DOMAINS.values() for subject in those}
    expect(all(mmmu_subject(id) in subjects for id in rows), path,
           "MMMU: an id without one of its subjects")
    joined = join(answers, rows, strangers=False)
    absent(rows, joined, "left out", limited)
    luck = random.Random(MMMU_SEED)
    right, sure = defaultdict(list), defaultdict(list)
    # stable: in order within a subject
    for id in sorted((id for id in rows if id in joined), key=mmmu_subject):
        kind, gold, options = rows[id]
        text, gold = joined[id].text, gold if isinstance(gold, list) else [gold]
        if kind != "multiple-choice":
            ok = found = mmmu_open_right(text, gold)
        else:
            found = ok = text if options is None else mmmu_choice(text, options)
            if options is not None and not found:
                ok = luck.choice(string.ascii_uppercase[:len(options)])
            found, ok = found in gold, ok in gold
        right[mmmu_subject(id)].append(ok)
        sure[mmmu_subject(id)].append(found)

    def overall(those, subjects):             # the official arithmetic, for the last digit
        parts = [(sum(those[s]) / len(those[s]), len(those[s])) for s in subjects if s in those]
        return sum(accuracy * n for accuracy, n in parts) / sum(n for _, n in parts) * 100

    return overall(right, right), dict(
        overall=overall(right, right), without_luck=overall(sure, sure),
        margin=margin([ok for those in right.values() for ok in those]), n=len(joined), domain={
            domain: overall(right, those) for domain, those in MMMU_DOMAINS.items()
            if set(those) & set(right)},
        subject={subject: percent(right[subject]) for subject in right})


def mmmu_subject(id: str) -> str:
    return "_".join(id.split("_")[1:-1])


def mmmu_choice(text: str, options: list[str]) -> str | None:
    """The letter in brackets, else alone between spaces, else (of six words or more) the option
    that is quoted.

    Of several the one that comes last. Capitals only.
    """
    for mark in ",.!?;:'":                  # each once, one after the other: "B.'" keeps its period
        text = text.strip(mark)
    text = f" {text} "
    letters = string.ascii_uppercase[:len(options)]
    tries = [(text, {x: f"({x})" for x in letters}), (text, {x: f" {x} " for x in letters})]
    if len(text.split()) > 5:
        tries.append((text.lower(), {x: str(option).lower() for x, option in zip(letters, options)}))
    for where, wanted in tries:
        if found := [x for x in letters if wanted[x] in where]:
            return max(found, key=lambda x: where.rfind(wanted[x]))
    return None


def mmmu_open(text: str) -> set[str | float]:
    """What an open answer may have meant: the ends of its lines after words like "is", or all of
    it, and the numbers in these, rounded to two decimals."""
    text = text.strip().strip(".").lower()
    signs = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    kept, lines = [], text.split("\n")
    for i, line in enumerate(lines):
        shortest = ""
        for sign in signs + ["="] * (i == len(lines) - 1):
            if sign in line:
                tail = line.split(sign)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            kept.append(shortest)
    kept = kept or [text]
    numbers = [
        number for part in kept
        for pattern in (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
        for number in re.findall(pattern, part)]
    return {value for part in kept + numbers for value in mmmu_normal(part)}


def mmmu_normal(text: str) -> list[str | float]:
    """A number, or the text in lower case; a single letter only next to a space, or every "e" would
    hold an e."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_open_right(text: str, gold: list) -> bool:
    golds = [value for answer in gold for value in mmmu_normal(str(answer))]
    return any(
        any(isinstance(g, str) and g in said
            for g in golds) if isinstance(said, str) else said in golds for said in mmmu_open(text))


# --------------------------------------------------------------------------------------------------
# Yes or no

def yes_or_no_vlmevalkit(text: str) -> str | None:
    said = set(strip_punctuation(text.lower(), PERIOD_VLMEVALKIT).split()) & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


MME_TASKS = dict(
    perception="existence count position color posters celebrity scene landmark artwork OCR".split(
    ),
    cognition="commonsense_reasoning numerical_calculation text_translation code_reasoning".split())
MME_END = "Please answer yes or no."


def mme(path: Path, answers: list[Answer], limited: bool = False):
    """MME_Benchmark_release_version: a folder a task, with a <picture>.txt of two lines
    "question<TAB>Yes" or "No".

    Only the first four characters are read: "yes" in them is a yes, else "no" in them is a no, so
    that "know" and "not sure" are noes and "there is no" is neither, which is wrong. A task's score
    is its percentage of questions plus that of pictures with both right; perception is the sum over
    ten tasks, cognition over four. The official script pairs the lines as they come; here the two
    of a picture are paired wherever they stand.
    """
    truth = {(task, *key): gold for tasks in MME_TASKS.values() for task in tasks
             for key, gold in mme_task(path, task).items()}

    def which(answer):
        if set(answer.text) & set("\t\n\r"):
            raise UserError(
                f"{answer.at}: a tab or line break in the answer, which the official files can't hold"
            )
        task, picture = answer.id.split("/")[0], answer.id.split("/")[-1].split(".")[0]
        question = answer.asked()
        if "Answer the question using a single word or phrase." in question:
            question = question.replace("Answer the question using a single word or phrase.",
                                        "").strip()
        if MME_END not in question:       # seven questions of the release have two spaces before it
            spaced = [question + " " + MME_END, question + "  " + MME_END]
            question = next((q for q in spaced if (task, picture, q) in truth), spaced[0])
        return task, picture, question

    joined = join(answers, truth, which, strangers=False)
    absent(truth, joined, "left out, with their pictures", limited)
    pictures = defaultdict(list)
    for task, picture, question in truth:
        if (task, picture, question) in joined:
            pictures[task, picture].append((joined[task, picture,
                                                   question].text, truth[task, picture, question]))
    for (task, picture), pair in pictures.items():
        if len(pair) != 2:
            raise UserError(
                f"only one of the two questions about {task}/{picture} has an answer; answer both")
    scores, shares = {}, {}                      # shares: of every picture in its task's score
    for name, read in dict(mme=mme_read, lmms_eval=mme_read_lmms,
                           vlmevalkit=yes_or_no_vlmevalkit).items():
        for tasks in MME_TASKS.values():
            for task in tasks:
                right = [[read(text) == gold for text, gold in pair]
                         for (t, _), pair in pictures.items() if t == task]
                if not right:
                    raise UserError(
                        f"no answers for MME's {task}; perception and cognition are sums over all 14 tasks"
                    )
                shares[name, task] = [sum(pair) / 2 + all(pair) for pair in right]
                scores[name, task] = percent(ok for pair in right
                                             for ok in pair) + percent(all(pair) for pair in right)

    def total(name):
        return {part: sum(scores[name, task] for task in tasks) for part, tasks in MME_TASKS.items()}

    return total("mme")["perception"], dict(
        **total("mme"),
        tasks={task: scores["mme", task] for tasks in MME_TASKS.values() for task in tasks},
        margin=margin(*(shares["mme", task] for task in MME_TASKS["perception"])), n=len(joined),
        lmms_eval=total("lmms_eval"), vlmevalkit=total("vlmevalkit"))


def mme_read(text: str) -> str | None:
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_read_lmms(text: str) -> str | None:
    text = text.lower().strip().replace(".", "")
    return dict(y="yes", n="no").get(text) or mme_read(text)


POPE_FIRST_ID = dict(adversarial=0, random=10_000_000, popular=20_000_000)


def pope(path: Path, answers: list[Answer], limited: bool = False):
    """The folder coco: coco_pope_adversarial.json, _random, _popular, of lines {"question_id",
    "text", "label"}.

    An id is the line's question_id (1, 2, ...), in random + 10,000,000, in popular + 20,000,000.
    The text up to its first period, without commas, is a no if one of its words is "No", "no" or
    "not"; everything else is a yes, even "NO", "isn't" and nothing at all. The published number is
    the mean of three F1. In October 2023 the official files were changed (random has 3,000
    questions since, 2,910 before): answers to one set can't be scored by the other. lmms-eval and
    VLMEvalKit pool all three, and a text without a yes is no yes.
    """
    given, pairs = {answer.id for answer in answers}, {}
    for category, first in POPE_FIRST_ID.items():
        file = path / f"coco_pope_{category}.json"
        rows = [row for _, row in read_lines(file, "a file of POPE")]
        expect_rows(rows, file, "a file of POPE", question_id=int, text=str, label=str)
        ids, from_zero = [str(first + row["question_id"])
                          for row in rows], [str(first + i) for i in range(len(rows))]
        if not given.issuperset(ids) and given.issuperset(from_zero):
            ids = from_zero                            # all of them, counted from 0: the same order
        pairs |= {id: (category, row) for id, row in zip(ids, rows)}
    joined = join(answers, pairs, strangers=False)
    absent(pairs, joined, "left out", limited)
    for id, answer in joined.items():
        if answer.prompt is not None and pairs[id][1]["text"] not in answer.prompt:
            raise UserError(
                f"{answer.at}: {id} is another question in {path}; use the version of POPE that was asked"
            )
    if sum(category == "random" for category, _ in pairs.values()) == 3000:
        warn(
            f"{path} is POPE as of October 2023; LLaVA-1.5's numbers are of the older files (random: 2,910 questions)"
        )
    metrics, shares = {}, []
    for category in POPE_FIRST_ID:
        those = [(pope_says(a.text), pairs[id][1]["label"]) for id, a in joined.items()
                 if pairs[id][0] == category]
        if not those:
            raise UserError(
                f"no answers to POPE's {category} questions; the score is the mean over three categories"
            )
        if ("yes", "yes") not in those:
            warn(
                f"POPE {category}: no right yes, where the official script divides by zero; its F1 is taken as 0"
            )
        metrics[category] = pope_metrics(those) | dict(yes_ratio=percent(said == "yes"
                                                                         for said, _ in those))
        shares.append([share / 3 for share in f1_shares(those)])
    f1, accuracy = (sum(metrics[category][name] for category in POPE_FIRST_ID) / 3
                    for name in ("f1", "accuracy"))
    lmms = [(a.text.lower().strip(), pairs[id][1]["label"]) for id, a in joined.items()]
    kit = [(yes_or_no_vlmevalkit(a.text), pairs[id][1]["label"]) for id, a in joined.items()]
    return f1, dict(f1=f1, accuracy=accuracy, margin=margin(*shares), n=len(joined), **metrics,
                    lmms_eval=pope_metrics(lmms, "no"), vlmevalkit=pope_metrics(kit))


def pope_says(text: str) -> str:
    said = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(said) else "yes"


def pope_metrics(pairs: list[tuple], misses=None) -> dict[str, float]:
    """pairs: (said, label). misses: what has to be said for a missed yes to count in recall; None:
    anything."""
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    missed = sum(label == "yes" and said != "yes" and (misses is None or said == misses)
                 for said, label in pairs)
    precision, recall = tp / (tp + fp) if tp else 0.0, tp / (tp + missed) if tp else 0.0
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    return dict(accuracy=percent(said == label for said, label in pairs), precision=precision * 100,
                recall=recall * 100, f1=f1 * 100)


def f1_shares(pairs: list[tuple]) -> list[float]:
    """A number for every pair (said, label); their mean is F1, and their spread tells how far F1 is
    off.

    F1 = 2 TP / (yes said + yes labelled), a ratio of two means, of which this is the linear part.
    """
    hits = [2 * (said == label == "yes") for said, label in pairs]
    yes = [(said == "yes") + (label == "yes") for said, label in pairs]
    f1, mean = sum(hits) / max(sum(yes), 1), max(sum(yes), 1) / len(pairs)
    return [f1 + (hit - f1 * of) / mean for hit, of in zip(hits, yes)]


# --------------------------------------------------------------------------------------------------
# Judged elsewhere

def mmvet_questions(path: Path) -> dict:
    what = "MM-Vet's questions (mm-vet.json)"
    questions = read_json(path, dict, what)
    expect(all(id.startswith("v1_") and id[3:].isdecimal() for id in questions), path, what)
    expect_rows(questions.values(), path, what, capability=list)
    expect(all(are_texts(question["capability"]) for question in questions.values()), path, what)
    return questions


def mmvet(path: Path, grades: Path):
    """mm-vet.json ({"v1_0": {"capability": [...], ...}}) and the grades of the official grader,
    which asks GPT-4.

    grades: {"v1_0": {"score": [a number in 0..1 a run]}}. Means in percent, of all questions, of
    those with a capability, and of those with exactly a set of them; the mean over runs, rounded to
    one decimal as officially. The grader matters: LLaVA-1.5-7B's 31.1 is by the GPT-4 of 2023; in
    2025 the same answers are reported to get 27.9.
    """
    questions, what = mmvet_questions(path), "grades of MM-Vet's official grader"
    given = read_json(grades, dict, what)
    if unknown := sorted(given.keys() - questions.keys()):
        raise UserError(f"{grades}: {unknown[0]} is not a question of {path}")
    absent(questions, given, None)
    expect_rows(given.values(), grades, what, score=list)
    lengths = {len(grade["score"]) for grade in given.values()}
    expect(
        len(lengths) == 1 and min(lengths) > 0, grades, f"{what}: each question needs as many runs")
    expect(
        all(
            isinstance(s, (int, float)) and 0 <= s <= 1 for g in given.values()
            for s in g["score"]), grades, what)
    n_runs = lengths.pop()

    def mean(those):                         # over questions, then over runs; rounded as numpy does
        runs = [
            sum(given[id]["score"][i] for id in given if id in those) / len(those) * 100
            for i in range(n_runs)]
        return round(sum(runs) / n_runs * 10) / 10

    sets, single = defaultdict(set), defaultdict(set)
    for id, question in questions.items():
        sets["_".join(sorted(set(question["capability"])))].add(id)
        for capability in question["capability"]:
            single[capability].add(id)
    means = [sum(given[id]["score"]) / n_runs for id in questions]
    return mean(questions), dict(total=mean(questions),
                                 **{name: mean(single[name]) for name in sorted(single)},
                                 margin=margin(means), n=len(questions), runs=n_runs,
                                 sets={name: mean(sets[name]) for name in sorted(sets)})


SCORERS = dict(gqa=gqa, scienceqa=scienceqa, textvqa=textvqa, vizwiz=vizwiz, mmbench=mmbench,
               mmvet=mmvet, seed=seed, mmmu=mmmu, mme=mme, pope=pope)


def score(task: str, annotations: Path, answers: list[Answer], grades: Path | None = None,
          limited=False) -> dict:
    """dict(task, primary: the published number, metrics: all of them). primary None: it is judged
    elsewhere.

    limited: only a part of the questions was asked. The score is that of those, instead of an error
    or a warning.
    """
    if task == "mmvet":
        primary, metrics = mmvet(annotations, grades) if grades else (None, {})
    else:
        primary, metrics = SCORERS[task](annotations, answers, limited)
    return dict(task=task, primary=primary, metrics=metrics)
