"""The models that `hfpos bench train` trains and extends, each by recipes of recipes/tiny/ with the changes that stand here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A model and how its context is extended.

    Attributes:
        base: the recipe of recipes/tiny/ that trains the model from random weights.
        base_changes: of that recipe, key=value.
        recipe: the one that extends it.
        changes: of that.
        control: changes that make of it the same amount of training without a scheme, at the trained length.
        schemes: measured without training, for comparison, each scaling as the recipe does.
        factor: how many times the trained length is measured.
    """

    base: str
    base_changes: tuple[str, ...]
    recipe: str
    changes: tuple[str, ...]
    control: tuple[str, ...]
    schemes: tuple[str, ...] = ()
    factor: int = 4


@dataclass(frozen=True)
class Text:
    """What is trained and measured on.

    Attributes:
        train: changes of the recipes that name their sources.
        held_out: a path, or stdlib.
        split: of that.
        documents: of the longest length each, so many at most.
    """

    train: tuple[str, ...] = ()
    held_out: str = "stdlib"
    split: str | None = "held_out"
    documents: int = 128


_ANNEALED = ("training.lr_scheduler_type=cosine", "training.warmup_steps=100")
_LORA = "lora={r: 8, alpha: 16}"
CASES = {
    "llama": Case(
        base="base-llama",
        base_changes=(
            "model.config.hidden_size=128",
            "model.config.intermediate_size=320",
            "model.config.initializer_range=0.06",
            "model.config.max_position_embeddings=256",
            "data.length=256",
            "training.max_steps=2500",
            "training.per_device_train_batch_size=8",
            "training.learning_rate=4e-3",
            *_ANNEALED,
        ),
        recipe="llama2-7b-pose-128k",
        changes=(
            _LORA,
            "data.length=512",
            "data.positions.target_length=1024",
            "training.max_steps=250",
            "training.per_device_train_batch_size=2",
            "training.learning_rate=3e-3",
            "training.lr_scheduler_type=cosine",
        ),
        control=("scheme=none", "data.length=256", "data.positions=null", "training.per_device_train_batch_size=4"),
        schemes=("linear", "ntk", "yarn"),
    ),
    "gpt2_to_rope": Case(
        base="base-gpt2",
        base_changes=("training.max_steps=1500", *_ANNEALED),
        recipe="gpt2-rope-4k",
        changes=("training.max_steps=400", "training.lr_scheduler_type=cosine"),
        control=("scheme=none", "data.length=128", "training.per_device_train_batch_size=16"),
    ),
    "bloom_slopes": Case(
        base="base-bloom",
        base_changes=("training.max_steps=1500", *_ANNEALED),
        recipe="bloom-560m-alibi-8k",
        changes=("training.max_steps=75", "training.learning_rate=3e-4", "training.lr_scheduler_type=cosine"),
        # stock BLOOM does not keep packed documents apart
        control=(
            "scheme=none",
            "data.length=128",
            "data.packing=blocks",
            "training.per_device_train_batch_size=16",
        ),
        schemes=("alibi",),
    ),
}
