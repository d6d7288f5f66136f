"""A plain training loop, short enough to read: next-token loss, AdamW, warm-up, linear decay, clipping."""

from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from hfpos.scheme import PatchError


def train(
    model: PreTrainedModel,
    samples: Sequence[Sequence[int]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    label: str = "training",
) -> None:
    """Train a causal model in place, with a progress bar; it is left in eval mode.

    Args:
        model: whatever its parameters require a gradient for is trained.
        samples: token ids, all of one length; taken in a new random order each time they have all been seen.
        steps: optimizer steps of `batch_size` samples each.
        learning_rate: the highest; reached after a short warm-up, then linearly down to 0.
        seed: of the order of the samples.
        label: shown before the progress bar.

    Raises:
        PatchError: no samples, or a loss that is not finite.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> train(model, [[1, 2, 3, 4]] * 4, steps=20, batch_size=4, learning_rate=1e-2)
    >>> model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item()
    4
    """
    if not samples:
        raise PatchError("no samples to train on; is every document shorter than one sample?")
    warmup = max(1, steps // 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    model.train()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=steps, loss=float("nan"))
        for batch in _batches(samples, steps, batch_size, seed):
            ids = batch.to(model.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, loss=loss.item())
            if not torch.isfinite(loss):
                raise PatchError(
                    f"{label}: the loss became {loss.item()}; try a lower learning rate than {learning_rate:g}"
                )
    model.eval()


def _batches(samples: Sequence[Sequence[int]], steps: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    data = torch.tensor(samples)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
    for indices in order.split(batch_size)[:steps]:
        yield data[indices]
