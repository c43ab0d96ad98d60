"""Published checkpoints -> ours: DSNO students (torch zip) and progressive-distillation teachers (flax msgpack).

A published network is a U-Net of `models/unet.py` under other names. `published_parts` lists its parts in their order,
with our name and flax's; the published torch networks number the same list. No code of a file is executed:
msgpack holds data only and its reader has limits; a torch zip is read by torch's restricted unpickler, with
`argparse.Namespace` (the published training arguments) as the only class allowed besides its own.
"""

from dsno_cluster.models.importers.flax_teachers import read_published_teacher
from dsno_cluster.models.importers.importing import import_weights, read_object
from dsno_cluster.models.importers.published import recognise
from dsno_cluster.models.importers.torch_students import from_published_torch

__all__ = [
    "from_published_torch",
    "import_weights",
    "read_object",
    "read_published_teacher",
    "recognise",
]
