"""The other ways to turn the vision tower's layers into features for the language model, in CCRA's
place. One file each.

A fuser takes hidden (L+1, B, 1+N, d), all states of the tower, the question F_t (B, T, D) with its
mask (B, T), and a mode; it gives features (B, N', width) and maps. What VLM and train.py want to
know about it:

    .name, .config   in a VLM's config.json: which it is, and how it is set up
    .width           of its features, which is what the projector reads; .rows(N) -> N', if not N
    .n_blocks        how many blocks of the tower it reads, so that the others need not run
    .asks            whether it reads the question. Only then the mode matters ("on" or not), and
                     only then stage 1 leaves it as it is; one that doesn't ask belongs to the
                     projector and is trained with it

Layers are numbered as in `hidden`: 0 goes into the first block, l comes out of block l. The indices
are those of the released code for CLIP's 24 blocks, each carried over to another depth by
common.at; the last layer but one stays that. Recipes of training are the same for all of them.
PWCA alone and LWCA alone aren't here: nobody has published them but as parts of CCRA's equations,
so they are arrangements of ccra.py's pieces.

To add one: a file here with a config and a module, and its two lines below.
"""
from core.common import UserError
from core.fields import read, shown
from fusers.dense_connector import DENSE, DenseConnector, DenseConnectorConfig
from fusers.igva import IGVA, IGVAConfig
from fusers.llava import LLaVA, LLaVAConfig
from fusers.mlvf import MLVF, MLVFConfig
from fusers.mmfuser import MMFuser, MMFuserConfig

FUSERS = {fuser.name: (fuser, config) for fuser, config in (
    (LLaVA, LLaVAConfig), (DenseConnector, DenseConnectorConfig), (MMFuser, MMFuserConfig),
    (IGVA, IGVAConfig), (MLVF, MLVFConfig))}

# What a user asks for by one word (--fuser): a configuration, and where it departs from defaults
NAMED = {"llava": (LLaVAConfig, {"copies": 1}), "wide": (LLaVAConfig, {"copies": 2}),
         **{kind: (DenseConnectorConfig, {"kind": kind}) for kind in DENSE},
         "mmfuser": (MMFuserConfig, {}), "igva": (IGVAConfig, {}), "mlvf": (MLVFConfig, {})}


def read_config(fields: dict, fusers: dict, where: str):
    """The configuration that the "fuser" of a config.json describes, one of fusers {name: (module,
    config)}. UserError naming `where` for a name or a field that is unknown."""
    fields = dict(fields)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in fusers:
        raise UserError(f"{where}: has a fuser {shown(name)}, which is unknown (choose one of "
                        f"{', '.join(fusers)})")
    _, config = fusers[name]
    if unknown := fields.keys() - config.__dataclass_fields__.keys():
        raise UserError(f"{where}: gives the fuser {shown(min(unknown))}, which is unknown")
    return read(config, fields, where)
