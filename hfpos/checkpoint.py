"""`from_pretrained`: loads what a patched model's `save_pretrained` wrote, also adapter-only PEFT folders."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate import init_empty_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from hfpos.configuration import BLOCK, base_values
from hfpos.learned_weights import load_learned, without_report_of_learned
from hfpos.patching import language_model, patch, record_of
from hfpos.scheme import PatchError
from hfpos.schemes import REGISTRY


if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

    from hfpos.scheme import Scheme

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(path: str | os.PathLike, *, base_model: Any = None, **kwargs: Any) -> Any:
    """Load a model and put back the scheme it was saved with.

    Works on a local folder or a hub name that holds a patched model (also where stock Transformers loads it), an unpatched one, or a
    PEFT adapter. An adapter brings the scheme it was trained under to its base; a base that has another scheme is an error.

    Args:
        path: folder or hub name.
        base_model: for an adapter, the model to put it on, or where to load that from; the adapter's own note unless given.
        kwargs: handed to Transformers' `from_pretrained` (of the base model, for an adapter).

    Returns:
        the model, patched as it was saved; for an adapter the `PeftModel`.

    Raises:
        PatchError: no such folder, an unreadable or incomplete checkpoint, an unknown scheme in it, or a conflict of schemes.
    """
    if "config" in kwargs:
        raise PatchError(
            "config= cannot be given to hfpos.from_pretrained: the scheme and the config come from the checkpoint"
        )
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    adapter = _read_json(path, "adapter_config.json", hub)
    if adapter is not None:
        return _load_adapter(path, adapter, base_model, kwargs)
    if base_model is not None:
        raise PatchError(
            f"base_model= was given, but {path} holds no adapter_config.json; it is for PEFT adapters only"
        )
    if kwargs.get("gguf_file"):  # llama.cpp's format holds its own config, and no scheme of ours
        return _load_weights(transformers.AutoModelForCausalLM, path, kwargs)
    values = _read_json(path, "config.json", hub)
    if values is None:
        raise PatchError(
            f"{path} holds neither config.json nor adapter_config.json; expected the folder of a saved model, or a hub name that can be reached"
        )
    model_class = _model_class(values)
    if BLOCK not in values:
        return _load_weights(model_class, path, kwargs)
    scheme = _scheme(path, values[BLOCK])
    config = _config(path, base_values(values))
    learned = getattr(scheme, "learned", False)
    with without_report_of_learned() if learned else contextlib.nullcontext():
        model = _load_weights(model_class, path, kwargs | {"config": config})
    patch(model, scheme, prove=False)
    if learned:
        load_learned(language_model(model), path, hub)
    return model


def load_skeleton(path: str | os.PathLike) -> Any:
    """The model of a saved folder or adapter with its scheme but without weights: parameters are on the meta device.

    Raises:
        PatchError: as `from_pretrained`, as far as configs are concerned.
    """
    adapter = _read_json(path, "adapter_config.json", {})
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        if not base:
            raise PatchError(f"the adapter in {path} does not say which model it belongs to")
        skeleton = load_skeleton(base)
        if BLOCK in adapter and record_of(skeleton) is None:
            patch(skeleton, _scheme(path, adapter[BLOCK]), prove=False)
        return skeleton
    values = _read_json(path, "config.json", {})
    if values is None:
        raise PatchError(
            f"{path} holds neither config.json nor adapter_config.json; expected the folder of a saved model, or a hub name that can be reached"
        )
    scheme = _scheme(path, values[BLOCK]) if BLOCK in values else None
    config = _config(path, values if scheme is None else base_values(values))
    with init_empty_weights():
        try:
            model_class = _model_class(values)
            # of an Auto class, or of the model's own
            make = getattr(model_class, "from_config", None) or model_class._from_config
            model = make(config)
        except Exception as error:
            raise PatchError(f"the config in {path} does not make a model: {_cause(error)}") from error
    model.tie_weights()  # what made the weights empty also made two of each shared one
    return model if scheme is None else patch(model, scheme, prove=False)


def load_tokenizer(path: str | os.PathLike, gguf_file: str | None = None) -> Any:
    """The tokenizer of a saved folder or hub name, or of a GGUF file in it; of an adapter without one, its base model's. None if there is none."""
    if gguf_file is not None:
        return transformers.AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    if _read_json(path, "tokenizer_config.json", {}) is None:
        base = (_read_json(path, "adapter_config.json", {}) or {}).get("base_model_name_or_path")
        return load_tokenizer(base) if base else None
    return transformers.AutoTokenizer.from_pretrained(path)


