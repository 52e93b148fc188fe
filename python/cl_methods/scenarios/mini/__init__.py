"""The offline world ``mini``: seven small tasks, a reference set and a tiny pre-trained CLIP, all inside the package.

Procedurally drawn 32 x 32 images with compositional captions, and scikit-learn's real handwritten digits. Version ``mini-v1``.
Its numbers compare methods with each other in this world only; they are not MTIL numbers and are never shown beside them.
See ``docs/mini.md``.
"""

from cl_methods.scenarios.mini.data import FINGERPRINT, VERSION, load_scenario
from cl_methods.scenarios.mini.model import CHECKPOINT, load_model
from cl_methods.scenarios.mini.tokenizer import tokenize
from cl_methods.scenarios.mini.transforms import eval_transform, train_transform

__all__ = [
    "CHECKPOINT",
    "FINGERPRINT",
    "VERSION",
    "eval_transform",
    "load_model",
    "load_scenario",
    "tokenize",
    "train_transform",
]
