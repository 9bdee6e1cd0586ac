"""Causal language models: blocks of documents train and teach as each document alone would.

The reference runs one document at a time with transformers alone, no mask and no padding; it finds the documents by
their end-of-text tokens. Dropout 0, one thread, float32.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decoders
import pytest
import reference
import torch
import torch.nn.functional as F
from kept import sized
from parity import ALL_STATES, CPU, Streamed, check, one_micro_batch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from watch import Widest

from raydistil.attention import attention_of
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.errors import ModelError
from raydistil.models import HeadedEncoder, load_model, on_device, vocabulary_head
from raydistil.places import compared_places
from raydistil.source import MicroBatches
from raydistil.specs import TargetsSpec, TeacherSpec
from raydistil.targets import PLACES_AT_ONCE, decode_targets, encode_targets
from raydistil.teacher import Teacher
from raydistil.types import IGNORE, Sparse, TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

NOTHING: dict[str, Any] = {"kd": 0, "task": 0, "cosine": 0}
VOCABULARY = len(decoders.tokenizer())


def documents(batch: TokenBatch) -> Iterator[Tensor]:
    """int64 ids of every document of a micro-batch, row after row."""
    end = decoders.tokenizer().eos_token_id
    for row, length in zip(batch.input_ids_BL.astype("int64"), batch.lengths_B, strict=True):
        ids = torch.from_numpy(row[:length])
        cuts = [place + 1 for place in (ids == end).nonzero()[:, 0].tolist() if place + 1 < length]
        yield from ids.tensor_split(cuts)


def rows_of(model: PreTrainedModel, batch: TokenBatch, given: dict[int, Tensor]) -> reference.Rows:
    """(the model's states, `given` ones, next tokens) of every document, each run alone."""
    rows, start = [], 0
    for ids in documents(batch):
        states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
        taught = {n: states_TD[start : start + len(ids)] for n, states_TD in given.items()}
        rows.append(([state[0] for state in states], taught, F.pad(ids[1:], (0, 1), value=IGNORE)))
        start += len(ids)
    return rows


# ---- the mask and the positions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_block_gives_what_its_documents_give_alone(tmp_path: Path, family: str, attention: str) -> None:
    teacher = decoders.write_model(tmp_path / "model", family)
    batch = MicroBatches(decoders.source(tmp_path, teacher)).make(0)
    model = load_model(teacher, "clm").eval()
    model.set_attn_implementation(attention)
    encoder = HeadedEncoder(model, "clm", "float32")
    with torch.no_grad():
        states, _ = encoder(on_device(batch, CPU), ALL_STATES)
        alone = [model(input_ids=ids[None], output_hidden_states=True) for ids in documents(batch)]
    assert len(alone) > 2 * len(batch.lengths_B)
    for n in ALL_STATES:
        torch.testing.assert_close(states[n], torch.cat([out.hidden_states[n][0] for out in alone]))
    torch.testing.assert_close(encoder.vocabulary_logits(states[4]), torch.cat([out.logits[0] for out in alone]))


def test_a_head_that_does_more_than_multiply_is_not_taken() -> None:
    shape = Gemma2Config(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=8, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(ModelError, match="got Gemma2ForCausalLM"):
        vocabulary_head(Gemma2ForCausalLM(shape))


# ---- parity


@pytest.fixture(scope="module", params=["gpt2", "qwen2", "llama"])
def case(ray_cluster: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    folder = tmp_path_factory.mktemp(request.param)
    teacher = decoders.write_model(folder / "model", request.param, with_bos=request.param == "llama")
    return one_micro_batch(
        "clm", teacher, decoders.source(folder, teacher), TargetsConfig(), False, LossConfig(), request.param == "gpt2"
    )


def triple(rows: reference.Rows, student: PreTrainedModel, teacher: PreTrainedModel, config: LossConfig) -> Tensor:
    """DistilGPT2: DistilBERT's sum with the cross-entropy of next tokens; KL at every token that has one."""
    hidden_s, hidden_t = torch.cat([row[0][-1] for row in rows]), torch.cat([row[1][4] for row in rows])
    labels, t = torch.cat([row[2] for row in rows]), config.temperature
    log_q = F.log_softmax(student.lm_head(hidden_s) / t, -1)
    p = F.softmax(teacher.lm_head(hidden_t) / t, -1)
    at = labels != IGNORE
    soft = F.kl_div(log_q[at], p[at], reduction="batchmean") * t**2
    hard = F.cross_entropy(student.lm_head(hidden_s), labels)
    cosine = F.cosine_embedding_loss(hidden_s, hidden_t, torch.ones(len(hidden_s)))
    return config.kd * soft + config.task * hard + config.cosine * cosine


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_triple(case: Streamed, positions: str) -> None:
    config = LossConfig(kd=5, task=2, cosine=1, temperature=2, kd_positions=positions)
    check(case, config, lambda student, rows: triple(rows, student, case.teacher(), config), rows_of)


def test_hidden(case: Streamed) -> None:
    config = LossConfig(**NOTHING, hidden={"weight": 0.7})
    pairs = [(0, 0), (2, 1), (4, 2)]
    check(case, config, lambda student, rows: 0.7 * reference.hidden_mse(rows, pairs), rows_of)


def causal_relation_kl(
    rows: reference.Rows, student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, int], parts: int
) -> Tensor:
    """MiniLMv2, document by document, each token with itself and those before it."""
    total, tokens = torch.zeros(()), 0
    for states_s, states_t, labels in rows:
        tokens += len(labels)
        ours = attention_of(student, layers[1], states_s[layers[1] - 1])
        theirs = attention_of(teacher, layers[0], states_t[layers[0] - 1])
        for name in ("queries_TD", "keys_TD", "values_TD"):
            for a, b in zip(getattr(ours, name).chunk(parts, -1), getattr(theirs, name).chunk(parts, -1), strict=True):
                for place in range(len(labels)):
                    log_q, log_p = (
                        F.log_softmax(v[: place + 1] @ v[place] / math.sqrt(v.shape[1]), -1) for v in (a, b)
                    )
                    total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / (parts * tokens)


def test_minilm2_relates_what_attention_allows(case: Streamed) -> None:
    config = LossConfig(**NOTHING, minilm={"teacher_layer": 3, "relation_heads": 4})
    check(case, config, lambda student, rows: causal_relation_kl(rows, student, case.teacher(), (3, 2), 4), rows_of)


@pytest.mark.parametrize(("codec", "positions"), [("logits", "all"), ("topk", "sample"), ("sampled", "masked")])
def test_codecs(tmp_path: Path, codec: str, positions: str) -> None:
    """Fed what the codec left of them, soft labels train as the formula says."""
    teacher = decoders.write_model(tmp_path / "model", "gpt2")
    loss = LossConfig(kd=3, task=1, cosine=0, kd_positions=positions)
    targets = TargetsConfig(**sized(codec, 5, 20))
    case = one_micro_batch("clm", teacher, decoders.source(tmp_path, teacher), targets, True, loss, ray=False)
    places = compared_places(case.made, loss, 3)
    at_T, kd_N = torch.from_numpy(places.at_T), torch.from_numpy(places.kd_N)
    given = case.given.soft_labels

    def expected(student: PreTrainedModel, rows: reference.Rows) -> Tensor:
        logits = student.lm_head(torch.cat([row[0][-1] for row in rows]))
        compared, labels = logits[at_T][kd_N], torch.cat([row[2] for row in rows])
        if isinstance(given, Sparse):
            soft = reference.sparse_kl(compared, given.ids_NK[kd_N], given.probs_NK[kd_N], given.tail_N[kd_N], 2.0)
        else:
            soft = reference.divergence("forward_kl", compared, given[kd_N].float(), 2.0, 0.5)
        return 3 * soft + F.cross_entropy(logits, labels)

    assert 0 < kd_N.sum() <= len(kd_N)
    check(case, loss, expected, rows_of)


# ---- the teacher's logits, some places at a time


@pytest.mark.parametrize("codec", ["logits", "topk", "sampled"])
def test_a_teachers_logits_never_exist_as_a_whole(tmp_path: Path, codec: str) -> None:
    """What arrives is what encoding all of them at once would give; draws are made part by part."""
    folder = decoders.write_model(tmp_path / "model", "gpt2")
    batch = MicroBatches(decoders.source(tmp_path, folder, size=24, length=64)).make(0)
    wanted = TargetsSpec(TargetsConfig(**sized(codec, 5, 300)), LossConfig(), (), True, 3)
    teacher = Teacher(TeacherSpec(folder, "clm", "float32", torch.get_num_threads(), wanted))
    with Widest(VOCABULARY) as watched:
        columns = teacher.targets(batch)
    assert watched.rows == PLACES_AT_ONCE
    got = decode_targets(wanted, columns, batch.num_tokens, CPU).soft_labels
    labels = torch.from_numpy(batch.labels_BL.astype("int64"))
    model = load_model(folder, "clm").eval()
    with torch.no_grad():
        logits = torch.cat([model(input_ids=ids[None]).logits[0, :-1] for ids in documents(batch)])
    assert len(logits) == (labels != IGNORE).sum() > 2 * PLACES_AT_ONCE
    visits_N = batch.visits_B.repeat((batch.labels_BL != IGNORE).sum(-1))
    whole = decode_targets(wanted, encode_targets(wanted, visits_N, {}, logits), batch.num_tokens, CPU).soft_labels
    if not isinstance(got, Sparse):
        torch.testing.assert_close(got, whole, rtol=2e-3, atol=2e-3)
    else:
        probs_NV, expected_NV = (dense(part, len(logits)) for part in (got, whole))
        assert (probs_NV - expected_NV).abs().mean() < 1e-5
        torch.testing.assert_close(probs_NV.sum(-1) + got.tail_N, torch.ones(len(logits)))


def dense(sparse: Sparse, places: int) -> Tensor:
    return torch.zeros(places, VOCABULARY).scatter_add_(-1, sparse.ids_NK, sparse.probs_NK)
