"""The layouts of public models: what a folder holds, told from its config and its tensors, never
from its own name.

    layout              for example                         holds
    nanoccra            what train.py writes                vision fuser projector llm
    clip                openai/clip-vit-large-patch14-336   vision, CLIP's text
    clip_vision_model   a tower of CLIP alone               vision
    llama               lmsys/vicuna-7b-v1.5, SmolLM2       llm
    meta                Meta's own downloads of Llama       llm
    llava_hf            llava-hf/llava-1.5-7b-hf            vision projector llm
    llava               liuhaotian/llava-v1.5-7b            projector llm

config.json's model_type tells the layout. Where it is llava, text_config or vision_config tell
llava_hf, mm_projector_type tells llava (or model_type llava_llama); and meta has params.json, and
no config.json.

Two translations bring all of them to one form. The config of each part becomes the public config
that clip.py and llama.py read (`Folder.parts`); the name of each tensor becomes its place in our
modules (`Folder.rename`), so that `weights.load` can do the rest, which is strict. What a config
says and this project doesn't implement is a UserError.
"""
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor, nn

from core import weights
from core.common import UserError, read_json
from core.fields import Scale, shown
from core.folders import CONFIG_BYTES, check_folder, present, read_config
from core.meta import Meta
from core.weights import Tensors

# --------------------------------------------------------------------------------------------------
# Names. Of a layout's prefixes the longest that fits counts; the name's first word is the part that
# it belongs to.

CLIP_HEADS = ("visual_projection.", "text_projection.", "logit_scale")
NAMES = {
    "nanoccra": {part: part for part in ("vision.", "fuser.", "projector.", "llm.")},
    "clip": {"vision_model.": "vision.", "text_model.": "text.",
             **{head: head for head in CLIP_HEADS}},
    # transformers 5 leaves the prefix out
    "clip_vision_model": {"vision_model.": "vision.", "": "vision."},
    "llama": {"model.": "llm.", "lm_head.": "llm.lm_head."},
    "meta": {"tok_embeddings.": "llm.embed_tokens.", "layers.": "llm.layers.",
             "norm.": "llm.norm.", "output.": "llm.lm_head."},
    "llava_hf": {
        # as on the hub, and as transformers still writes them
        "language_model.model.": "llm.",
        "language_model.lm_head.": "llm.lm_head.",
        "vision_tower.vision_model.": "vision.",
        "multi_modal_projector.linear_1.": "projector.0.",
        "multi_modal_projector.linear_2.": "projector.2.",
        # as they are in memory since transformers 4.52
        "model.language_model.": "llm.",
        "lm_head.": "llm.lm_head.",
        "model.vision_tower.vision_model.": "vision.",
        "model.multi_modal_projector.linear_1.": "projector.0.",
        "model.multi_modal_projector.linear_2.": "projector.2.",
        # and flattened, by transformers 5
        "vision_tower.": "vision.",
        "model.vision_tower.": "vision."},
    "llava": {
        "model.": "llm.",
        "lm_head.": "llm.lm_head.",
        "model.mm_projector.": "projector.",
        # the last in some fine-tunes only
        "model.vision_tower.vision_tower.vision_model.": "vision."},
}
# Further in: a tower of CLIP has its layers and embeddings one level down; Meta calls a block's
# matrices by numbers.
TOWER = {"encoder.": "", "embeddings.position_embedding.weight": "position_embedding",
         "embeddings.": ""}
META = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm"}
# Numbers that follow from the config and that some files hold all the same.
BUFFERS = ("*.position_ids", "*.rotary_emb.inv_freq", "rope.freqs")


def tower_name(name: str) -> str:
    """TOWER backwards: a tensor's name in one of our towers of CLIP -> the public one (without
    vision_model.)."""
    if name.startswith("layers."):
        return f"encoder.{name}"
    if "_embedding" in name:
        return f"embeddings.{name}" + (".weight" if name == "position_embedding" else "")
    return name


def llava_hf_name(name: str) -> str:
    """A tensor's name in a VLM -> the one it has in llava-hf's folders on the hub."""
    table = {own: public for public, own in reversed(NAMES["llava_hf"].items())}  # the first counts
    prefix = max((prefix for prefix in table if name.startswith(prefix)), key=len)
    rest = name[len(prefix):]
    return table[prefix] + (tower_name(rest) if prefix == "vision." else rest)


