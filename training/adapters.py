"""Adapters: what a run learnt beside a base that it left as it is, a folder of megabytes.

    adapter_config.json, adapter_model.safetensors    LoRA, as PEFT writes and reads it
    fuser.safetensors                                 fuser and projector, in float32
    nanoccra.json                                     what they are, and which base they belong to

Names in the first are those of transformers 5's LLaVA, so transformers and peft load the LoRA of a
plain LLaVA. A folder that PEFT alone wrote is taken, too: the first two files, with the names of
either transformers. Whatever of an adapter isn't understood is a UserError, as is another base.
"""
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusers
from ccra import FUSERS, VLM, outline
from core import fields, weights
from core.common import UserError, discard, make_folder, read_json, write_json
from core.distributed import note
from core.fields import Scale, Width, shown
from core.folders import CONFIG_BYTES, check_folder, present
from core.layouts import open_vlm, own_name
from core.weights import FLOATS, OneFile, Tensors, listed, write_tensors
from data import QUERIES
from training import digests, lora
from training.lora import MATRICES, LoRALinear

CONFIG, THIN = "adapter_config.json", "adapter_model.safetensors"
BETWEEN, ABOUT = "fuser.safetensors", "nanoccra.json"
FILES = (ABOUT, BETWEEN, CONFIG, THIN)
KIND = "nanoccra adapter"
PREFIX = "base_model.model."                # what peft puts before a module's name
LLM = "model.language_model."               # where transformers 5's LLaVA has its language model


@dataclass
class Adapter:
    """An adapter's folder, read. Nothing in it is held against a base yet."""
    dir: Path
    pairs: dict[str, tuple[Tensor, Tensor]]     # own name of a weight -> its A (r, in), B (out, r)
    lora: dict | None                           # adapter_config.json
    between: Tensors | None                     # fuser.safetensors
    about: dict | None                          # nanoccra.json; None: PEFT's alone

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.lora["lora_alpha"] / self.lora["r"]


# --------------------------------------------------------------------------------------------------
# Reading

FIELDS = {"format": Annotated[str, (KIND, )], "fuser": dict | None,
          "query": Annotated[str, QUERIES], "image": dict, "lora": dict | None, "base": dict}
IMAGE = {"size": Annotated[int, fields.Range(1, 2 ** 14)], "pad": bool}
BASE = {"path": str, "sha256": dict[str, str], "fingerprint": dict[str, str]}
PEFT = {"peft_type": Annotated[str, ("LORA", )], "r": Width, "lora_alpha": Scale,
        "target_modules": str | list[str], "bias": Annotated[str, ("none", )] | None}
