"""Every test runs with the package's shape annotations checked at run time."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "agg")

install_import_hook("mtl_annotated", "beartype.beartype")

import torch  # noqa: E402

# Two workers share two cores; more threads than cores only slow them down.
torch.set_num_threads(1)
