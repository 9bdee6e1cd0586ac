"""Training loops in one process, against which the stream is measured: the same rows, weights, losses and optimizer.

`InProcess` is written as tightly as one would by hand: no wire, no DeepSpeed, rows and masks made beforehand, the
teacher's states handed over as they are (`probe.StudentOnly` has them beforehand, as the wire carries them).
`Reference` is the loop of the published distillation (Sanh et al. 2019, arXiv:1910.01108): one text a row, batches of
like lengths padded to their longest, float32, the full vocabulary's logits of both models at every real token.
`measured` times them all, and what the machine could do.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydistil.chain import links
from raydistil.config import Config
from raydistil.config.loss import LossConfig
from raydistil.losses import weights_at
from raydistil.models import HeadedEncoder, load_model, load_tokenizer, on_device, outline
from raydistil.pipeline import lesson
from raydistil.plan import cores
from raydistil.prepare import Prepared, prepare
from raydistil.probe import Loop, StudentOnly, taught
from raydistil.roofline import gemm_rate
from raydistil.size import forward_flops
from raydistil.source import MicroBatches
from raydistil.specs import TrainRun
from raydistil.stages import train_run
from raydistil.student.training import made_for_training
from raydistil.types import IGNORE, TeacherTargets, TokenBatch
from raydistil.worker import make_distiller

WARM_UP = 2  # steps that are not counted


def measured(config: Config, steps: int, device: str, seed: int) -> dict[str, float]:
    """{loop: real tokens a second over so many steps}, with `gemm` and `flops` (a second; needed a token).

    `seed`: of the order of the published loop's batches, whose lengths differ.
    """
    run = prepare(config, lambda line: None)
    planned = _planned(run)
    loops = _loops(run, planned, steps, seed)
    torch.set_num_threads(cores())  # the teacher's class has set its own
    for loop in loops.values():
        loop.rate(WARM_UP)
    rates = {name: loop.rate(steps) for name, loop in loops.items()}
    flops = needed_flops(planned, config.tokens.length)
    return {**rates, "gemm": gemm_rate(planned.worker.train.precision, device), "flops": flops}


def _planned(run: Prepared) -> TrainRun:
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    return train_run(run, lesson(run, link))


def needed_flops(planned: TrainRun, length: int) -> float:
    """FLOPs a token: the teacher forward, the student forward and backward, both heads at the masked tokens alone."""
    assert planned.source.masking is not None
    worker, share = planned.worker, planned.source.masking.share
    models = (outline(model, worker.task) for model in (worker.teachers[0].model, worker.init))
    teacher, student = (forward_flops(model, length, share) for model in models)
    return teacher + 3 * student


def _loops(run: Prepared, planned: TrainRun, steps: int, seed: int) -> dict[str, Loop]:
    source = MicroBatches(planned.source)
    batches = [source.make(index) for index in range(min(steps, planned.source.manifest.num_micro_batches))]
    loops: dict[str, Loop] = {
        "inprocess": InProcess(planned, batches),
        "student_only": StudentOnly(planned, taught(planned, batches)),
    }
    if run.config.teacher.precision == "float32":
        last = load_tokenizer(run.config.teacher.model).sep_token_id
        loops["reference"] = Reference(planned, batches, last, seed)
    return loops


class InProcess(Loop):
    """Teacher and student in turn."""

    def __init__(self, planned: TrainRun, batches: list[TokenBatch]) -> None:
        worker = planned.worker
        super().__init__(make_distiller(worker), worker.train)
        (spec,) = worker.teachers
        self._states, self._weights = spec.targets.states, weights_at(worker.loss, 0.0)
        teacher = HeadedEncoder(load_model(spec.model, spec.task), spec.task, spec.precision)
        self._teacher = teacher.frozen().to(self.device)
        self._batches = cycle(batches)

    def losses(self) -> tuple[Tensor, int]:
        batch = next(self._batches)
        with torch.no_grad():
            states, _ = self._teacher(on_device(batch, self.device), self._states)
        loss: Tensor = self.model(batch, TeacherTargets(states, None), self._weights).loss
        return loss, batch.num_tokens


class Reference(Loop):
    """The published loop."""

    def __init__(self, planned: TrainRun, batches: list[TokenBatch], last_id: int, seed: int = 0) -> None:
        """`last_id`: the token that ends a text."""
        worker = planned.worker
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        student = made_for_training(load_model(worker.init, worker.task), worker.train.dropout, device)
        super().__init__(student.train(), worker.train)
        self._teacher: Any = load_model(worker.teachers[0].model, worker.task).eval().to(self.device)
        self._loss = worker.loss
        rows = sorted((text for batch in batches for text in texts_of(batch, last_id)), key=lambda text: len(text[0]))
        size = worker.train.micro_batch_size
        groups = [_padded(rows[first : first + size]) for first in range(0, len(rows), size)]
        order = np.random.default_rng(seed).permutation(len(groups))
        self._groups = cycle([groups[number] for number in order])

    def losses(self) -> tuple[Tensor, int]:
        ids_BL, mask_BL, labels_BL = (part.to(self.device) for part in next(self._groups))
        asked = {"input_ids": ids_BL, "attention_mask": mask_BL, "output_hidden_states": True}
        with torch.no_grad():
            taught = self._teacher(**asked)
        student = self.model(**asked)
        return published_loss(student, taught, mask_BL, labels_BL, self._loss), int(mask_BL.sum())


def published_loss(student: Any, taught: Any, mask_BL: Tensor, labels_BL: Tensor, config: LossConfig) -> Tensor:
    """The triple loss as published: KD over all real tokens, masked LM, cosine of the last hidden states."""
    t, at_BL = config.temperature, mask_BL.bool()
    student_TV, taught_TV = student.logits[at_BL], taught.logits[at_BL]
    soft = F.kl_div(F.log_softmax(student_TV / t, -1), F.softmax(taught_TV / t, -1), reduction="batchmean") * t**2
    hard = F.cross_entropy(student.logits.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE)
    student_TD, taught_TD = student.hidden_states[-1][at_BL], taught.hidden_states[-1][at_BL]
    cosine = F.cosine_embedding_loss(student_TD, taught_TD, student_TD.new_ones(len(student_TD)))
    return config.kd * soft + config.task * hard + config.cosine * cosine


Text = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # (ids, labels) of one row


def texts_of(batch: TokenBatch, last_id: int) -> Iterator[Text]:
    """The texts (or what a block's end left of them) of packed blocks, each as a row: first token, text, `last_id`."""
    assert batch.labels_BL is not None
    for ids_L, labels_L, length in zip(batch.input_ids_BL, batch.labels_BL, batch.lengths_B, strict=True):
        start = 1
        for end in np.flatnonzero(ids_L[:length] == last_id).tolist():
            if end > start:
                chosen = np.r_[0, start : end + 1]
                yield ids_L[chosen], labels_L[chosen]
            start = end + 1


def _padded(texts: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels), int64 [B, L] of the longest."""
    ids, labels = ([torch.from_numpy(text[part].astype(np.int64)) for text in texts] for part in (0, 1))
    ids_BL = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels_BL = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    lengths_B1 = torch.tensor([len(row) for row in ids])[:, None]
    return ids_BL, (torch.arange(ids_BL.shape[1]) < lengths_B1).long(), labels_BL
