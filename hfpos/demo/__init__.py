"""What `hfpos demo` runs: from no model at all to perplexity against context length, scheme by scheme, on real text."""

from hfpos.demo.options import BaseRecipe, DemoOptions
from hfpos.demo.run import run


__all__ = ["BaseRecipe", "DemoOptions", "run"]
