"""Tokenizers: text to ids and back, for Llama and whatever shares its two kinds of vocabulary.

`Tokenizer.from_pretrained` reads the one file that a model folder has for it:

    tokenizer.model   sentencepiece (Llama 1 and 2, Vicuna), or tiktoken's text (Meta's Llama 3)
    tokenizer.json    byte pairs in Hugging Face's layout (SmolLM2, Llama 3)

Text is only text: a control token that somebody types is encoded as letters, so no question can
end an answer or put a picture anywhere.
"""
import base64
import binascii
import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tiktoken
from sentencepiece import SentencePieceProcessor

from core.beside import added_to, beside, settings_of, text_of, with_added
from core.common import UserError, read_json
from core.fields import MOST_TOKENS, Id, check, fits, shown
from core.folders import JSON_BYTES, check_folder, present

# stands in a row of ids where the picture's features go; never an index into an embedding table
IMAGE_TOKEN = -200
IGNORE = -100       # a label that isn't one: cross entropy skips it

# How text is cut into words before byte pairs are merged inside each word; the alternatives are
# tried from the left.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2: every digit alone, then GPT2 on what lies between. In one expression: white space may run
# up to a digit.
DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

Encode = Callable[[str, bool], list[int]]        # (text, whether it goes on after other ids) -> ids


class Tokenizer:
    """Text to ids and back. `from_pretrained` picks sentencepiece or byte-level BPE by the file it
    finds.

    `encode` sees text only: "</s>" or "<|im_end|>" typed by somebody is encoded as letters, never
    as a control id. bos_id (None where there is none), eos_ids (a set: any of them ends an answer),
    vocab_size, file (its one file).
    """

    def __init__(self, file: Path, encode: Encode, pieces: list[bytes | None], bos_id: int | None,
                 eos_ids: set[int], prefix_space: bool):
        """pieces: id -> its bytes, None: control. prefix_space: encode puts a space before a text,
        which isn't part of it."""
        self.file = file
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.vocab_size = len(pieces)
        self._encode = encode
        self._pieces = pieces
        self._prefix_space = prefix_space

    @classmethod
    def from_pretrained(cls, dir: str | Path) -> "Tokenizer":
        """Read tokenizer.model or tokenizer.json of a model's folder; whether a tokenizer.model is
        sentencepiece's or tiktoken's, its first line tells. config.json beside it may name further
        tokens that end an answer. UserError for a file that isn't of a kind known here."""
        dir = Path(dir)
        check_folder(dir)
        config = settings_of(dir)
        file, read = dir / "tokenizer.model", _sentencepiece
        if not present(file, most=JSON_BYTES):
            file, read = dir / "tokenizer.json", _byte_level
            if not present(file, most=JSON_BYTES):
                raise UserError(
                    f"{dir}: no tokenizer here (looked for tokenizer.model and tokenizer.json)")
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file.read_bytes()[:200]):
            read = _tiktoken
        tokenizer = cls(file, *read(file, config))
        rows = max(tokenizer.vocab_size, config.get("vocab_size") or 0)
        for id in tokenizer.eos_ids | ({tokenizer.bos_id} - {None}):
            if id >= rows:
                raise UserError(f"{dir}: {id} is said to begin or end a text, but the vocabulary "
                                f"has {rows} tokens")
        return tokenizer

    def __reduce__(self):         # for processes that are not forked: they read the file themselves
        return Tokenizer.from_pretrained, (self.file.parent,)

    def encode(self, text: str, bos: bool = False, continues: bool = False) -> list[int]:
        """Ids of a text. bos: put bos_id before them. continues: the text goes on after other ids.

        Sentencepiece puts a space before every text; one that continues has none: "USER:" after
        "</s>" is one word. UserError for bos where there is none.
        """
        if bos and self.bos_id is None:
            raise UserError(f"{self.file}: this tokenizer has no bos token")
        return [self.bos_id] * bos + self._encode(text, continues)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, control ids left out. Bytes that are not UTF-8 become U+FFFD.
        UserError for an id that isn't in the vocabulary."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """decode() piece by piece, as ids come in. A character of several ids comes out whole, with
        its last one."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        first = self._prefix_space
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise UserError(f"{self.file}: there is no token {int(id)}, the vocabulary has "
                                f"{self.vocab_size}")
            piece = self._pieces[id]
            if piece is None:
                continue
            # the space that encode put there
            text = decoder.decode(piece.removeprefix(b" ") if first else piece)
            first = False
            if text:
                yield text
        if rest := decoder.decode(b"", final=True):              # cut off in mid-character
            yield rest


# --------------------------------------------------------------------------------------------------
# The kinds of files. Each gives what Tokenizer wants: encode, pieces, bos_id, eos_ids, prefix_space

Parts = tuple[Encode, list[bytes | None], int | None, set[int], bool]


