"""Small sources of micro-batches, and the stream they make."""

from pathlib import Path

from conftest import sentences, write_jsonl

from raydistil.config import CorpusConfig, MaskingConfig, TokensConfig
from raydistil.config.cluster import ClusterConfig
from raydistil.corpus import open_corpus
from raydistil.manifest import Manifest
from raydistil.models import load_tokenizer
from raydistil.specs import SourceSpec, TeacherSpec
from raydistil.steps import Steps
from raydistil.stream import build_stream, execution_options
from raydistil.tokens import TokenStore, build_store

CLUSTER = ClusterConfig()


def mlm_source(folder: Path, teacher: str, rows: int = 240, epochs: int = 2) -> SourceSpec:
    path = write_jsonl(folder / "corpus.jsonl", sentences(rows))
    corpus = open_corpus(CorpusConfig(source=str(path)), "blocks")
    store = build_store(corpus, load_tokenizer(teacher), TokensConfig(length=32), "blocks")
    manifest = Manifest(TokenStore(store).bucket_rows("train"), epochs, 8, seed=3)
    return SourceSpec(store, "train", manifest, MaskingConfig())


def class_source(folder: Path, teacher: str) -> SourceSpec:
    path = write_jsonl(folder / "labelled.jsonl", sentences(240))
    corpus = open_corpus(CorpusConfig(source=str(path)), "classes")
    tokens = TokensConfig(length=48, buckets=(16, 32))
    store = build_store(corpus, load_tokenizer(teacher), tokens, "classes")
    manifest = Manifest(TokenStore(store).bucket_rows("train"), 1, 8, seed=3)
    return SourceSpec(store, "train", manifest, None)


def streamed(
    source: SourceSpec,
    teachers: tuple[TeacherSpec, ...],
    first: int = 0,
    total: int | None = None,
) -> list:
    """The micro-batches of a stream (`first` to `total` of the manifest) as one-row tables."""
    steps = Steps(1, first, total or source.manifest.num_micro_batches)
    dataset = build_stream(source, steps, teachers, CLUSTER)
    dataset.context.execution_options = execution_options(CLUSTER)
    return list(dataset.iter_batches(batch_size=1, batch_format="pyarrow"))
