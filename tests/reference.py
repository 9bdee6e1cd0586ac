"""The losses as their papers write them, row by row and in one process: what the library is held against.

Everything is one row of real tokens at a time, plain PyTorch, float32, and autograd. `given` are the teacher's hidden
states of that row (0 the embeddings), as the wire rounded them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from raydistil.config.loss import LossConfig
from raydistil.types import IGNORE, TokenBatch

States = list[Tensor]  # by number, [l, D] each
Rows = list[tuple[States, States, Tensor]]  # (student's, teacher's, labels of the row's tokens)


def student_rows(student: PreTrainedModel, batch: TokenBatch, given: dict[int, Tensor]) -> Rows:
    """The student run on one row at a time, without padding."""
    rows, start = [], 0
    for number, length in enumerate(batch.lengths_B.tolist()):
        ids = torch.from_numpy(batch.input_ids_BL[number : number + 1, :length].astype("int64"))
        states = student.base_model(input_ids=ids, output_hidden_states=True).hidden_states
        taught = {n: states_TD[start : start + length] for n, states_TD in given.items()}
        labels = torch.full((length,), IGNORE)
        if batch.labels_BL is not None:
            labels = torch.from_numpy(batch.labels_BL[number, :length].astype("int64"))
        rows.append(([state[0] for state in states], taught, labels))
        start += length
    return rows


def triple(rows: Rows, student: PreTrainedModel, teacher: PreTrainedModel, config: LossConfig, last: int) -> Tensor:
    """DistilBERT (Sanh et al. 2019): 5 T^2 KL, batchmean over selected tokens, + 2 CE of the masked + 1 - cos."""
    hidden_s, hidden_t = torch.cat([row[0][-1] for row in rows]), torch.cat([row[1][last] for row in rows])
    labels = torch.cat([row[2] for row in rows])
    selected = labels != IGNORE if config.kd_positions == "masked" else torch.ones_like(labels, dtype=torch.bool)
    logits_s, logits_t = student.cls(hidden_s), teacher.cls(hidden_t)
    t = config.temperature
    soft = F.kl_div(
        F.log_softmax(logits_s[selected] / t, -1), F.softmax(logits_t[selected] / t, -1), reduction="batchmean"
    ) * (t**2)
    hard = F.cross_entropy(logits_s, labels)
    cosine = F.cosine_embedding_loss(hidden_s, hidden_t, torch.ones(len(hidden_s)))
    return config.kd * soft + config.task * hard + config.cosine * cosine


def hidden_mse(rows: Rows, pairs: list[tuple[int, int]]) -> Tensor:
    """TinyBERT: sum over layers of MSE(H_s, H_t)."""
    return sum(
        F.mse_loss(*(torch.cat([row[side][n] for row in rows]) for side, n in ((0, s), (1, t)))) for t, s in pairs
    )


def patient(rows: Rows, pairs: list[tuple[int, int]]) -> Tensor:
    """PKD: sum over rows and layers of |h_s / |h_s| - h_t / |h_t||^2 at [CLS], by the number of rows."""
    unit = lambda h: h[0] / h[0].norm()  # noqa: E731
    return sum((unit(row[0][s]) - unit(row[1][t])).square().sum() for row in rows for t, s in pairs) / len(rows)


def _qkv(model: PreTrainedModel, layer: int, states: States) -> list[Tensor]:
    own = model.base_model.encoder.layer[layer - 1].attention.self
    return [matrix(states[layer - 1]) for matrix in (own.query, own.key, own.value)]


def _relations(left: Tensor, right: Tensor, heads: int) -> list[Tensor]:
    width = left.shape[1] // heads
    parts = [slice(n * width, (n + 1) * width) for n in range(heads)]
    return [left[:, part] @ right[:, part].T / math.sqrt(width) for part in parts]


def attention_mse(
    rows: Rows, student: PreTrainedModel, teacher: PreTrainedModel, pairs: list[tuple[int, int]]
) -> Tensor:
    """TinyBERT: (1/h) sum over heads of MSE of the scores before the softmax; the mean over all pairs of tokens."""
    heads, total, count = student.config.num_attention_heads, torch.zeros(()), 0
    for states_s, states_t, _ in rows:
        count += len(states_s[0]) ** 2
        for t, s in pairs:
            (q_s, k_s, _), (q_t, k_t, _) = _qkv(student, s, states_s), _qkv(teacher, t, states_t)
            both = zip(_relations(q_s, k_s, heads), _relations(q_t, k_t, heads), strict=True)
            total = total + sum((a - b).square().sum() for a, b in both) / heads
    return total / count


def relation_kl(
    rows: Rows, student: PreTrainedModel, teacher: PreTrainedModel, pair: tuple[int, int], heads: int,
    which: Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]],
) -> Tensor:  # fmt: skip
    """MiniLM: sum over the relations `which` of 1/(A |x|) sum over heads and tokens of KL(teacher || student)."""
    total, tokens = torch.zeros(()), sum(len(row[2]) for row in rows)
    for states_s, states_t, _ in rows:
        of_student, of_teacher = which(_qkv(student, pair[1], states_s)), which(_qkv(teacher, pair[0], states_t))
        for ours, theirs in zip(of_student, of_teacher, strict=True):
            for a, b in zip(_relations(*ours, heads), _relations(*theirs, heads), strict=True):
                log_p, log_q = F.log_softmax(b, -1), F.log_softmax(a, -1)
                total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / (heads * tokens)


def version1(qkv: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(qkv[0], qkv[1]), (qkv[2], qkv[2])]


def version2(qkv: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(vectors, vectors) for vectors in qkv]


def hard_triplets(units: list[Tensor], labels: list[int], margin: float) -> Tensor:
    """Batch hard (Hermans et al. 2017), with plain loops."""
    losses = []
    for a, (unit, label) in enumerate(zip(units, labels, strict=True)):
        same = [(unit - units[n]).norm() for n in range(len(units)) if labels[n] == label and n != a]
        other = [(unit - units[n]).norm() for n in range(len(units)) if labels[n] != label]
        if same and other:
            losses.append(F.relu(margin + max(same) - min(other)))
    return sum(losses) / len(losses)


def semi_hard_triplets(units: list[Tensor], labels: list[int], margin: float) -> Tensor:
    """FaceNet (Schroff et al. 2015), with plain loops."""
    losses = []
    for a, p in ((a, p) for a in range(len(units)) for p in range(len(units)) if a != p and labels[a] == labels[p]):
        near = (units[a] - units[p]).norm()
        others = [(units[a] - units[n]).norm() for n in range(len(units)) if labels[n] != labels[a]]
        if others:
            beyond = [far for far in others if far > near]
            losses.append(F.relu(margin + near - (min(beyond) if beyond else max(others))))
    return sum(losses) / len(losses)


def guided_triplets(
    units: list[Tensor], taught: list[Tensor], labels: list[int], smallest: float, largest: float
) -> Tensor:
    """Batch hard with the margins of Feng et al. 2019: (largest - smallest) / d_max * d + smallest."""
    chosen = []
    for a in range(len(units)):
        apart = [(units[a] - unit).norm() for unit in units]
        same = [n for n in range(len(units)) if labels[n] == labels[a] and n != a]
        other = [n for n in range(len(units)) if labels[n] != labels[a]]
        if same and other:
            p, n = max(same, key=lambda m: apart[m]), min(other, key=lambda m: apart[m])
            gap = F.relu((taught[a] - taught[n]).norm() - (taught[a] - taught[p]).norm())
            chosen.append((apart[p], apart[n], gap))
    widest = max(gap for _, _, gap in chosen)
    margins = [(largest - smallest) / widest * gap + smallest for _, _, gap in chosen]
    return sum(F.relu(m + near - far) for m, (near, far, _) in zip(margins, chosen, strict=True)) / len(chosen)


def supervised_contrastive(units: list[Tensor], labels: list[int], temperature: float) -> Tensor:
    """L_out of Khosla et al. 2020, with plain loops."""
    losses = []
    for i, z in enumerate(units):
        positives = [p for p in range(len(units)) if labels[p] == labels[i] and p != i]
        if positives:
            everyone = torch.stack([(z @ units[a] / temperature).exp() for a in range(len(units)) if a != i]).sum()
            logs = [((z @ units[p] / temperature).exp() / everyone).log() for p in positives]
            losses.append(-sum(logs) / len(positives))
    return sum(losses) / len(losses)


def divergence(kind: str, student: Tensor, teacher: Tensor, t: float, beta: float) -> Tensor:
    """Of probabilities, as defined, by the number of places; `mse` of the logits."""
    if kind == "mse":
        return (student - teacher).square().mean()
    p, q = F.softmax(teacher / t, -1), F.softmax(student / t, -1)
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    sums = {
        "forward_kl": t**2 * kl(p, q), "reverse_kl": t**2 * kl(q, p), "total_variation": t * (p - q).abs().sum() / 2,
        "jensen_shannon": t**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m)),
    }  # fmt: skip
    return sums[kind] / len(student)


def sparse_kl(student: Tensor, ids: Tensor, probs: Tensor, tail: Tensor, t: float) -> Tensor:
    """KL over the kept entries and "any other" as one more outcome, place by place, mean over the places."""
    total = torch.zeros(())
    for row, kept, given, other in zip(student, ids, probs, tail, strict=True):
        q = F.softmax(row / t, -1)
        there = given > 0
        total = total + (given[there] * (given[there] / q[kept[there]]).log()).sum()
        if other > 0:
            total = total + other * (other / (1 - q[kept[there]].sum())).log()
    return t**2 * total / len(student)
