"""Lines of Python for the model card, that load a student with transformers alone."""

from raydistil.heads import Pooling
from raydistil.types import Task

PIPES: dict[Task, tuple[str, str]] = {  # (name of the pipeline, what it is given)
    "classification": ("text-classification", '"A text."'), "regression": ("text-classification", '"A text."'),
    "mlm": ("fill-mask", 'f"A {model.tokenizer.mask_token}."'), "clm": ("text-generation", '"A text."'),
    "token_classification": ("token-classification", '"A text."'),
}  # fmt: skip
PAIR = '{"text": "A text.", "text_pair": "Another one."}'
ANSWER = """import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer, model = (kind.from_pretrained("{name}") for kind in (AutoTokenizer, AutoModelForQuestionAnswering))
question, context = "What is it?", "It is a text."
given = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True, truncation="only_second")
places, inside = given.pop("offset_mapping")[0], torch.tensor([part == 1 for part in given.sequence_ids()])
with torch.inference_mode():
    said = model(**given)
scores = said.start_logits[0][:, None] + said.end_logits[0][None, :]
scores = scores.masked_fill(~(inside[:, None] & inside[None, :]).triu(), -torch.inf)
start, end = divmod(int(scores.argmax()), len(scores))
print(context[places[start][0] : places[end][1]])
"""
VECTORS = """import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = (kind.from_pretrained("{name}") for kind in (AutoTokenizer, AutoModel))
given = tokenizer(["A text.", "Another one."], return_tensors="pt", padding=True, truncation=True)
with torch.inference_mode():
    states = model(**given).last_hidden_state
{pooled}
vectors = torch.nn.functional.normalize(vectors, dim=-1)
print(vectors @ vectors.T)
"""
POOLED: dict[Pooling, str] = {
    "mean": "mask = given[\"attention_mask\"][:, :, None]\nvectors = (states * mask).sum(1) / mask.sum(1)",
    "cls": "vectors = states[:, 0]",
}  # fmt: skip


def usage(task: Task, name: str, pooling: Pooling, pairs: bool) -> str:
    """`name`: of a hub or a directory; `pooling`: of vectors; `pairs`: of texts are what it takes."""
    if task == "question_answering":
        return ANSWER.format(name=name)
    if task == "embedding":
        return VECTORS.format(name=name, pooled=POOLED[pooling])
    pipe, given = PIPES[task]
    given = PAIR if pairs else given
    return f'from transformers import pipeline\n\nmodel = pipeline("{pipe}", "{name}")\nprint(model({given}))\n'
