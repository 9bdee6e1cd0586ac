"""The student with its losses as one module: what DeepSpeed runs forward and backward.

Besides the student it owns the projections of hidden states whose widths differ. The teacher's frozen parts (its
vocabulary head, its attention's matrices) are used from outside of what is trained and saved.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistil.attention import attention_of
from raydistil.config.loss import LossConfig
from raydistil.heads import Inputs
from raydistil.layers import LayerPlan
from raydistil.losses import Attention, LossInputs, LossOutputs, Projection, Weights, combined
from raydistil.losses.tied import tied
from raydistil.models import HeadedEncoder, document_pairs, on_device, vocabulary_head
from raydistil.places import compared_places, evened
from raydistil.types import IGNORE, Mixture, Sparse, TeacherTargets, TokenBatch, models_language

NO_TARGETS = TeacherTargets({}, None)


class Distiller(nn.Module):
    """forward: one micro-batch and what the teacher says of it -> the loss and its terms."""

    def __init__(
        self, encoder: HeadedEncoder, loss: LossConfig, layers: LayerPlan, seed: int, teacher: PreTrainedModel | None
    ) -> None:
        """`teacher`: where its frozen parts are needed on the student's side; on the student's device."""
        super().__init__()
        self.encoder = encoder
        self._loss, self._layers, self._seed = loss, layers, seed
        self._teacher = None if teacher is None else (teacher.requires_grad_(False).train(False),)  # not a submodule
        self._taught_CD: Tensor | None = None  # its vocabulary, in the dtype of the matrix products
        self.projections = nn.ModuleDict()
        words, head = self.model.get_input_embeddings(), models_language(encoder.task)
        self._tied = tied(words, vocabulary_head(self.model).weight_VE) if head else None

    def project(self, width: int) -> None:
        """Give the compared states a learned map to the teacher's `width`, where the student's differs."""
        own = self.model.config.hidden_size
        if own != width:
            self.projections.update({str(n): nn.Linear(own, width) for n in self._layers.projected_states})

    @property
    def model(self) -> PreTrainedModel:
        """The student alone."""
        return self.encoder.model

    def forward(self, batch: TokenBatch, targets: TeacherTargets | None, weights: Weights) -> LossOutputs:
        """`targets` None: there is no teacher."""
        device = next(self.encoder.parameters()).device
        shown = on_device(batch, device)
        states, logits_NC = self.encoder(shown, self._layers.student_states)
        with self.encoder.reckoning(device.type):
            inputs = self._inputs(batch, shown, states, logits_NC, targets or NO_TARGETS)
        return combined(inputs, self._loss, self._layers, weights)

    def _inputs(
        self, batch: TokenBatch, shown: Inputs, states: Mapping[int, Tensor], logits_NC: Tensor | None,
        targets: TeacherTargets,
    ) -> LossInputs:  # fmt: skip
        teacher_layers, student_layers = self._layers.attention_layers
        attention = _attention(self.model, student_layers, states)
        taught = _attention(self._teacher[0], teacher_layers, targets.states) if self._teacher else {}
        projected = {int(n): project(states[int(n)]).float() for n, project in self.projections.items()}
        logits, labels_N, teacher_logits, kd_N = self._labels(batch, states, logits_NC, targets)
        return LossInputs(
            logits, labels_N, teacher_logits, kd_N, states, targets.states, attention, taught, shown.mask_BL,
            _pairs(shown) if attention else None, projected,
        )  # fmt: skip

    def _labels(
        self, batch: TokenBatch, states: Mapping[int, Tensor], logits_NC: Tensor | None, targets: TeacherTargets
    ) -> tuple[Tensor | Projection, Tensor, Tensor | Projection | Sparse | Mixture | None, Tensor | None]:
        """(student's logits, data's labels, teacher's logits, where those are compared), at the compared places."""
        if logits_NC is not None:
            labels_N, kd_N = _own_labels(batch, logits_NC.device)
            return logits_NC, labels_N, targets.soft_labels, kd_N
        teacher, student = self._layers.last
        device = states[student].device
        places = compared_places(batch, self._loss, self._seed)
        at_N = np.flatnonzero(places.at_T)
        at_M, kd_N, labels_N = (
            torch.from_numpy(part).to(device) for part in (evened(at_N), places.kd_N, places.labels_N)
        )
        taught: Tensor | Projection | Sparse | Mixture | None = targets.soft_labels
        if taught is None and self._teacher and teacher in targets.states:
            sent_M = torch.from_numpy(evened(np.arange(len(at_N)))).to(device) if targets.compared else at_M
            taught = self._of_teacher(self._teacher[0], targets.states[teacher].index_select(0, sent_M))
        own = _projection(self.model, states[student].index_select(0, at_M), self.encoder.dtype)
        return replace(own, tied=self._tied), labels_N, taught, kd_N

    def _of_teacher(self, teacher: PreTrainedModel, states_MD: Tensor) -> Projection:
        """Its vocabulary never changes: cast once, and not for every micro-batch."""
        made = _projection(teacher, states_MD, self.encoder.dtype)
        if self._taught_CD is None:
            self._taught_CD = made.weight_CD.detach().to(self.encoder.dtype)  # not a parameter: those are saved
        return replace(made, weight_CD=self._taught_CD)


def _projection(model: PreTrainedModel, states_MD: Tensor, dtype: torch.dtype) -> Projection:
    head = vocabulary_head(model)
    return Projection(head.transform(states_MD), head.weight_VE, head.bias_V, dtype)


def _own_labels(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(the data's labels of a head's rows, where soft labels are compared): of words at their first tokens alone."""
    if batch.tags_BL is not None:
        real_BL = np.arange(batch.tags_BL.shape[1])[None, :] < batch.lengths_B[:, None]
        tags_T = torch.from_numpy(batch.tags_BL[real_BL].astype(np.int64)).to(device)
        return tags_T.where(tags_T >= 0, IGNORE), tags_T != IGNORE
    given = batch.labels_B if batch.spans_B2 is None else batch.spans_B2.ravel()
    assert given is not None
    labels_N = torch.from_numpy(given.copy()).to(device)
    return labels_N if labels_N.is_floating_point() else labels_N.long(), None


def _pairs(shown: Inputs) -> Tensor | None:
    """bool [B, L, L]: which tokens of its own document each real one may look at; None where that is all of its row."""
    if shown.positions_BL is None:
        return None
    return document_pairs(shown.positions_BL) & shown.mask_BL[:, :, None]


def _attention(model: PreTrainedModel, layers: tuple[int, ...], states: Mapping[int, Tensor]) -> dict[int, Attention]:
    return {layer: attention_of(model, layer, states[layer - 1]) for layer in layers}
