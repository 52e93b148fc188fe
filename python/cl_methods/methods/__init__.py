"""Continual-learning methods by name."""

from cl_methods.methods.base import Batch, Facts, Method, Stage
from cl_methods.methods.clap4clip import CLAP4CLIP
from cl_methods.methods.clipood import CLIPood
from cl_methods.methods.diki import DIKI
from cl_methods.methods.ewc import EWC
from cl_methods.methods.finetune import FineTune
from cl_methods.methods.icarl import ICaRL
from cl_methods.methods.joint import Joint
from cl_methods.methods.loranpac import LoRanPAC
from cl_methods.methods.lwf import LwF
from cl_methods.methods.lwf_vr import LwFVR
from cl_methods.methods.moe_adapters import MoEAdapters
from cl_methods.methods.mulki import MulKI
from cl_methods.methods.proof import PROOF
from cl_methods.methods.ranpac import RanPAC
from cl_methods.methods.replay import Replay
from cl_methods.methods.snd import SnD
from cl_methods.methods.weight_consolidation import WeightConsolidation
from cl_methods.methods.weight_ensemble import WeightEnsemble
from cl_methods.methods.wise_ft import WiSEFT
from cl_methods.methods.zero_shot import ZeroShot
from cl_methods.methods.zscl import ZSCL

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot,
        FineTune,
        WiSEFT,
        WeightEnsemble,
        WeightConsolidation,
        CLIPood,
        EWC,
        LwF,
        LwFVR,
        Replay,
        ICaRL,
        ZSCL,
        SnD,
        MulKI,
        MoEAdapters,
        DIKI,
        RanPAC,
        LoRanPAC,
        PROOF,
        CLAP4CLIP,
        Joint,
    )
}

__all__ = [
    "CLAP4CLIP",
    "DIKI",
    "EWC",
    "METHODS",
    "PROOF",
    "ZSCL",
    "Batch",
    "CLIPood",
    "Facts",
    "FineTune",
    "ICaRL",
    "Joint",
    "LoRanPAC",
    "LwF",
    "LwFVR",
    "Method",
    "MoEAdapters",
    "MulKI",
    "RanPAC",
    "Replay",
    "SnD",
    "Stage",
    "WeightConsolidation",
    "WeightEnsemble",
    "WiSEFT",
    "ZeroShot",
]