def _model_class(values: dict[str, Any]) -> Any:
    """The class that a saved config names as its model's, else what causal language models are loaded with."""
    names = values.get("architectures") or []
    return (getattr(transformers, names[0], None) if names else None) or transformers.AutoModelForCausalLM


def _load_adapter(path: str | os.PathLike, adapter: dict[str, Any], base_model: Any, kwargs: dict[str, Any]) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise PatchError(
            f"{path} holds a PEFT adapter, and peft is not installed; pip install 'hfpos[peft]'"
        ) from error
    if base_model is None:
        base_model = adapter.get("base_model_name_or_path")
        if not base_model:
            raise PatchError(f"the adapter in {path} does not say which model it belongs to; pass base_model=")
    base = from_pretrained(base_model, **kwargs) if isinstance(base_model, (str, Path)) else base_model
    scheme = _scheme(path, adapter[BLOCK]) if BLOCK in adapter else None
    if scheme is not None:
        record = record_of(language_model(base))
        if record is None:
            patch(base, scheme, prove=False)
        elif record.scheme != scheme:
            raise PatchError(
                f"the adapter in {path} was trained under {scheme}, its base model has {record.scheme}; unpatch the base, or train the "
                "adapter under that scheme"
            )
    with warnings.catch_warnings():
        # PEFT does not know our block in its config, and would recommend to upgrade PEFT
        warnings.filterwarnings("ignore", message=r"Unexpected keyword arguments \['hfpos'\]")
        return PeftModel.from_pretrained(base, path)


def _read_json(path: str | os.PathLike, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The named JSON file of a folder or hub repository, None if it has none."""
    folder = Path(path)
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or str(path).startswith(".")):
        raise PatchError(f"{path} is not a folder; expected the folder of a saved model, or a hub name")
    try:
        found = cached_file(
            str(path), name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False, **hub
        )
    except Exception as error:
        raise PatchError(f"cannot find {path}: {error}") from error
    if found is None:
        return None
    try:
        values = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PatchError(f"{found} is not readable as JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(values, dict):
        raise PatchError(f"{found} holds a {type(values).__name__}, expected an object; the checkpoint is damaged")
    return values


def _scheme(path: str | os.PathLike, block: Any) -> Scheme:
    expected = {"scheme": str, "parameters": dict, "base": dict}
    if not isinstance(block, dict) or not all(isinstance(block.get(key), kind) for key, kind in expected.items()):
        raise PatchError(f"the {BLOCK!r} block of {path} is damaged: {block!r}; expected scheme, parameters and base")
    return REGISTRY[block["scheme"]].create(**block["parameters"])


def _config(path: str | os.PathLike, values: dict[str, Any]) -> Any:
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise PatchError(f"{path} is of model type {kind!r}, which this version of Transformers does not have")
    return CONFIG_MAPPING[kind].from_dict(values)


def _load_weights(model_class: Any, path: str | os.PathLike, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        model, report = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except Exception as error:
        raise PatchError(f"cannot load the weights in {path}: {_cause(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise PatchError(
            f"the checkpoint in {path} lacks {len(missing)} weights ({shown}); they would be random. It is incomplete"
        )
    return model


def _cause(error: Exception) -> str:
    """What went wrong inside Transformers; a bare `KeyError` there is a name it looked up, of a rope_type or an activation."""
    known = f"its config names {error}, which this version of Transformers does not have"
    return known if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
