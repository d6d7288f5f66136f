"""hfpos changes how a Transformers model knows positions: `hfpos.patch(model, "yarn", factor=4)`."""

from hfpos import evaluate, families, schemes
from hfpos.checkpoint import from_pretrained
from hfpos.describe import Description, describe
from hfpos.patching import patch, patched, unpatch
from hfpos.scheme import PatchError
from hfpos.version import __version__


__all__ = [
    "Description",
    "PatchError",
    "__version__",
    "describe",
    "evaluate",
    "families",
    "from_pretrained",
    "patch",
    "patched",
    "schemes",
    "unpatch",
]
