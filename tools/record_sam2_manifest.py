"""Record names and shapes in SAM2.1's checkpoints: python tools/record_sam2_manifest.py tests/sam2/keys.json.gz.

They are those of the models that the sam2 package builds from its own configurations. Needs sam2 1.1.0 beside the
project, in an environment of its own; see vfmadapt/interop/sam2.py.
"""

import gzip
import json
import sys
from importlib import resources
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}

found = {}
for size, name in SIZES.items():
    config = resources.files("sam2") / "configs" / "sam2.1" / f"sam2.1_hiera_{size}.yaml"
    state = instantiate(OmegaConf.create(config.read_text()).model, _recursive_=True).state_dict()
    found[name] = {key: list(tensor.shape) for key, tensor in state.items()}
Path(sys.argv[1]).write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