def _ids(config: dict, key: str) -> list[int]:
    """config.json says nothing, one id or several."""
    value = config.get(key)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _sentencepiece(path: Path, config: dict) -> Parts:
    """Llama 1 and 2: a tokenizer.model as sentencepiece writes it."""
    try:
        content = path.read_bytes()
        if not {1, 2, 3} <= _numbers(content):       # pieces; of the trainer; of the normalizer
            raise ValueError("cut short")
        sp = SentencePieceProcessor(model_proto=content)
        pieces, newline = [_piece(sp, id) for id in range(sp.vocab_size())], sp.encode("\n")
    except Exception as e:       # RuntimeError, OSError, ValueError, UnicodeDecodeError, IndexError
        raise UserError(f"{path}: neither a sentencepiece model nor tiktoken's text, or cut short; "
                        "get it again") from e
    n = sp.vocab_size()
    if sp.eos_id() < 0 or not any(sp.is_byte(id) for id in range(n)):
        raise UserError(f"{path}: needs an eos token and byte fallback, as Llama's tokenizer has")
    if len(newline) != 2 or sp.id_to_piece(newline) != ["▁", "<0x0A>"]:
        raise UserError(
            f"{path}: changes line breaks (normalisation), which Llama's tokenizer doesn't")

    def encode(text: str, continues: bool) -> list[int]:
        if not continues:
            return sp.encode(text)
        # the prefix space sticks to the newline, a byte that merges with nothing
        ids = sp.encode("\n" + text)
        if ids[:2] != newline:
            raise UserError(f"{path}: merges a line break with what follows it, which Llama's "
                            "tokenizer doesn't")
        return ids[2:]

    names = {sp.id_to_piece(id): id for id in range(n)}
    pieces = with_added(pieces, path, added_to(path, names.get))
    eos_ids = {sp.eos_id(), *_ids(config, "eos_token_id")}
    pieces = [None if id in eos_ids else piece for id, piece in enumerate(pieces)]
    bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
    return encode, pieces, bos_id, eos_ids, True


def _piece(sp: SentencePieceProcessor, id: int) -> bytes | None:
    """What a token stands for, None: nothing."""
    piece = sp.id_to_piece(id)
    if sp.is_control(id) or sp.is_unknown(id):
        return None
    if sp.is_byte(id):                                           # "<0x0A>" stands for one byte
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("▁", " ").encode()


def _numbers(content: bytes) -> set[int]:
    """The numbers of a protobuf's outermost fields, all of which have to be whole: sentencepiece
    takes one that was cut between two of its tokens. ValueError for what is none."""
    found, at = set(), 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while at < len(content) and shift < 64:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("a number is cut short")

    while at < len(content):
        tag = varint()
        if tag & 7 != 2:                             # of known length: all of a ModelProto's are
            raise ValueError("not a sentencepiece model")
        size = varint()
        at += size
        found.add(tag >> 3)
    if at > len(content):
        raise ValueError("a field is cut short")
    return found


# Llama 3's 256 control tokens stand behind the byte pairs; these are the ones that matter here, by
# their place: <|begin_of_text|>; <|end_of_text|>, <|eom_id|>, <|eot_id|>
LLAMA3_CONTROLS, LLAMA3_BOS, LLAMA3_EOS = 256, 0, (1, 8, 9)


def _tiktoken(path: Path, config: dict) -> Parts:
    """Meta's Llama 3: a tokenizer.model of lines "base64 rank", which is what tiktoken itself
    takes."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as e:
        raise UserError(
            f"{path}: not tiktoken's format, lines of a base64 token and its rank ({e})") from None
    n = len(lines)
    rows = config.get("vocab_size") or n + LLAMA3_CONTROLS
    if rows != n + LLAMA3_CONTROLS:
        raise UserError(f"{path}: holds {n} tokens, and with {LLAMA3_CONTROLS} control tokens the "
                        f"model has {rows}; is it whole?")
    lost = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if sorted(ranks.values()) != list(range(n)) or lost:
        raise UserError(
            f"{path}: its {n} ranks should be 0 to {n - 1}, and every single byte should have one")
    bpe = tiktoken.Encoding(path.name, pat_str=LLAMA3, special_tokens={}, mergeable_ranks=ranks)

    def encode(text: str, continues: bool) -> list[int]:
        return bpe.encode_ordinary(text)

    pieces = sorted(ranks, key=ranks.get) + [None] * LLAMA3_CONTROLS
    pieces = with_added(pieces, path, added_to(path, lambda text: None))
    eos_ids = {n + place for place in LLAMA3_EOS} | set(_ids(config, "eos_token_id"))
    return encode, pieces, n + LLAMA3_BOS, eos_ids, False


# --------------------------------------------------------------------------------------------------
# tokenizer.json

def _byte_alphabet() -> dict[str, int]:
    """GPT-2 writes bytes as visible characters: printable Latin-1 as itself, the other 68 from
    U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def _word_pattern(path: Path, spec: dict) -> str:
    """The regular expression that a tokenizer.json's normalizer, pre_tokenizer and model settings
    amount to."""
    before = spec.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    if not fits(steps, list[dict]):
        raise UserError(f"{path}: its pretokenizers {shown(steps)} should be a list of objects")
    *cuts, last = steps
    model, kinds = spec["model"], [step.get("type") for step in steps]
    odd = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    usual = (spec.get("normalizer") is None and model.get("type") == "BPE"
             and not any(model.get(key) for key in odd)
             and last.get("type") == "ByteLevel" and not last.get("add_prefix_space"))
    if usual and last.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and cuts[0].get("individual_digits"):
            return DIGITS
    elif usual and kinds == ["Split", "ByteLevel"]:
        cut = cuts[0]
        llama3 = cut.get("pattern") == {"Regex": LLAMA3} and cut.get("behavior") == "Isolated"
        if llama3 and not cut.get("invert"):
            return LLAMA3
    raise UserError(
        f"{path}: not a byte-level BPE of a kind known here (GPT-2's, SmolLM2's, Llama 3's); a "
        "Llama 2 tokenizer needs its tokenizer.model")