def own_name(layout: str, public: str) -> str | None:
    """A tensor's public name in a layout -> its name in a module that holds all the parts, such as
    "llm.norm.weight"; None for a name that this layout doesn't have."""
    table = NAMES[layout]
    fitting = [prefix for prefix in table if public.startswith(prefix)]
    if not fitting:
        return None
    prefix = max(fitting, key=len)
    name = table[prefix] + public[len(prefix):]
    part, _, rest = name.partition(".")
    if part in ("vision", "text") and layout != "nanoccra":
        for theirs, ours in TOWER.items():
            if rest.startswith(theirs):
                return f"{part}.{ours}{rest.removeprefix(theirs)}"
    if layout == "meta":
        for theirs, ours in META.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
    return name


class Folder:
    """A model's folder, opened.

    .layout, .config (the file's), .parts (part -> its public config), .tensors, .pad (whether the
    model sees pictures padded to a square; cropped, if not).
    """

    def __init__(self, dir: str | Path):
        self.dir, self.pad = Path(dir), True
        self.where = f"{self.dir}/config.json"
        check_folder(self.dir)
        if not present(self.dir / "config.json") and present(self.dir / "params.json"):
            self.layout = "meta"
            self.where = f"{self.dir}/params.json"
            self.config = read_json(self.dir / "params.json", most=CONFIG_BYTES)
            self.tensors = Meta(self.dir, self.config)
            self.parts = {"llm": self.tensors.llama}
            return
        self.config = read_config(self.dir)
        self.layout = self._told()
        if self.layout == "llava_hf":
            self.parts, stored = llava_hf(self.config, self.where)
            self.tensors = Trimmed(self.dir, stored, self.parts["llm"]["vocab_size"])
            return
        self.tensors = Tensors(self.dir)
        if self.layout == "nanoccra":              # "image" is about pictures, and has no tensors
            parts = ("vision", "fuser", "image", "llm")
            self.parts = {part: self.config[part] for part in parts if part in self.config}
        elif self.layout == "clip":        # old files hold a *_dict too, which transformers obeys
            self.parts = {part: self.config.get(f"{part}_config_dict")
                          or self.config.get(f"{part}_config") or {} for part in ("vision", "text")}
        elif self.layout == "llava":
            self.parts, self.pad = llava(self.config, self.where)
        else:
            self.parts = {"vision" if self.layout == "clip_vision_model" else "llm": self.config}

    def _told(self) -> str:
        kind = self.config.get("model_type")
        if not isinstance(kind, str):
            raise UserError(f"{self.where}: model_type {shown(kind)} is not the name of a model")
        if kind in ("llava", "llava_llama"):
            if "mm_projector_type" in self.config:
                return "llava"
            if kind == "llava" and ("text_config" in self.config or "vision_config" in self.config):
                return "llava_hf"
            raise UserError(f"{self.where}: model_type {kind!r}, but neither mm_projector_type "
                            "(liuhaotian's layout) nor text_config and vision_config (llava-hf's) "
                            "are there")
        if kind in NAMES and kind not in ("meta", "llava_hf"):
            return kind
        raise UserError(f"{self.where}: model_type {shown(kind)} is none of those that can be read "
                        "(nanoccra, clip, clip_vision_model, llama, llava, llava_llama)")

    def part(self, name: str) -> dict:
        """The public config of a part. UserError if this folder doesn't hold it."""
        if name not in self.parts:
            raise UserError(f"{self.where}: model_type {self.config.get('model_type')!r}, and no "
                            f"{name!r} in this folder (it has {', '.join(self.parts)})")
        if not isinstance(self.parts[name], dict):
            raise UserError(f"{self.where}: {name!r} should be a JSON object, "
                            f"not {shown(self.parts[name])}")
        return self.parts[name]

    def rename(self, public: str) -> str | None:
        """`own_name` of this folder's layout."""
        return own_name(self.layout, public)

    def needed(self) -> dict[str, str]:
        """Own name -> public name of all tensors that a module of all the parts is made of."""
        spare = (*BUFFERS, *self._spare_head())
        named = {self.rename(public): public for public in self.tensors
                 if not any(fnmatchcase(public, pattern) for pattern in spare)}
        return {own: public for own, public in named.items() if own is not None}

    def holds(self, part: str) -> bool:
        """Whether any tensor belongs to this part."""
        return any((self.rename(public) or "").startswith(part + ".") for public in self.tensors)

    def fill(self, module: nn.Module, part: str | None = None, dtype: torch.dtype | None = None,
             device: str | torch.device | None = None) -> nn.Module:
        """`weights.load` a part into the module that it is, or everything into one that has the
        parts as attributes. Returns the module."""
        unneeded = [*BUFFERS, *self._spare_head()]
        if part is None:
            return weights.load(module, self.tensors, self.rename, tuple(unneeded), dtype, device)
        unneeded += [f"{public}*" for public, own in NAMES[self.layout].items()
                     if not own.startswith(part + ".")]

        def rename(public: str) -> str | None:
            name = self.rename(public)
            return name.removeprefix(part + ".") if name and name.startswith(part + ".") else None

        return weights.load(module, self.tensors, rename, tuple(unneeded), dtype, device)

    def _spare_head(self) -> list[str]:
        """Where the output matrix is the embedding (tied), some files hold it twice. A true copy is
        spare."""
        llm = self.parts.get("llm")
        if not isinstance(llm, dict) or not llm.get("tie_word_embeddings"):
            return []
        names = {self.rename(public): public for public in self.tensors}
        head, embed = names.get("llm.lm_head.weight"), names.get("llm.embed_tokens.weight")
        if head and embed and not torch.equal(self.tensors[head], self.tensors[embed]):
            raise UserError(f"{self.tensors.file(head)}: {head} differs from {embed}, but "
                            "config.json's tie_word_embeddings says they are one")
        return [head] if head and embed else []


