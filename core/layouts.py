"""The layouts of public models: what a folder holds, told from its config and its tensors, never
from its own name.

    layout        told by                           holds                    for example
    nanoccra      model_type nanoccra               vision fuser projector   what train.py writes
                                                    llm
    clip          model_type clip                   vision, CLIP's text      openai/clip-vit-large-patch14-336
    clip_vision_  model_type clip_vision_model      vision
      model
    llama         model_type llama                  llm                      lmsys/vicuna-7b-v1.5, SmolLM2, Llama-3.2-1B
    meta          params.json, no config.json       llm                      Meta's own downloads: consolidated.00.pth
    llava_hf      model_type llava, text_config     vision projector llm     llava-hf/llava-1.5-7b-hf
                  or vision_config
    llava         model_type llava or llava_llama,  projector llm            liuhaotian/llava-v1.5-7b
                  mm_projector_type

Two translations bring all of them to one form. The config of each part becomes the public config
that clip.py and llama.py read (`Folder.parts`); the name of each tensor becomes its place in our
modules (`Folder.rename`), so that `weights.load` can do the rest, which is strict. What a config
says and this project doesn't implement is a UserError.
"""
from pathlib import Path

import torch
from torch import Tensor, nn

from core import common, weights
from core.common import UserError
from core.meta import Meta
from core.weights import Tensors

# --------------------------------------------------------------------------------------------------
# Names. Of a layout's prefixes the longest that fits counts; the name's first word is the part that
# it belongs to.

CLIP_HEADS = ("visual_projection.", "text_projection.", "logit_scale")
NAMES = {
    "nanoccra": {part: part for part in ("vision.", "fuser.", "projector.", "llm.")},
    "clip": {"vision_model.": "vision.", "text_model.": "text."}
            | {head: head for head in CLIP_HEADS},
    # transformers 5 leaves the prefix out
    "clip_vision_model": {"vision_model.": "vision.", "": "vision."},
    "llama": {"model.": "llm.", "lm_head.": "llm.lm_head."},
    "meta": {
        "tok_embeddings.": "llm.embed_tokens.", "layers.": "llm.layers.", "norm.": "llm.norm.",
        "output.": "llm.lm_head."},
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
        "model.vision_tower.vision_tower.vision_model.": "vision."}, }
# Further in: a tower of CLIP has its layers and embeddings one level down; Meta calls a block's
# matrices by numbers.
TOWER = {
    "encoder.": "", "embeddings.position_embedding.weight": "position_embedding", "embeddings.": ""}
META = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
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
    # the first of several counts
    table = {own: public for public, own in reversed(NAMES["llava_hf"].items())}
    prefix = max((prefix for prefix in table if name.startswith(prefix)), key=len)
    rest = name[len(prefix):]
    return table[prefix] + (tower_name(rest) if prefix == "vision." else rest)