def _unescape(path: Path, token: str) -> bytes:
    """A token as it stands in the file -> its bytes."""
    if strange := set(token) - set(ALPHABET):
        raise UserError(
            f"{path}: {min(strange)!r} in {token!r} is not a letter of the byte alphabet")
    return bytes(ALPHABET[char] for char in token)


def _controls(path: Path, spec: dict) -> dict[str, int]:
    """The control tokens, which no text becomes: {text: id}."""
    controls = {}
    for token in spec.get("added_tokens") or []:
        check(token, {"content": str, "id": Id, "special": bool}, f"{path}: added_tokens")
        if not token["special"]:
            raise UserError(f"{path}: added tokens that are not special are not implemented "
                            f"({shown(token['content'])})")
        controls[token["content"]] = token["id"]
    return controls


def _order(path: Path, model: dict, ids: dict[bytes, int]) -> list[bytes]:
    """The tokens in the order in which tiktoken is to merge: single bytes, then the products of the
    merges as the file lists them."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or not all(type(t) is str and t for t in pair):
            raise UserError(f"{path}: the merge {shown(pair)} should be of two tokens")
    order = [bytes([byte]) for byte in range(256)]
    order += [_unescape(path, left + right) for left, right in pairs]
    # Llama 3: any word that is in the vocabulary is one token
    if model.get("ignore_merges"):
        order += sorted(ids, key=ids.get)
    order = list(dict.fromkeys(order))      # several merges may have one product: the first counts
    if lost := [token for token in order[256:] if token not in ids]:
        raise UserError(f"{path}: a merge makes {lost[0]!r}, which is not in the vocabulary")
    return order


def _named(path: Path, config: dict, controls: dict[str, int], key: str) -> list[int]:
    """The ids of bos_token or eos_token: by its text in tokenizer_config.json, by number in
    config.json."""
    given = beside(path, "tokenizer_config.json").get(key)
    name = text_of(given)
    if given is not None and name not in controls:
        raise UserError(f"{path.with_name('tokenizer_config.json')}: {key} {shown(name)} is not "
                        f"among the added tokens of {path.name}")
    return ([] if name is None else [controls[name]]) + _ids(config, key + "_id")


def _check_ids(path: Path, ids: list[int]) -> None:
    """UserError unless these are ids of tokens, each another."""
    odd = [id for id in ids if type(id) is not int or not 0 <= id < MOST_TOKENS]
    if odd:
        raise UserError(f"{path}: {shown(odd[0])} is no id of a token")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: several tokens have one id")


def _byte_level(path: Path, config: dict) -> Parts:
    """SmolLM2, Llama 3: a tokenizer.json. The merging is tiktoken's.

    tiktoken merges the pair whose product has the lowest rank; the file lists merges in order. So
    ranks follow the merges, and `table` leads from ranks to ids. A byte without an id (SmolLM2
    lacks 21, rare control characters and bytes that UTF-8 hardly uses) is left out, as by Hugging
    Face.
    """
    spec = read_json(path, most=JSON_BYTES)
    check(spec, {"model": dict, "added_tokens": list[dict] | None, "pre_tokenizer": dict | None},
          f"{path}")
    check(spec["model"], {"vocab": dict, "merges": list}, f"{path}: model")
    pattern, vocabulary = _word_pattern(path, spec), spec["model"]["vocab"]
    controls = _controls(path, spec)
    controls |= added_to(path, lambda text: controls.get(text, vocabulary.get(text)))
    ids = {_unescape(path, token): id for token, id in vocabulary.items() if token not in controls}
    _check_ids(path, [*ids.values(), *controls.values()])
    order = _order(path, spec["model"], ids)
    ranks = {token: rank for rank, token in enumerate(order)}
    bpe = tiktoken.Encoding(path.name, pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
    table = [ids.get(token) for token in order]

    def encode(text: str, continues: bool) -> list[int]:
        return [id for rank in bpe.encode_ordinary(text) if (id := table[rank]) is not None]

    bos, eos = (_named(path, config, controls, key) for key in ("bos_token", "eos_token"))
    if not eos:
        raise UserError(f"{path}: neither tokenizer_config.json nor config.json beside it says "
                        "which token ends a text")
    pieces = [None] * (1 + max([*ids.values(), *controls.values()]))
    for token, id in ids.items():
        if id not in eos:
            pieces[id] = token
    return encode, pieces, bos[0] if bos else None, set(eos), False