# --------------------------------------------------------------------------------------------------
# Llama's positions

FORMS = ("rope_scaling", "rope_parameters")         # where settings of RoPE stand
ROPE_FIXED = {"partial_rotary_factor": (1, None), "rope_interleaved": (False, None)}
LLAMA3_ROPE = {"factor": Scale, "low_freq_factor": Scale, "high_freq_factor": Scale,
               "original_max_position_embeddings": Scale}


def rope_of(d: dict, where: str) -> dict:
    """A public config's rope_theta and rope_scaling. Transformers 5 keeps both in rope_parameters;
    before, rope_scaling held the latter. UserError for any rope setting that isn't known here."""
    rope = {}
    alone = {key: d[key] for key in d if ("rope" in key or "rotary" in key) and key not in FORMS}
    for form, given in (("", alone), *((f"{form}: ", d.get(form)) for form in FORMS)):
        if type(given) not in (dict, NoneType):
            raise UserError(f"{where}: {form}{shown(given)} should be an object")
        for key, value in (given or {}).items():
            key = "rope_type" if key == "type" else key
            if key not in ("rope_theta", "rope_type", *LLAMA3_ROPE, *ROPE_FIXED):
                raise UserError(f"{where}: {form}{shown(key)} is not implemented")
            if rope.setdefault(key, value) != value or value not in ROPE_FIXED.get(key, (value,)):
                raise UserError(f"{where}: {form}{key} is {shown(value)}, which is not implemented "
                                f"or not what stands elsewhere ({shown(rope[key])})")
    kind = rope.get("rope_type", "default")
    scaling = {key: rope.get(key) for key in LLAMA3_ROPE}
    if kind not in ("default", "llama3") or (kind == "default" and rope.keys() & scaling.keys()):
        raise UserError(f"{where}: rope_type {shown(kind)} is not implemented with these settings "
                        "(only 'default', with none, and 'llama3' are)")
    return {"rope_theta": rope.get("rope_theta", 10000.0),
            "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling}}


# --------------------------------------------------------------------------------------------------
# LLaVA-1.5, twice

# What LLaVA-1.5 is, in the words of either layout. None stands where transformers, or LLaVA, takes
# that for granted.
LLAVA_HF = {"vision_feature_layer": (-2, None), "vision_feature_select_strategy": ("default", None),
            "projector_hidden_act": ("gelu", None), "multimodal_projector_bias": (True, None),
            "quantization_config": (None,)}
LLAVA = {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_layer": (-2,),
         "mm_vision_select_feature": ("patch", None), "mm_use_im_start_end": (False, None),
         "mm_use_im_patch_token": (False,), "mm_patch_merge_type": ("flat", None),
         "image_aspect_ratio": ("pad", "square", None)}
# llava-hf's config.json leaves out what is as in transformers' LlamaConfig, which is LLaMA-7B.
LLAMA_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
# If all of a vision_config is left out, it is this. (If a part is, clip.py knows the rest.)
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 336, "patch_size": 14}


def require(config: dict, where: str, table: dict[str, tuple]) -> None:
    """UserError unless each of the table's keys has one of its values."""
    for key, fine in table.items():
        if config.get(key) not in fine:
            raise UserError(f"{where}: {key} is {shown(config.get(key))}; only LLaVA-1.5's "
                            f"{fine[0]!r} is implemented")


