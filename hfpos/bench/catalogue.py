"""The table of schemes, from the registry: what each takes and does, its paper, its seam, and whether stock Transformers loads it."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import hfpos
from hfpos.bench.examples import all_examples, example
from hfpos.bench.matrix import line
from hfpos.bench.models import build
from hfpos.scheme import RopeScaling
from hfpos.schemes import REGISTRY


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfpos.scheme import Scheme

HOSTS = ("llama", "gpt2", "t5")  # one of them takes every scheme
_HOW_FAR = {"target_length", "original_length"}  # which all RoPE scalings take beside `factor`
_BOTH_CACHES = 'Of two values the first is for `cache="exact"`, the second for `cache="pinned"` with a `factor` or `target_length`.'


def catalogue() -> str:
    """One line for each registered scheme."""
    hosts = [build(name) for name in HOSTS]
    header = ("scheme", "what it does", "paper", "seam", "stock")
    lines = [line(header), line(["---"] * len(header))]
    for name, cls in REGISTRY.as_dict().items():
        schemes = [scheme for label, scheme in all_examples().items() if label.partition(",")[0] == name]
        seams = dict.fromkeys(scheme.seam for scheme in schemes)
        stock = dict.fromkeys(_stock(hosts, scheme) for scheme in schemes)
        lines.append(line((_call(cls), cls.summary, _link(cls.paper), " / ".join(seams), " / ".join(stock))))
    return "\n".join([*lines, "", _BOTH_CACHES])


def _call(cls: type[Scheme]) -> str:
    """The name with its parameters, and its aliases."""
    names = [name for name in example(cls).parameters() if not (issubclass(cls, RopeScaling) and name in _HOW_FAR)]
    call = f"`{cls.name}({', '.join(names)})`" if names else f"`{cls.name}`"
    return ", ".join((call, *(f"alias `{alias}`" for alias in cls.aliases)))


def _link(paper: str) -> str:
    """An arXiv number, or a page on the web, as a link.

    >>> _link("arXiv 2309.00071 (3.1)"), _link("kexue.fm/archives/9708")
    ('[2309.00071](https://arxiv.org/abs/2309.00071) (3.1)', '[kexue.fm/archives/9708](https://kexue.fm/archives/9708)')
    """
    paper = re.sub(r"^\w+\.\w+/\S+", r"[\g<0>](https://\g<0>)", paper)
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def _stock(hosts: list[PreTrainedModel], scheme: Scheme) -> str:
    """Whether there is a model that stock Transformers loads with this scheme."""
    loadable = []
    for model in hosts:
        with contextlib.suppress(hfpos.PatchError), hfpos.patched(model, scheme, prove=False):
            loadable.append(hfpos.describe(model).stock_loadable)
    return "yes" if any(loadable) else "no"
