"""``python -m cl_methods.scenarios.mini.freeze``: publish the fingerprints of the world as it is rendered now.

Only for making a new version of the world: any change of a fingerprint makes earlier results incomparable.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cl_methods.scenarios.mini.data import fingerprints, render_all
from cl_methods.scenarios.mini.model import CHECKPOINT


def checkpoint_fingerprint(path: Path = CHECKPOINT) -> str:
    """sha256 of the checkpoint file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def freeze(path: Path = Path(__file__).parent / "fingerprints.json") -> dict[str, str]:
    """Write the fingerprints of the rendered splits and of the checkpoint to ``path``, and return them."""
    result = fingerprints(render_all())
    if CHECKPOINT.is_file():
        result["checkpoint"] = checkpoint_fingerprint()
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(freeze(), indent=2))
