"""`python -m hfpos.train RECIPE.yaml`: what `accelerate launch -m hfpos.train RECIPE.yaml` starts in each process."""

import sys

from hfpos.cli import main


if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
