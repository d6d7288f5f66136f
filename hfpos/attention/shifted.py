"""Shifted sparse attention (S2-Attn) of LongLoRA, arXiv 2309.12307: in training, tokens attend within groups; in eval mode, to all.

While it is on, the decoder's config names an attention implementation of ours that stands on the one it had (`shifted_interface.py`).
A hook on the decoder says before each forward in training that it is one.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfpos.attention.interface import backend_of
from hfpos.attention.sequence_parallel import sharing, wrapped
from hfpos.attention.shifted_groups import group_length
from hfpos.attention.shifted_interface import NAMES, RUNNING, stands_on
from hfpos.configuration import own_copy
from hfpos.families import family_of
from hfpos.families._directions import calls_interface
from hfpos.patching import afresh, language_model, refuse_compiled
from hfpos.plan import ABSENT, Attribute, Hook, Plan
from hfpos.probe import can_run, eval_mode
from hfpos.scheme import PatchError, require_length


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

RECORD = "hfpos_shifted"


def shift_attention(model: nn.Module, groups: int | None = None, group_size: int | None = None) -> ShiftedAttention:
    """Put shifted sparse attention into a live model: in training each token attends within its group, in eval mode to all before it.

    The second half of the heads has groups that lie half a group further on (with an odd number of heads, the smaller half), so that
    layer by layer all tokens are connected. Time and memory of attention are those of `length x group`. It goes with any scheme that
    hfpos puts in from outside of attention (the rotary scalings among them), with PEFT and with gradient checkpointing, in any order.

    Rows of any length are taken. Padding in front of a row is left out before it is cut, and a row with no more tokens than a group
    has attends in full, so with a `group_size` a row comes out the same alone, padded and in any batch. Packed documents do not
    see each other, and are cut where the row is. A model that is shifted already is shifted anew.

    Args:
        model: a causal Transformers model, bare or wrapped by PEFT, DDP and the like.
        groups: into how many groups the rows of a batch are cut, padding included; the paper has 4, a quarter of the length each.
        group_size: or how many tokens make a group, an even number.

    Returns:
        a handle; its `remove()` gives the model its own attention back in training too.

    Raises:
        PatchError: not one of `groups` and `group_size`; or a model whose attention cannot be cut into groups: not causal, not called
            through Transformers' attention interface, compiled, shared by several processes, or with a scheme that acts inside it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config).train()
    >>> ids = torch.arange(20)[None]
    >>> full = model(ids).logits
    >>> handle = shift_attention(model, groups=4)
    >>> torch.equal(model(ids).logits, full), torch.equal(model.eval()(ids).logits, full)
    (False, True)
    >>> handle.remove()
    >>> torch.equal(model.train()(ids).logits, full)
    True
    """
    if (groups is None) == (group_size is None):
        raise PatchError(
            f"shift_attention: groups={groups!r} and group_size={group_size!r} were given; expected one of them: the number of groups "
            "that a row is cut into (the paper has 4), or the tokens in each"
        )
    name, value = ("groups", groups) if group_size is None else ("group_size", group_size)
    require_length("shift_attention", name, value)
    if group_size is not None and group_size % 2:
        raise PatchError(
            f"shift_attention: group_size={group_size} is odd; half of the heads are shifted by half a group, so give an even number"
        )
    target = language_model(model)
    refuse_compiled(model)
    before = target.__dict__.get(RECORD)
    if before is not None:
        before.remove()
    try:
        return ShiftedAttention(target, groups, group_size).put_on(model)
    except BaseException:
        if before is not None:
            before.put_on(model)
        raise


class ShiftedAttention:
    """Shifted sparse attention on one model; kept on the model as `hfpos_shifted`, and returned by `shift_attention`.

    Args:
        model: the Transformers model.
        groups, group_size: as for `shift_attention`.
    """

    def __init__(self, model: PreTrainedModel, groups: int | None, group_size: int | None) -> None:
        self.model: Any = model
        self.decoder: Any = _decoder(model)
        self.arguments = [name for name in inspect.signature(type(self.decoder).forward).parameters if name != "self"]
        self.groups = groups
        self.group_size = group_size
        self.proving = False
        self.configs: list[Any] = []
        self.plan = Plan(
            (
                Hook(self.decoder, "register_forward_pre_hook", self.before, {"with_kwargs": True}),
                Hook(self.decoder, "register_forward_hook", self.after, {"always_call": True}),
                Attribute(model, RECORD, ABSENT, self),
            )
        )

    def put_on(self, root: nn.Module) -> ShiftedAttention:
        """Check the model, put the hooks on and prove that they act; `root` is the model as the caller holds it."""
        self._check_model()
        self._name(root)
        self.plan.apply()
        try:
            if can_run(self.model):
                self._prove()
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        """Give the model its own attention back; does nothing where that was done before."""
        if self.model.__dict__.get(RECORD) is not self:
            return
        self.plan.undo()
        for config in (*self.configs, self.decoder.config):
            config._attn_implementation = stands_on(config._attn_implementation) or config._attn_implementation
        self.configs.clear()

    def length(self, tokens: int) -> int:
        """How many tokens make a group where a row has `tokens`."""
        return 4 if self.proving else group_length(tokens, self.groups, self.group_size)

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The decoder's forward pre-hook."""
        if not (decoder.training or self.proving):
            return None
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        if kwargs.get("past_key_values") is not None:
            raise PatchError(
                f"{type(decoder).__name__} is in training mode and was given a cache, whose tokens are in no group; to generate call "
                "model.eval() first, to train leave past_key_values out"
            )
        if kwargs.get("output_attentions") or getattr(self.decoder.config, "output_attentions", False):
            raise PatchError(
                f"{type(decoder).__name__} was asked for attention weights, and shifted sparse attention gives none; leave "
                "output_attentions out in training"
            )
        self._check_shared()
        self._name(self.model)
        if "use_cache" in self.arguments:
            kwargs["use_cache"] = (
                False  # nobody reads it, and with one Transformers does not keep packed documents apart
            )
        RUNNING.shifted = self
        return (), kwargs

    def after(self, *_: Any) -> None:
        """The decoder's forward hook."""
        RUNNING.shifted = None

    def _name(self, root: nn.Module) -> None:
        """Have the config name our implementation, also after another patch, `unpatch` or `set_attn_implementation` took the name out.

        In a copy, as other models may hold the same config.
        """
        own = self.decoder.config._attn_implementation
        if own in NAMES.values():
            return
        if own not in NAMES:
            raise PatchError(_why_not(self.model, own))
        _, config, edits = own_copy(root, self.model.config, self.decoder.config)
        config._attn_implementation = NAMES[own]
        Plan(tuple(edits)).apply()
        self.configs.append(config)

    def _check_model(self) -> None:
        config, name = self.decoder.config, type(self.model).__name__
        if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
            raise PatchError(f"{name} does not attend causally, and shifted sparse attention is for models that do")
        if not calls_interface(self.decoder):
            raise PatchError(
                f"{name} does not call attention through Transformers' attention interface, which is where shifted sparse attention gets in"
            )
        if (getattr(self.model, "tp_size", None) or 1) > 1:
            raise PatchError(
                f"the heads of {name} are shared by {self.model.tp_size} processes (tensor parallelism), each of which would shift half "
                "of its own; use data parallelism or FSDP"
            )
        self._check_shared()

    def _check_shared(self) -> None:
        own = self.decoder.config._attn_implementation
        used = {own, stands_on(own), NAMES.get(own)} & set(ALL_ATTENTION_FUNCTIONS)
        functions = (inner for name in used for inner in wrapped(ALL_ATTENTION_FUNCTIONS[name]))
        if sharing(self.decoder) is not None or any(hasattr(function, "process_group") for function in functions):
            raise PatchError(
                "the sequence is shared by several processes (DeepSpeed Ulysses or torch's context parallel), and shifted sparse attention "
                "needs a whole row and all heads in one; use data parallelism or FSDP, or train without shift_attention"
            )

    def _prove(self) -> None:
        """Show that a forward in training goes another way than one in eval mode: on 8 tokens, with groups of 4."""
        name = type(self.model).__name__
        try:
            with torch.no_grad(), afresh(self.model), eval_mode(self.model):
                full = self._probe()
                self.proving = True
                cut = self._probe()
        except PatchError:
            raise
        except Exception as error:
            raise PatchError(
                f"{name} does not run with shifted sparse attention ({type(error).__name__}: {error}); it was left as it was"
            ) from error
        finally:
            self.proving = False
        if torch.equal(full, cut):
            raise PatchError(f"shifted sparse attention did not change the output of {name}; it was left as it was")

    def _probe(self) -> torch.Tensor:
        embedding = self.model.get_input_embeddings().weight
        device = torch.device("cpu") if embedding.is_meta else embedding.device
        ids = torch.arange(8, device=device)[None] % embedding.shape[0]
        return self.model(input_ids=ids, use_cache=False)[0][0, -1]


def _decoder(model: PreTrainedModel) -> nn.Module:
    try:
        return family_of(model).decoder
    except PatchError:  # of no family that hfpos knows; shifting needs to know little of it
        return model.base_model


def _why_not(model: Any, name: str) -> str:
    if backend_of(name) is not None:
        return (
            f"{type(model).__name__} has a scheme that acts inside attention ({name}) and goes by all keys of a row; shifted sparse "
            "attention goes with schemes that do not, such as yarn or ntk: hfpos.unpatch it, or train without shift_attention"
        )
    return (
        f"{type(model).__name__} has the attention implementation {name!r}; shifted sparse attention stands on one of "
        f"{', '.join(NAMES)}: call model.set_attn_implementation('sdpa')"
    )