class Folder:
    """A model's folder, opened: .layout, .config (the file's), .parts (part -> its public config),
    .tensors."""

    def __init__(self, dir: str | Path):
        self.dir = Path(dir)
        self.where, self.pad = f"{self.dir}/config.json", True
        if (self.dir / "params.json").is_file() and not (self.dir / "config.json").is_file():
            self.layout, self.config = "meta", common.read_json(self.dir / "params.json")
            self.where = f"{self.dir}/params.json"
            self.tensors = Meta(self.dir, self.config)
            self.parts = {"llm": self.tensors.llama}
            return
        self.config = common.read_config(self.dir)
        self.layout = self._told()
        if self.layout == "llava_hf":
            self.parts, stored = llava_hf(self.config, self.where)
            self.tensors = Trimmed(self.dir, stored, self.parts["llm"]["vocab_size"])
            return
        self.tensors = Tensors(self.dir)
        if self.layout == "nanoccra":
            # "image" is about pictures, and has no tensors
            parts = ("vision", "fuser", "image", "llm")
            self.parts = {part: self.config[part] for part in parts if part in self.config}
        elif self.layout == "clip":        # old files hold a *_dict too, which transformers obeys
            self.parts = {
                part: self.config.get(f"{part}_config_dict") or self.config.get(f"{part}_config") or
                      {} for part in ("vision", "text")}
        elif self.layout == "llava":
            self.parts, self.pad = llava(self.config, self.where)
        else:
            self.parts = {"vision" if self.layout == "clip_vision_model" else "llm": self.config}

    def _told(self) -> str:
        kind = self.config.get("model_type")
        if kind in ("llava", "llava_llama"):
            if "mm_projector_type" in self.config:
                return "llava"
            if kind == "llava" and ("text_config" in self.config or "vision_config" in self.config):
                return "llava_hf"
            raise UserError(
                f"{self.where}: model_type {kind!r}, but neither mm_projector_type (liuhaotian's layout) "
                "nor text_config and vision_config (llava-hf's) are there")
        if kind in NAMES and kind not in ("meta", "llava_hf"):
            return kind
        raise UserError(
            f"{self.where}: model_type {kind!r} is none of those that can be read (nanoccra, clip, "
            "clip_vision_model, llama, llava, llava_llama)")

    def part(self, name: str) -> dict:
        """The public config of a part. UserError if this folder doesn't hold it."""
        if name not in self.parts:
            raise UserError(
                f"{self.where}: model_type {self.config.get('model_type')!r}, and no {name!r} in this "
                f"folder (it has {', '.join(self.parts)})")
        if not isinstance(self.parts[name], dict):
            raise UserError(
                f"{self.where}: {name!r} should be a JSON object, not {self.parts[name]!r}")
        return self.parts[name]

    def rename(self, public: str) -> str | None:
        """A tensor's public name -> its name in a module that holds all the parts, such as
        "llm.norm.weight"."""
        table = NAMES[self.layout]
        prefix = max((prefix for prefix in table if public.startswith(prefix)), key=len,
                     default=None)
        if prefix is None:
            return None
        name = table[prefix] + public[len(prefix):]
        part, _, rest = name.partition(".")
        if part in ("vision", "text") and self.layout != "nanoccra":
            inner = next((inner for inner in TOWER if rest.startswith(inner)), None)
            return name if inner is None else f"{part}.{TOWER[inner]}{rest[len(inner):]}"
        if self.layout == "meta":
            for theirs, ours in META.items():
                name = name.replace(f".{theirs}.", f".{ours}.")
        return name

    def holds(self, part: str) -> bool:
        """Whether any tensor belongs to this part."""
        return any((self.rename(public) or "").startswith(part + ".") for public in self.tensors)

    def fill(self, module: nn.Module, part: str | None = None, dtype=None,
             device=None) -> nn.Module:
        """`weights.load` a part into the module that it is, or everything into one that has the
        parts as attributes."""
        unneeded = [*BUFFERS, *self._spare_head()]
        if part is None:
            return weights.load(module, self.tensors, self.rename, tuple(unneeded), dtype, device)
        unneeded += [
            f"{public}*" for public, own in NAMES[self.layout].items()
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
            raise UserError(
                f"{self.tensors.file(head)}: {head} differs from {embed}, but config.json's "
                "tie_word_embeddings says they are one")
        return [head] if head and embed else []


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
# (What is left out of a vision_config is as in CLIPVisionConfig: clip.py knows. All of it is as
# here.)
LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32}
CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14}


def require(config: dict, where: str, table: dict[str, tuple]) -> None:
    for key, fine in table.items():
        if config.get(key) not in fine:
            raise UserError(
                f"{where}: {key} is {config.get(key)!r}; only LLaVA-1.5's {fine[0]!r} is implemented"
            )


def llava_hf(config: dict, where: str) -> tuple[dict[str, dict], int]:
    """(parts, rows of the vocabulary as stored) of a llava-hf config.

    Its vocabulary has 64 rows more than Vicuna's: <image>, <pad>, and padding to a multiple of 64.
    We need neither: the picture's place is IMAGE_TOKEN, and padding is masked. The image token is
    the first of them: its id is how many to keep.
    """
    require(config, where, LLAVA_HF)
    text, vision = config.get("text_config"), config.get("vision_config")
    text, vision = {} if text is None else text, CLIP_L_336 if vision is None else vision
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError(f"{where}: text_config and vision_config should be JSON objects")
    require(vision, f"{where}: vision_config", {"model_type": ("clip_vision_model", None)})
    text = {**LLAMA_7B, **text}
    stored, image = text["vocab_size"], config.get("image_token_index",
                                                   config.get("image_token_id"))
    if type(image) is not int or type(
            stored) is not int or not 0 <= stored - image <= 65 or image < 1:
        raise UserError(
            f"{where}: image_token_index is {image!r}; it should be the first of the at most 65 tokens "
            f"that LLaVA added at the end of a vocabulary of {stored!r}")
    text |= {
        "vocab_size": image, "tie_word_embeddings": bool(
            text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))}
    return {"vision": vision, "projector": {}, "llm": text}, stored


class Trimmed(Tensors):
    """llava-hf's tensors without the tokens that were added to the vocabulary: the first `keep` of
    `stored` rows."""

    def __init__(self, dir: Path, stored: int, keep: int):
        super().__init__(dir)
        self.stored, self.keep = stored, keep

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        vocabulary = name.endswith(
            ("embed_tokens.weight", "lm_head.weight")) and len(tensor) == self.stored
        return tensor[:self.keep] if vocabulary else tensor


def llava(config: dict, where: str) -> tuple[dict[str, dict], bool]:
    """(parts, whether pictures are padded) of a liuhaotian config: a Llama's, and beside it mm_*
    keys. No vision tower: mm_vision_tower names the CLIP that belongs to it."""
    require(config, where, LLAVA)
    return {"projector": {},
            "llm": {**config, "model_type": "llama"}}, config.get("image_aspect_ratio") == "pad"
