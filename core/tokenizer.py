"""TODO core/tokenizer.py"""
import base64
import binascii
import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tiktoken
from sentencepiece import SentencePieceProcessor

from core.common import UserError, read_config, read_json

# --------------------------------------------------------------------------------------------------
# Tokenizers

# stands in a row of ids where the picture's features go; never an index into an embedding table
IMAGE_TOKEN = -200
IGNORE = -100       # a label that isn't one: cross entropy skips it
# How text is cut into words before byte pairs are merged inside each word; the alternatives are
# tried from the left.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2: every digit alone, then GPT2 on what lies between. In one expression: white space may run
# up to a digit.
DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+")


class Tokenizer:
    """Text to ids and back. `from_pretrained` picks sentencepiece or byte-level BPE by the file it
    finds.

    `encode` sees text only: "</s>" or "<|im_end|>" typed by somebody is encoded as letters, never
    as a control id. bos_id (None where there is none), eos_ids (a set: any of them ends an answer),
    vocab_size, file (its one file).
    """

    def __init__(self, file: Path, encode: Callable[[str, bool],
                                                    list[int]], pieces: list[bytes | None],
                 bos_id: int | None, eos_ids: set[int], prefix_space: bool):
        # id -> its bytes; None: control
        self.file, self._encode, self._pieces = file, encode, pieces
        self.bos_id, self.eos_ids, self._prefix_space = bos_id, eos_ids, prefix_space
        self.vocab_size = len(pieces)

    @classmethod
    def from_pretrained(cls, dir: str | Path) -> "Tokenizer":
        """Read tokenizer.model (sentencepiece: Llama 1, 2, Vicuna; tiktoken's text: Meta's Llama 3)
        or tokenizer.json (byte pairs: SmolLM2, Llama 3). Which of the two a tokenizer.model is, its
        first line tells."""
        dir = Path(dir)
        config = read_config(dir) if (dir / "config.json").is_file() else {}
        config = config.get("llm") or config.get("text_config") or config  # in a VLM's folder
        if (file := dir / "tokenizer.model").is_file():
            read = _tiktoken if re.match(rb"[A-Za-z0-9+/]+=* \d+\n",
                                         file.read_bytes()[:200]) else _sentencepiece
            return cls(file, *read(file, config))
        if (dir / "tokenizer.json").is_file():
            return cls(dir / "tokenizer.json", *_byte_level(dir / "tokenizer.json", config))
        raise UserError(f"{dir}: no tokenizer here (looked for tokenizer.model and tokenizer.json)")

    def __reduce__(self):         # for processes that are not forked: they read the file themselves
        return Tokenizer.from_pretrained, (self.file.parent,)

    def encode(self, text: str, bos: bool = False, continues: bool = False) -> list[int]:
        """Ids of a text. bos: put bos_id before them. continues: the text goes on after other ids.

        Sentencepiece puts a space before every text; one that continues has none: "USER:" after
        "</s>" is one word.
        """
        if bos and self.bos_id is None:
            raise UserError(f"{self.file}: this tokenizer has no bos token")
        return [self.bos_id] * bos + self._encode(text, continues)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, control ids left out. Bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """decode() piece by piece, as ids come in. A character of several ids comes out whole, with
        its last one."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        first = self._prefix_space
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise UserError(
                    f"{self.file}: there is no token {int(id)}, the vocabulary has {self.vocab_size}"
                )
            piece = self._pieces[id]
            if piece is None:
                continue
            # the space that encode put there
            text = decoder.decode(piece.removeprefix(b" ") if first else piece)
            first = False
            if text:
                yield text
        if rest := decoder.decode(b"", final=True):  # cut off in mid-character
            yield rest


def _ids(config: dict, key: str) -> list[int]:
    """config.json says nothing, one id or several."""
    value = config.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _sentencepiece(path: Path, config: dict):
    """Llama 1 and 2: everything Tokenizer wants of a tokenizer.model."""
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise UserError(f"{path}: neither a sentencepiece model nor tiktoken's text") from e
    n, newline = sp.vocab_size(), sp.encode("\n")
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
            raise UserError(
                f"{path}: merges a line break with what follows it, which Llama's tokenizer doesn't"
            )
        return ids[2:]

    eos_ids = {sp.eos_id(), *_ids(config, "eos_token_id")}
    pieces = []
    for id in range(n):
        piece = sp.id_to_piece(id)
        control = sp.is_control(id) or sp.is_unknown(id) or id in eos_ids
        # "<0x0A>" stands for one byte
        byte = bytes([int(piece[1:-1], 16)]) if sp.is_byte(id) else None
        pieces.append(None if control else byte or piece.replace("▁", " ").encode())
    return encode, pieces, sp.bos_id() if sp.bos_id() >= 0 else None, eos_ids, True


# Llama 3's 256 control tokens stand behind the byte pairs; these are the ones that matter here, by
# their place.
LLAMA3_BOS, LLAMA3_EOS = 0, (1, 8, 9)   # <|begin_of_text|>; <|end_of_text|>, <|eom_id|>, <|eot_id|>


def _tiktoken(path: Path, config: dict):
    """Meta's Llama 3: a tokenizer.model of lines "base64 rank", which is what tiktoken itself
    takes."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as e:
        raise UserError(
            f"{path}: not tiktoken's format, lines of a base64 token and its rank ({e})") from None
    n = len(lines)
    if sorted(ranks.values()) != list(range(n)) or any(
            bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(
            f"{path}: its {n} ranks should be 0 to {n - 1}, and every single byte should have one")
    bpe = tiktoken.Encoding(path.name, pat_str=LLAMA3, special_tokens={}, mergeable_ranks=ranks)
    pieces = sorted(ranks, key=ranks.get) + [None] * 256
    eos_ids = {n + place for place in LLAMA3_EOS} | set(_ids(config, "eos_token_id"))
    return (
        lambda text, continues: bpe.encode_ordinary(text)), pieces, n + LLAMA3_BOS, eos_ids, False


def _byte_alphabet() -> dict[str, int]:
    """GPT-2 writes bytes as visible characters: printable Latin-1 as itself, the other 68 from
    U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte
            for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _word_pattern(path: Path, spec: dict) -> str:
    """The regular expression that a tokenizer.json's normalizer, pre_tokenizer and model settings
    amount to."""
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers") or [
        spec.get("pre_tokenizer") or {}]
    *cuts, last = steps
    model, kinds = spec.get("model") or {}, [step.get("type") for step in steps]
    usual = (spec.get("normalizer") is None and model.get("type") == "BPE"
             and not model.get("byte_fallback") and not model.get("continuing_subword_prefix")
             and not model.get("end_of_word_suffix") and last.get("type") == "ByteLevel"
             and not last.get("add_prefix_space"))
    if usual and last.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and cuts[0].get("individual_digits"):
            return DIGITS
    elif usual and kinds == ["Split", "ByteLevel"] and cuts[0].get("pattern") == {"Regex": LLAMA3} \
            and cuts[0].get("behavior") == "Isolated" and not cuts[0].get("invert"):
        return LLAMA3
    raise UserError(
        f"{path}: not a byte-level BPE of a kind known here (GPT-2's, SmolLM2's, Llama 3's); a Llama 2 "
        "tokenizer needs its tokenizer.model")


def _byte_level(path: Path, config: dict):
    """SmolLM2, Llama 3: everything Tokenizer wants of a tokenizer.json. The merging is tiktoken's.

    tiktoken merges the pair whose product has the lowest rank; the file lists merges in order. So
    ranks follow the merges, and `table` leads from ranks to ids. A byte without an id (SmolLM2
    lacks 21, rare control characters and bytes that UTF-8 hardly uses) is left out, as by Hugging
    Face.
    """
    spec = read_json(path)
    pattern, alphabet, vocab = _word_pattern(path, spec), _byte_alphabet(), spec["model"]["vocab"]
    control = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    if plain := [
            token["content"] for token in spec.get("added_tokens", []) if not token["special"]]:
        raise UserError(
            f"{path}: added tokens that are not special are not implemented ({plain[0]!r})")

    def unescape(token: str) -> bytes:
        if strange := set(token) - set(alphabet):
            raise UserError(
                f"{path}: {min(strange)!r} in {token!r} is not a letter of the byte alphabet")
        return bytes(alphabet[char] for char in token)

    ids = {unescape(token): id for token, id in vocab.items() if token not in control}
    merges = [
        merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    order = [bytes([byte])
             for byte in range(256)] + [unescape(left + right) for left, right in merges]
    # Llama 3: any word that is in the vocabulary is one token
    if spec["model"].get("ignore_merges"):
        order += sorted(ids, key=ids.get)
    order = list(dict.fromkeys(order))  # several merges may have one product: the first counts
    if lost := [token for token in order[256:] if token not in ids]:
        raise UserError(f"{path}: a merge makes {lost[0]!r}, which is not in the vocabulary")
    bpe = tiktoken.Encoding(path.name, pat_str=pattern, special_tokens={},
                            mergeable_ranks={token: rank for rank, token in enumerate(order)})
    table = [ids.get(token) for token in order]

    def encode(text: str, continues: bool) -> list[int]:
        return [id for rank in bpe.encode_ordinary(text) if (id := table[rank]) is not None]

    beside = path.with_name("tokenizer_config.json")  # names control tokens by their text
    names = read_json(beside) if beside.is_file() else {}

    def control_ids(key: str) -> list[int]:
        name = names.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and name not in control:
            raise UserError(
                f"{beside}: {key} {name!r} is not among the added tokens of {path.name}")
        return ([] if name is None else [control[name]]) + _ids(config, key + "_id")

    bos, eos = control_ids("bos_token"), control_ids("eos_token")
    if not eos:
        raise UserError(
            f"{path}: neither tokenizer_config.json nor config.json beside it says which token ends a text"
        )
    pieces = [None] * (1 + max([*ids.values(), *control.values()]))
    for token, id in ids.items():
        if id not in eos:
            pieces[id] = token
    return encode, pieces, bos[0] if bos else None, set(eos), False
