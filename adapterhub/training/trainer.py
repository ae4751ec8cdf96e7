"""The training loop: transformers' Trainer over a StageModule, which owns what trains and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from adapterhub.data.batches import collate
from adapterhub.errors import HubError, UsageError
from adapterhub.files import durable
from adapterhub.kinds.contracts import number
from adapterhub.spec.digest import canonical
from adapterhub.training.module import StageModule

COMPLETE = "complete.json"
"""Written into a checkpoint last: the sha256 of its files. A checkpoint without it, or with other bytes, is none."""


@dataclass(frozen=True)
class Schedule:
    """Everything about the loop that changes what comes out."""

    steps: int
    batch_size: int
    lr: float
    warmup: int
    """Steps in which the rate rises; then it falls linearly to 0."""
    seed: int
    gradient_checkpointing: bool
    """Compute the layers' activations again in the backward pass instead of keeping them."""


def fit(learner: StageModule, schedule: Schedule, folder: Path, save_every: int, title: str) -> list[dict[str, float]]:
    """Train what is trainable in the learner's model, in place; returns the loss curve: step, loss, gradient norm, rate of
    each step.

    Checkpoints lie in folder; the newest whole one there is where it goes on, so that a run killed anywhere ends with the
    bits of one that was not. Raises HubError when loss or gradient is no number, or a checkpoint cannot be written, and
    IntegrityError for a checkpoint of other tensors than the learner's, by name and shape."""
    learner.prepare()
    setting, model = learner.setting, learner.setting.model
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{schedule.steps}":  # killed while it was published
        learner.load_state_dict(load_file(checkpoint / "model.safetensors"))
        return _curve(json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"])
    if schedule.gradient_checkpointing and not model.base.supports_gradient_checkpointing:
        raise UsageError(
            f"{type(model.base).__name__} cannot checkpoint its layers", "leave gradient_checkpointing out"
        )
    verbosity = logging.get_verbosity()  # the Trainer sets it for the whole process
    with _progress(title, schedule.steps) as shown:
        trainer = Trainer(
            model=learner,
            args=_arguments(schedule, folder, _whole(save_every, number(learner.objective, "period")), model.device),
            train_dataset=setting.examples,
            data_collator=lambda rows: collate(rows, setting.pad),
            callbacks=[_Watch(learner, shown)],
            optimizers=learner.optimizer(schedule.lr, schedule.warmup),
        )
        trainer.remove_callback(PrinterCallback)
        if schedule.gradient_checkpointing:
            model.base.activation_checkpointing_enable({"use_reentrant": False})
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer says no more than RuntimeError
            partial = folder / f"checkpoint-{trainer.state.global_step}"
            if isinstance(error, torch.OutOfMemoryError) or not partial.is_dir() or (partial / COMPLETE).exists():
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise HubError(
                f"cannot write {partial}: no space left, or the disk is broken",
                "free some space and run it again: it goes on from the checkpoint before",
            ) from error
        finally:
            if schedule.gradient_checkpointing:
                model.base.activation_checkpointing_disable()
            learner.eval()
            logging.set_verbosity(verbosity)
    return _curve(trainer.state.log_history)


def _whole(steps: int, period: int) -> int:
    """So many steps, or the next multiple of the period."""
    return -(-steps // period) * period


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    kept = ("step", "loss", "grad_norm", "learning_rate")
    return [{key: entry[key] for key in kept} for entry in history if "loss" in entry]


def _arguments(schedule: Schedule, folder: Path, save_every: int, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        max_grad_norm=1.0,
        seed=schedule.seed,
        data_seed=schedule.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=save_every,
        save_total_limit=2,  # the older one is whole while the newer is being written
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    if device.type == "cuda":
        # The Trainer would take the first device, or all of them at once; the model lies on this one.
        arguments.__dict__["_setup_devices"] = device
        arguments._n_gpu = 1
        torch.cuda.set_device(device)
    return arguments


class _Watch(TrainerCallback):
    """What happens beside the loop."""

    def __init__(self, learner: StageModule, shown: Callable[[int, float], None]):
        self.learner, self.shown = learner, shown

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.learner.begin(state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        with torch.no_grad():
            self.learner.after_step()

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        for what, key in (("loss", "loss"), ("gradient", "grad_norm")):
            if not math.isfinite(logs[key]):
                shutil.rmtree(args.output_dir, ignore_errors=True)  # going on from there would end here again
                raise HubError(
                    f"training diverged: the {what} is {logs[key]} at step {state.global_step}; nothing was stored",
                    "try a lower learning rate",
                )
        self.shown(state.global_step, logs["loss"])

    def on_save(self, args, state, control, **kwargs) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        durable.write_bytes(checkpoint / COMPLETE, canonical(_digests(checkpoint)))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; broken ones are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2])):
        try:
            if json.loads((checkpoint / COMPLETE).read_bytes()) == _digests(checkpoint):
                return checkpoint
        except (OSError, ValueError):
            pass
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.iterdir() if path.name != COMPLETE and path.suffix != durable.TEMPORARY)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def _progress(title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal's standard error, with the loss; elsewhere nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(
        *columns,
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task(title, total=steps, loss="", rate="")

        def shown(step: int, loss: float) -> None:
            speed = progress.tasks[task].speed
            rate = f"{speed:.2f} steps/s" if speed else ""
            progress.update(task, completed=step, loss=f"loss {loss:.3f}", rate=rate)

        yield shown
