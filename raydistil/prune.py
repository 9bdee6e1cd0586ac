"""A run in the words of its corpus: the teacher with the pieces that the training texts use, before anything else.

The pruned teacher cuts and reads those texts as the whole one did (see `student.vocabulary`), so teacher, token store
and student share one small vocabulary, and no numbers need to be mapped on the way.
"""

from pathlib import Path

import torch

from raydistil.cache.inputs import model_hash
from raydistil.config import Config, digest
from raydistil.models import load_model, load_tokenizer, resolve
from raydistil.storage import cache_dir, whole_directory
from raydistil.student.vocabulary import prune_vocabulary
from raydistil.tokens import TokenStore


def pruned_teacher(config: Config, store: TokenStore) -> Path:
    """The directory of the teacher with the vocabulary of the training split of `store`; made unless it is there.

    Raises ModelError as `prune_vocabulary` does, for example for tokenizers that are Python only.
    """
    model = resolve(config.teacher.model)
    path = cache_dir() / "pruned" / digest([model_hash(model), store.path.name, config.task, config.seed])
    if not path.exists():
        torch.manual_seed(config.seed)  # for a head that the checkpoint lacks
        whole = load_model(model, config.task, store.meta.labels)
        pruned = prune_vocabulary(whole, load_tokenizer(model), store.token_counts())
        with whole_directory(path) as scratch:
            pruned.model.save_pretrained(scratch)
            pruned.tokenizer.save_pretrained(scratch)
    return path
