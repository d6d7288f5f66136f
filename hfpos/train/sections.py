"""The sections of a recipe and their keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """Which model is trained.

    Attributes:
        path: folder or hub name; patched ones keep their scheme unless the recipe names another.
        config: instead of `path`, a new model with random weights: the keys of a Transformers config, `model_type` among them.
        tokenizer: folder or hub name; the model's own unless given. With `config` also a number: one of so many words is trained.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        attn_implementation: of Transformers, e.g. sdpa or flash_attention_2.
        quantization: 4bit or 8bit weights by bitsandbytes, for LoRA on top.
        shifted_groups: LongLoRA's shifted sparse attention in training, a row cut into so many groups; the paper takes 4.
        seed: of the weights of a new model.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    shifted_groups: int | None = Field(None, ge=2)
    seed: int = 0

    @model_validator(mode="after")
    def _one_of_both(self) -> Model:
        if (self.path is None) == (self.config is None):
            raise ValueError("expected either path (of a saved model) or config (of a new one)")
        if self.config is not None and (self.tokenizer is None or "model_type" not in self.config):
            raise ValueError(
                "a new model needs config.model_type, and a tokenizer (or the number of words of a new one)"
            )
        if isinstance(self.tokenizer, int) and self.config is None:
            raise ValueError("a number as tokenizer trains a new one, which only a new model (config) can have")
        return self


class Source(Section):
    """Where text comes from; see `hfpos.data.Source`."""

    path: str
    weight: float | None = Field(None, gt=0)
    split: str | None = None
    text_column: str = "text"
    min_tokens: int = Field(0, ge=0)
    long_tokens: int | None = Field(None, ge=1)
    long_times: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    streaming: bool = False


class Positions(Section):
    """Position ids of a training sample that reach further than its tokens; see `hfpos.data.collators`."""

    kind: Literal["pose", "random"]
    target_length: int = Field(ge=2)
    chunks: int = Field(2, ge=2)
    seed: int = 0


class Data(Section):
    """What is trained on.

    Attributes:
        sources: one path, or several sources with their weights.
        length: tokens of a sample.
        packing: documents (packed, kept apart), joined (packed, one text) or blocks (each sample within one document).
        positions: PoSE or randomised positions; plain ones unless given.
        seed: of the order of documents and of what is drawn.
        cache_dir: of the tokenised text.
        skip_bad: go on past texts that cannot be read.
    """

    sources: tuple[Source, ...]
    length: int = Field(ge=2)
    packing: Literal["documents", "joined", "blocks"] = "documents"
    positions: Positions | None = None
    seed: int = 0
    cache_dir: str | None = None
    skip_bad: bool = False

    @field_validator("sources", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        return [{"path": each} if isinstance(each, str) else each for each in given]


class Lora(Section):
    """LoRA by PEFT.

    Attributes:
        r: rank.
        alpha: the update is multiplied by alpha / r.
        dropout: of the input of the update.
        targets: names of linear layers; the attention's projections of the model's family unless given.
        train: what else is trained and saved: `embeddings`, `norms` (LongLoRA), or names of modules. What a scheme learns always is.
    """

    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    train: tuple[str, ...] = ()


class Evaluation(Section):
    """Perplexity on held-out text, before step 0 and whenever `training.eval_strategy` says; its keys are those of `hfpos eval ppl`.

    Attributes:
        data: path of the text.
        lengths: context lengths in tokens; the longest one chooses the best checkpoint.
        blocks: cut documents into blocks of the longest length, each a document of its own.
        retrieval: tests to run too: passkey and key_value, at the same lengths.
        trials: prompts of these for each length and depth.
        baseline: measure the model before it is patched, too.
        max_regression: stop when the perplexity within the trained length is worse than the unpatched model's by more than this share.
        patience: stop after so many evaluations without a better perplexity at the longest length.
    """

    data: str
    lengths: tuple[int, ...] = Field(min_length=1)
    split: str | None = None
    text_column: str = "text"
    min_tokens: int = Field(0, ge=0)
    blocks: bool = False
    max_documents: int | None = Field(None, ge=1)
    stride: int | Literal["window"] | None = None
    bos: Literal["every-window", "first", "none"] = "none"
    retrieval: tuple[Literal["passkey", "key_value"], ...] = ()
    trials: int = Field(2, ge=1)
    baseline: bool = True
    max_regression: float | None = Field(None, ge=0)
    patience: int | None = Field(None, ge=1)