# What PEFT's config may say besides, as it changes nothing here: about dropout, about how it came
# to be, which modules (the tensors tell), sizes of what is switched off
FREE = ("auto_mapping", "base_model_name_or_path", "ephemeral_gpu_offload", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type")
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")    # others change the base as well
# What people have instead: the file tells
INSTEAD = {
    "non_lora_trainables.bin": "an adapter whose projector lies apart, in a pickle, as LLaVA's "
                               "scripts write it; merge it with their merge_lora_weights.py, and "
                               "give that folder as --model",
    "adapter_model.bin": "a pickled adapter; let peft write it as safetensors (PeftModel."
                         "from_pretrained, then save_pretrained)",
    "config.json": "a model's folder, not an adapter's; give it as --model alone"}


def read(dir: str | Path) -> Adapter:
    """An adapter's folder. UserError for what isn't one, or isn't whole, and for kinds of LoRA that
    aren't implemented."""
    dir = Path(dir)
    check_folder(dir)
    there = {name for name in FILES if present(dir / name)}
    about = read_about(dir / ABOUT) if ABOUT in there else None
    check_whole(dir, there, about)
    config = read_peft(dir / CONFIG) if CONFIG in there else None
    if about and config:
        said = about["lora"]
        if (said.get("r"), said.get("alpha")) != (config["r"], config["lora_alpha"]):
            raise UserError(f"{dir / CONFIG}: r {config['r']} and lora_alpha "
                            f"{config['lora_alpha']:g} aren't those of {ABOUT}")
    return Adapter(dir, read_pairs(dir / THIN) if config else {}, config,
                   OneFile(dir / BETWEEN) if BETWEEN in there else None, about)


def check_whole(dir: Path, there: set[str], about: dict | None) -> None:
    """UserError unless the files that are there belong together. about: nanoccra.json, which says
    which; without it they are PEFT's two."""
    if not about and not {CONFIG, THIN} <= there:
        for name, what in INSTEAD.items():
            if (dir / name).exists():
                raise UserError(f"{dir}: {what}")
        if not there:
            raise UserError(f"{dir}: holds no adapter (looked for {CONFIG} with {THIN}, and "
                            f"{ABOUT} with {BETWEEN})")
    wanted = {CONFIG, THIN} if not about or about["lora"] else set()
    wanted |= {BETWEEN} if about and about["fuser"] else set()
    for name in FILES[1:]:
        if (name in there) != (name in wanted):
            what = "is missing" if name in wanted else "doesn't belong to what else is there"
            raise UserError(f"{dir / name}: {what}: this adapter isn't whole, so write or copy it "
                            "again")


def read_about(file: Path) -> dict:
    """nanoccra.json, checked."""
    about = read_json(file, most=CONFIG_BYTES)
    fields.check(about, FIELDS, str(file))
    fields.check(about["image"], IMAGE, f"{file}: image")
    fields.check(about["base"], BASE, f"{file}: base")
    return {key: about.get(key) for key in FIELDS}               # what may be null may be left out


def read_peft(file: Path) -> dict:
    """adapter_config.json, checked: plain LoRA, one rank and one alpha for all."""
    config = read_json(file, most=CONFIG_BYTES)
    fields.check(config, PEFT, str(file))
    for key, value in config.items():
        known = key in PEFT or key in FREE or key == "init_lora_weights" and value in STARTS
        if not known and value not in (None, False, {}, [], ""):
            raise UserError(f"{file}: {shown(key)[1:-1]} = {shown(value)} is not implemented: only "
                            "plain LoRA is, of one rank for all matrices")
    return config


def read_pairs(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every matrix, by our own name of its weight, mapped. UserError for other tensors,
    and for one without the other."""
    tensors, found = OneFile(file), {}
    unknown, unlike = [], []
    for public in tensors:
        module, _, which = public.removeprefix(PREFIX).partition(".lora_")
        own = own_name("llava_hf", f"{module}.weight") or own_name("llava", f"{module}.weight")
        known = public.startswith(PREFIX) and which in ("A.weight", "B.weight") and own
        if not known or which[0] in found.get(own, {}):          # under two spellings, say
            unknown.append(public)
        elif tensors.dtype(public) not in FLOATS:
            unlike.append(f"{public} is {tensors.dtype(public)}")
        else:
            found.setdefault(own, {})[which[0]] = tensors[public]
    missing = [f"lora_{which} of {own}" for own, pair in found.items() for which in "AB"
               if which not in pair]
    if faults := listed(missing=missing, unknown=unknown, unlike=unlike):
        raise UserError(f"{file}: not LoRA of a LLaVA as PEFT writes it: {faults}")
    if not found:
        raise UserError(f"{file}: holds no tensors")
    return {own: (pair["A"], pair["B"]) for own, pair in found.items()}


# --------------------------------------------------------------------------------------------------
# Is it this base's?

def check_base(adapter: Adapter, dir: str | Path, vision: str | Path | None,
               whole: bool = False) -> None:
    """UserError, naming what differs, unless the adapter was trained on the base in dir. Of a base
    only what the adapter doesn't replace has to be the same.

    whole: by all of its bytes, not by a few pieces of each tensor. An adapter of PEFT's doesn't
    know its base: that is said.
    """
    if adapter.about is None:
        named = shown(adapter.lora.get("base_model_name_or_path"))
        return note(f"{adapter.dir}: whether {dir} is the base that this adapter was trained on "
                    f"can't be checked; {CONFIG} names {named}")
    base = adapter.about["base"]
    was = base["sha256" if whole else "fingerprint"]
    now = digests.sha256(dir, vision) if whole else digests.fingerprint(dir, vision)
    parts = ["picture tower", "language model", "configuration", "tokenizer"]
    if adapter.between is None:
        parts += ["kind of fuser", "fuser", "projector"]
    if other := [part for part in parts if was.get(part) != now.get(part)]:
        raise UserError(f"{adapter.dir}: belongs to another base than {dir}, whose "
                        f"{' and '.join(other)} differ{'s' * (len(other) == 1)}; it was trained on "
                        f"{base['path']}")


def matrices(model: VLM) -> dict[str, nn.Linear]:
    """{name of its weight: layer} of all matrices that LoRA may lie beside."""
    found = {f"{name}.weight": layer for name, layer in model.named_modules()
             if isinstance(layer, nn.Linear)}
    if model.llm.config.tie_word_embeddings:     # the embeddings would change with it
        found.pop("llm.lm_head.weight", None)
    return found


def expected(adapter: Adapter, there: Collection[str]) -> set[str]:
    """Which of a model's matrices have to have LoRA: ours has it beside all seven of every block;
    PEFT's beside all of these names, in the towers that it touches at all."""
    targets = adapter.lora["target_modules"]
    if adapter.about:
        towers, targets = {"llm"}, MATRICES
    elif isinstance(targets, str) or adapter.lora.get("layers_to_transform") is not None \
            or adapter.lora.get("exclude_modules") or any("." in name for name in targets):
        return set()                             # a pattern, or single layers
    else:
        towers = {own.partition(".")[0] for own in adapter.pairs} & {"llm", "vision"}
    return {own for own in there
            if own.partition(".")[0] in towers and own.split(".")[-2] in targets}


def fit(adapter: Adapter, model: VLM, base: str | Path = "this base") -> None:
    """UserError unless an adapter's pictures are those of a model, which may be on meta, and all of
    its LoRA has its place there."""
    if adapter.about and adapter.about["image"]["size"] != model.image["size"]:
        raise UserError(f"{adapter.dir / ABOUT}: for pictures of {adapter.about['image']['size']} "
                        f"pixels, {base} takes {model.image['size']}")
    if adapter.lora is None:
        return
    there, r = matrices(model), adapter.lora["r"]
    unknown = [own for own in adapter.pairs if own not in there]
    missing = sorted(expected(adapter, there) - adapter.pairs.keys())
    misshapen = []
    for own in adapter.pairs.keys() - set(unknown):
        out, width = there[own].weight.shape
        for which, thin, need in zip("AB", adapter.pairs[own], ((r, width), (out, r))):
            if thin.shape != need:
                misshapen.append(f"lora_{which} of {own} is {tuple(thin.shape)}, needed {need}")
        if r > min(out, width):
            raise UserError(f"{adapter.dir / CONFIG}: r = {r} is larger than {own}, which is "
                            f"{out} x {width}")
    if faults := listed(missing=missing, unknown=unknown, misshapen=sorted(misshapen)):
        raise UserError(f"{adapter.dir / THIN}: this LoRA doesn't fit {base}: {faults}")


# --------------------------------------------------------------------------------------------------
# Put into its base

class FuserAndProjector(nn.Module):
    """What fuser.safetensors holds."""

    def __init__(self, model: VLM):
        super().__init__()
        self.fuser, self.projector = model.fuser, model.projector


def rebuilt(adapter: Adapter, model: VLM) -> VLM:
    """The towers of a model with the adapter's fuser and projector between them, as stored.
    UserError unless these fit."""
    about, where = adapter.about, f"{adapter.dir / ABOUT}"
    config = fusers.read_config(about["fuser"], FUSERS, where)
    try:
        with weights.skeleton():
            new = VLM.build(model.vision, model.llm, config, query=about["query"])
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    weights.load(FuserAndProjector(new), adapter.between, str)
    return new.train(model.training)


def put(model: VLM, adapter: Adapter | str | Path) -> VLM:
    """A base with an adapter in it: LoRA folded into the weights, in place, and the adapter's fuser
    and projector, in the number format that the base's projector has. Which base it is isn't
    checked (`load`). UserError unless everything fits."""
    adapter = adapter if isinstance(adapter, Adapter) else read(adapter)
    fit(adapter, model)
    new, like, there = model, model.projector[0].weight, matrices(model)
    if adapter.between is not None:
        new = rebuilt(adapter, model)
        for part in (new.fuser, new.projector):
            part.to(like.device, like.dtype)
    if adapter.about:
        new.query, new.image = adapter.about["query"], dict(adapter.about["image"])
    for own, (A, B) in tqdm(adapter.pairs.items(), desc="merging LoRA", disable=None, leave=False):
        lora.fold(there[own].weight, A, B, adapter.scale)
    return new


def load(dir: str | Path, adapter: str | Path | None = None, vision: str | Path | None = None,
         dtype: torch.dtype | None = None, device: torch.device | str | None = None,
         whole: bool = False) -> VLM:
    """VLM.from_pretrained(dir, ...), with an adapter in it, if there is one, that was trained on
    this base. UserError, before the weights are read, if it is another's or doesn't fit. whole: see
    `check_base`."""
    if adapter is None:
        return VLM.from_pretrained(dir, dtype, device, vision)
    held = read(adapter)
    check_base(held, dir, vision)
    towers = outline(*open_vlm(dir, vision))
    fit(held, towers, dir)
    if held.between is not None:
        rebuilt(held, towers)
    if whole and held.about:
        check_base(held, dir, vision, whole=True)
    return put(VLM.from_pretrained(dir, dtype, device, vision), held)


def option(g) -> None:
    """--adapter, of an argparse group: beside --model."""
    g.add_argument("--adapter", metavar="DIR", help="what train.py learnt beside this model: LoRA, "
                   "a fuser with its projector, or LoRA of PEFT's")


def files(dir: str | Path) -> list[Path]:
    """Those that an adapter consists of."""
    return [Path(dir, name) for name in FILES if Path(dir, name).exists()]


# --------------------------------------------------------------------------------------------------
# Writing

def identity(dir: str | Path, vision: str | Path | None = None,
             known: dict[str, str] | None = None) -> dict:
    """What an adapter remembers of its base. known: sha256 of parts that were read already, as
    setup.basis has them."""
    towers = ("picture tower", "language model")     # a run may have changed what is between
    own = {part: known[part] for part in towers if part in (known or {})}
    return {"path": str(dir), "vision": None if vision is None else str(vision),
            "sha256": digests.sha256(dir, vision, own),
            "fingerprint": digests.fingerprint(dir, vision)}


def held_names(model: VLM, trained: Collection[str], base: dict) -> list[str]:
    """Which of a model's parameters its adapter holds: LoRA's, and all of fuser and projector,
    where one of them was trained or the fuser isn't the base's. trained: names of parameters."""
    between = [name for name, _ in model.named_parameters()
               if name.startswith(("fuser.", "projector."))]
    if base["sha256"]["kind of fuser"] == digests.of_fuser(model) \
            and not set(between) & set(trained):
        between = []
    return between + [name for name, _ in model.named_parameters() if ".lora_" in name]


def save(model: VLM, folder: str | Path, base: dict, tensors: dict[str, Tensor],
         trained: Collection[str]) -> None:
    """Write a model's adapter. base: its `identity`; tensors: its `held_names`, whole; trained: the
    names of all parameters that were trained.

    The configs go first and come last: what a kill leaves isn't taken for an adapter.
    """
    if tensors.keys() != set(held_names(model, trained, base)) or set(trained) - tensors.keys():
        raise ValueError("an adapter holds LoRA, fuser and projector, all of them, and no other")
    folder = make_folder(folder)
    for name in (CONFIG, ABOUT):
        discard(folder / name)
    thin = {peft_name(name): t for name, t in tensors.items() if ".lora_" in name}
    between = {name: t for name, t in tensors.items() if ".lora_" not in name}
    for file, content in ((THIN, thin), (BETWEEN, between)):
        whole = {name: t.detach().to("cpu", torch.float32).contiguous()
                 for name, t in content.items()}
        if whole:
            write_tensors(folder / file, whole, {"format": "pt"})
        else:
            discard(folder / file)
    layers = [layer for layer in model.llm.modules() if isinstance(layer, LoRALinear)]
    how = dict(r=layers[0].r, alpha=layers[0].alpha) if layers else None
    parts = {"lora" if ".lora_" in name else name.partition(".")[0] for name in trained}
    fuser = {"name": model.fuser.name, **asdict(model.fuser.config)} if between else None
    write_json(folder / ABOUT, {"format": KIND, "trained": sorted(parts), "lora": how,
                                "fuser": fuser, "query": model.query, "image": model.image,
                                "base": base})
    if how:
        write_json(folder / CONFIG, peft_config(how["r"], how["alpha"], base["path"]))


def peft_name(name: str) -> str:
    """llm.layers.0.mlp.up_proj.lora_A -> PEFT's, of transformers 5's LLaVA."""
    return f"{PREFIX}{LLM}{name.removeprefix('llm.')}.weight"


def peft_config(r: int, alpha: float, base: str) -> dict:
    """adapter_config.json. Its pattern leaves out the picture tower, whose queries are q_proj,
    too."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": 0.0, "bias": "none", "inference_mode": True, "fan_in_fan_out": False,
            "init_lora_weights": True, "modules_to_save": None, "use_rslora": False,
            "use_dora": False, "target_modules": rf".*language_model.*\.({'|'.join(MATRICES)})"}
