"""The families of blocks by name, and what each of them can do."""

from replib.blocks.acb import ACB
from replib.blocks.block import FEATURES, RepBlock
from replib.blocks.convbn import ConvBN
from replib.blocks.dbb import DBB, Rep
from replib.blocks.dyrep import DyRep
from replib.blocks.linear import CSLA, Dirac, ExpandNet, QARepVGG
from replib.blocks.mobileone import Duplicate, MobileOne
from replib.blocks.orepa import OREPA, OREPA1x1, OREPARepVGG, OREPAStem, OREPAStemBase
from replib.blocks.replk import RepLK
from replib.blocks.repvgg import RepVGG

BLOCKS: dict[str, type[RepBlock]] = {
    "repvgg": RepVGG,
    "acb": ACB,
    "dbb": DBB,
    "orepa": OREPA,
    "orepa_1x1": OREPA1x1,
    "orepa_stem": OREPAStem,
    "orepa_stem_base": OREPAStemBase,
    "orepa_repvgg": OREPARepVGG,
    "mobileone": MobileOne,
    "replk": RepLK,
    "dyrep": DyRep,
    "rep": Rep,
    "convbn": ConvBN,
    "duplicate": Duplicate,
    "expandnet": ExpandNet,
    "csla": CSLA,
    "qarepvgg": QARepVGG,
    "dirac": Dirac,
}


def support() -> dict[str, dict[str, str]]:
    """{family: {feature: "yes" or why not}} over `FEATURES`; beyond these, all do all."""
    return {
        name: {feature: family.cannot.get(feature, "yes") for feature in FEATURES}
        for name, family in BLOCKS.items()
    }