def llava_hf(config: dict, where: str) -> tuple[dict[str, dict], int]:
    """(parts, rows of the vocabulary as stored) of a llava-hf config.

    Its vocabulary has 64 rows more than Vicuna's: <image>, <pad>, and padding to a multiple of 64.
    We need neither: the picture's place is IMAGE_TOKEN, and padding is masked. The image token is
    the first of them: its id is how many to keep.
    """
    require(config, where, LLAVA_HF)
    text, vision = config.get("text_config"), config.get("vision_config")
    text = {} if text is None else text
    vision = CLIP_L_336 if vision is None else vision
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError(f"{where}: text_config and vision_config should be JSON objects")
    require(vision, f"{where}: vision_config", {"model_type": ("clip_vision_model", None)})
    text = {**LLAMA_7B, **text}
    stored = text["vocab_size"]
    image = config.get("image_token_index", config.get("image_token_id"))
    numbers = type(image) is int and type(stored) is int
    if not numbers or not 0 <= stored - image <= 65 or image < 1:
        raise UserError(f"{where}: image_token_index is {shown(image)}; it should be the first of "
                        "the at most 65 tokens that LLaVA added at the end of a vocabulary of "
                        f"{shown(stored)}")
    tied = text.get("tie_word_embeddings") or config.get("tie_word_embeddings")
    text |= {"vocab_size": image, "tie_word_embeddings": bool(tied)}
    return {"vision": vision, "projector": {}, "llm": text}, stored


class Trimmed(Tensors):
    """llava-hf's tensors without the tokens that were added to the vocabulary: the first `keep` of
    `stored` rows."""

    def __init__(self, dir: Path, stored: int, keep: int):
        super().__init__(dir)
        self.stored, self.keep = stored, keep

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and len(tensor) == self.stored:
            return tensor[:self.keep]
        return tensor


def llava(config: dict, where: str) -> tuple[dict[str, dict], bool]:
    """(parts, whether pictures are padded) of a liuhaotian config: a Llama's, and beside it mm_*
    keys. No vision tower: mm_vision_tower names the CLIP that belongs to it."""
    require(config, where, LLAVA)
    parts = {"projector": {}, "llm": {**config, "model_type": "llama"}}
    return parts, config.get("image_aspect_ratio") == "pad"


# --------------------------------------------------------------------------------------------------
# Vision-language models

def open_vlm(dir: str | Path, vision: str | Path | None) -> tuple[Folder, Folder | None]:
    """A vision-language model's folder, and its picture tower's if that lies elsewhere: `vision`,
    for liuhaotian's layout alone. UserError for what isn't one."""
    folder = Folder(dir)
    if folder.layout not in ("nanoccra", "llava", "llava_hf"):
        raise UserError(f"{folder.where}: model_type {folder.config.get('model_type')!r} is not a "
                        "vision-language model (train.py --vision --llm makes one of its two "
                        "halves)")
    if vision is not None and folder.layout != "llava":
        raise UserError(f"{folder.dir}: holds a vision tower of its own, so none is needed from "
                        f"{vision}")
    if vision is None and folder.layout == "llava":
        raise UserError(f"{folder.dir}: has no vision tower; download "
                        f"{folder.config.get('mm_vision_tower')} and give its folder, too: "
                        "--vision DIR")
    return folder, None if vision is None else Folder(vision)


def fill_vlm(model: nn.Module, folder: Folder, tower: Folder | None,
             dtype: torch.dtype | None = None,
             device: str | torch.device | None = None) -> nn.Module:
    """The model, built from the configs of `open_vlm`'s folders, with their weights in it."""
    if folder.parts.get("image", model.image) != model.image:
        raise UserError(f"{folder.dir}: config.json says image {shown(folder.part('image'))}, its "
                        f"tower takes {model.image}")
    d = model.vision.config.hidden_size
    width = folder.config.get("mm_hidden_size", d)
    if width != d:
        raise UserError(f"{(tower or folder).dir}: a tower {d} wide, but {folder.where} says "
                        f"mm_hidden_size {shown(width)}; it wants "
                        f"{shown(folder.config.get('mm_vision_tower'))}")
    if tower is not None and not folder.holds("vision"):     # some fine-tunes hold their own
        tower.fill(model.vision, "vision", dtype, device)
    return folder.fill(model, dtype=dtype, device=device)
