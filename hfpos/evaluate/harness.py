"""Patched models for lm-evaluation-harness: `hfpos lm-eval --model hfpos --model_args pretrained=PATH,scheme=yarn,factor=4 --tasks ...`.

Importing this module enters the model type into the harness. Versions of it that look for plugins find it by the entry point
`lm_eval.models` of this package, so that there plain `lm_eval --model hfpos` does the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfpos.checkpoint import from_pretrained
from hfpos.configuration import BLOCK, base_values
from hfpos.describe import describe
from hfpos.patching import language_model, patch, record_of
from hfpos.scheme import PatchError
from hfpos.schemes import REGISTRY


try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise PatchError(
        f'lm-evaluation-harness cannot be imported ({error}); install it: pip install "hfpos[lm-eval]"'
    ) from error


class _Loader:
    """Stands in for `AutoModelForCausalLM` while the harness loads."""

    from_pretrained = staticmethod(from_pretrained)


@register_model("hfpos")
class HfposLM(HFLM):
    """The harness's `hf` model, with a positional scheme.

    Args:
        pretrained: folder or hub name; one that hfpos saved comes back with its scheme. Or a model.
        scheme: a name from `hfpos.schemes()`; without it the model is taken as it is saved.
        kwargs: the scheme's parameters, and everything that `hf` takes. A name that is neither is an error.

    Raises:
        PatchError: as `hfpos.from_pretrained` and `hfpos.patch`.
    """

    AUTO_MODEL_CLASS: Any
    _model: Any

    def __init__(self, pretrained: Any, scheme: str | None = None, **kwargs: Any) -> None:
        chosen = None
        if scheme is not None:
            fields = {field.name for field in dataclasses.fields(REGISTRY[scheme])}
            chosen = REGISTRY[scheme].create(**{key: kwargs.pop(key) for key in fields & kwargs.keys()})
        unknown = kwargs.keys() - inspect.signature(HFLM.__init__).parameters.keys()
        if unknown and not isinstance(
            pretrained, str
        ):  # of a name, they go on to what loads it, and that refuses them
            raise PatchError(f"{', '.join(sorted(unknown))}: neither a parameter of the scheme nor of the harness")
        super().__init__(pretrained, **kwargs)
        if chosen is not None:
            patch(self.model, chosen, tokenizer=self.tokenizer)
        # a family that hfpos does not know has no patch either, and its length is what the harness finds
        known = chosen is not None or record_of(language_model(self.model)) is not None
        self._patched_length = describe(self.model).patched_length if known else None

    @property
    def max_length(self) -> int:
        """The longest input in tokens: `max_length` if given, else the patched length, else what the harness finds."""
        return self._max_length or self._patched_length or super().max_length

    def _get_config(self, pretrained: str, gguf_file: str | None = None, **where: Any) -> None:
        """Also read the config of a model that only hfpos loads, which stock Transformers refuses."""
        values = {} if gguf_file else PreTrainedConfig.get_config_dict(pretrained, **where)[0]
        if BLOCK in values:
            values = base_values(values)
            self._config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        else:
            super()._get_config(pretrained, gguf_file=gguf_file, **where)

    def _create_model(self, pretrained: str, peft: str | None = None, **kwargs: Any) -> None:
        """Load through `hfpos.from_pretrained`, which puts saved schemes back, also the one of an adapter."""
        if peft is not None and (kwargs.get("delta") or kwargs.get("revision") != "main"):
            raise PatchError(
                f"peft={peft} was given with delta= or revision=; an adapter can only be put on the plain model"
            )
        stock, self.AUTO_MODEL_CLASS = self.AUTO_MODEL_CLASS, _Loader
        try:
            super()._create_model(pretrained, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = stock
        if peft is not None:
            self._model = from_pretrained(peft, base_model=self._model)


def main(argv: Sequence[str]) -> None:
    """Run the command line of lm-evaluation-harness, which then knows the model type `hfpos`.

    Args:
        argv: its arguments, e.g. `["--model", "hfpos", "--model_args", "pretrained=PATH,scheme=yarn,factor=4", "--tasks", "..."]`.
    """
    before = sys.argv
    sys.argv = ["lm-eval", *argv]  # the only place where the harness looks
    try:
        cli_evaluate()
    finally:
        sys.argv = before
