"""The kernels inside other people's training code: by instance, reversible, and with a report of what was replaced.

Each codebase has a file. None of them is imported: what can be replaced is recognised by its structure.
"""

from cl_kernels.drop_in.adapters import patch_adapters
from cl_kernels.drop_in.averaged_model import patch_averaged_model
from cl_kernels.drop_in.clip import patch_clip
from cl_kernels.drop_in.mammoth import patch_mammoth_moe_adapters
from cl_kernels.drop_in.moe_adapters4cl import patch_moe_adapters4cl
from cl_kernels.drop_in.patch import Patch
from cl_kernels.drop_in.zscl import patch_zscl

__all__ = [
    "Patch",
    "patch_adapters",
    "patch_averaged_model",
    "patch_clip",
    "patch_mammoth_moe_adapters",
    "patch_moe_adapters4cl",
    "patch_zscl",
]
