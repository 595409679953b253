"""What stands beside a tokenizer's file: settings of its model, and tokens added to its
vocabulary."""
import re
from collections.abc import Callable
from pathlib import Path

from core.common import UserError, read_json
from core.fields import Id, Vocabulary, check, fits, shown
from core.folders import CONFIG_BYTES, JSON_BYTES, present, read_config


def settings_of(dir: Path) -> dict:
    """What config.json, or Meta's params.json, says of the language model's tokens."""
    params = dir / "params.json"
    if present(dir / "config.json"):
        config, where = read_config(dir), f"{dir}/config.json"
        config = config.get("llm") or config.get("text_config") or config      # in a VLM's folder
    else:
        config, where = read_json(params, most=CONFIG_BYTES) if present(params) else {}, params
        rows = config.get("vocab_size")
        config = {"vocab_size": None if rows == -1 else rows}
    if type(config) is not dict:
        raise UserError(f"{where}: the language model {shown(config)} should be an object")
    check(config, {"bos_token_id": Id | list[Id] | None, "eos_token_id": Id | list[Id] | None,
                   "vocab_size": Vocabulary | None}, where)
    return config


# The tokens that tokenizer_config.json and special_tokens_map.json name by what they are for
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE = ("additional_special_tokens", "extra_special_tokens")


def beside(path: Path, name: str) -> dict:
    """A json file beside a tokenizer's, if it is there."""
    file = path.with_name(name)
    return read_json(file, most=JSON_BYTES) if present(file) else {}


def text_of(token) -> str | None:
    """The text of a token, which may be an object that says more of it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def added_to(path: Path, own: Callable[[str], int | None]) -> dict[str, int]:
    """The control tokens that files beside the tokenizer's add to its vocabulary, {text: id}.

    own: the id of a text that is a token of the tokenizer's file, else None. Like its controls no
    text becomes these. UserError for an added token that is no control token: text would have to
    become it, as fine-tuning taught the model.
    """
    settings = beside(path, "tokenizer_config.json")
    special, found = set(), {}
    for names in (settings, beside(path, "special_tokens_map.json")):
        more = [names.get(key) or [] for key in MORE]
        listed = [token for some in more for token in (some.values() if isinstance(some, dict)
                                                       else some if isinstance(some, list) else [])]
        special |= {text_of(token) for token in [names.get(role) for role in ROLES] + listed}
    where = path.with_name("tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder") or {}
    check({"added_tokens_decoder": decoder}, {"added_tokens_decoder": dict[str, dict]}, where)
    for number, token in decoder.items():
        check(token, {"content": str, "special": bool | None}, f"{where}: {shown(number)}")
        found[token["content"]] = int(number) if re.fullmatch("[0-9]{1,9}", number) else None
        special |= {token["content"]} if token.get("special") else set()
    named = beside(path, "added_tokens.json")
    for text, id in [*found.items(), *named.items()]:
        where = path.with_name("added_tokens.json" if text in named else "tokenizer_config.json")
        known = own(text)
        if not fits(id, Id) or known not in (None, id) or found.get(text, id) != id:
            raise UserError(f"{where}: the id {shown(id)} of the token {shown(text)} is none, or "
                            "not the one that it has elsewhere")
        if known is None and text not in special:
            raise UserError(f"{where}: the added token {shown(text)} is not special, and added "
                            "tokens that stand for text are not implemented; take it out if the "
                            "model was never taught it")
        found[text] = id
    return {text: id for text, id in found.items() if own(text) is None}


def with_added(pieces: list[bytes | None], path: Path, added: dict[str, int]) -> list[bytes | None]:
    """The vocabulary with control tokens added behind it."""
    for text, id in added.items():
        if id < len(pieces) and pieces[id] is not None:
            raise UserError(f"{path.parent}: the added token {shown(text)} has the id {id}, which "
                            f"{path.name} gives to another one")
    return pieces + [None] * (max(added.values(), default=-1) + 1 - len(pieces))
