"""Short answers in the normal forms in which the VQA challenges compare them, and the accuracy that
these share.

Each is the official code's, with its gaps and slips: what they do to an answer moves scores.
"""
import re

NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6",
               seven="7", eight="8", nine="9", ten="10")
ARTICLES = ("a", "an", "the")
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
PERIOD = re.compile(r"\.(?!\d)")  # meant to spare "3.5" only, but a look-behind was mistyped
PERIOD_VLMEVALKIT = re.compile(r"(?<!\d)\.(?!\d)")  # as it was meant


def contractions() -> dict[str, str]:
    """{a contraction without (all of) its apostrophes: what it becomes}; from the VQA code."""
    regular = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't
        he'd he's how'd how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't
        must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
        someone'd someone'll someone's something'd something'll that's there'd there're there's
        they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
        when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
        wouldn't y'all you'd you'll you're you've"""
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
    straight = {"couldn'tve", "hadn'tve", "aint", "arent", "cant", "couldve", "couldnt", "weve",
                "wheres", "whove"}
    result = {}
    for key, value in table.items():
        if key not in straight:
            key, value = key.replace("'", "’"), value.replace("'", "’")
        elif "'" in key:                                   # of those two the value is curly
            value = value.replace("'", "’")
        result[key] = value
    return result


CONTRACTIONS = contractions()
CONTRACTIONS_VIZWIZ = curly(CONTRACTIONS)


def strip_punctuation(text: str, period: re.Pattern = PERIOD) -> str:
    """A mark goes where it stands beside a space anywhere in the text, else it becomes a space.

    A comma between two digits anywhere makes all marks go. At most 32 periods do: a flag
    (re.UNICODE, 32) is passed where the count belongs, by all three scorers that do this.
    """
    out = text
    thousands = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if thousands or beside_space else " ")
    return period.sub("", out, count=32)


def words(text: str, table: dict[str, str]) -> str:
    """Lower case, number words to digits, articles dropped, then contractions mended."""
    kept = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(table.get(word, word) for word in kept if word not in ARTICLES)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def evalai(text: str) -> str:
    """TextVQA's normal form, of both sides; also that of uploads to VizWiz, and of both sides in
    lmms-eval's VizWiz.

    "The 1,000 dogs!" -> "1000 dogs", "None" -> "0", "levi's" -> "levi 's", "dont" -> "don't", and
    "A" -> "".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(strip_punctuation(one_line(text)), CONTRACTIONS)


def vqa(text: str, table: dict[str, str], period: re.Pattern = PERIOD) -> str:
    """The older normal form, without evalai's first line: VizWiz's (of the uploaded side alone),
    VLMEvalKit's."""
    return words(strip_punctuation(one_line(text), period), table)


def vqa_accuracy(answer: str, humans: list[str]) -> float:
    """The mean over ten humans of min(1, how many of the *other nine* said this / 3).

    So 1, 2, 3, 4 humans give 0.3, 0.6, 0.9, 1, and not the 1/3, 2/3, 1, 1 of the formula that is
    usually quoted.
    """
    same = [human == answer for human in humans]
    return sum(min(1, (sum(same) - own) / 3) for own in same) / len(same)
