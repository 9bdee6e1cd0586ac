"""raydistil: distil a transformer."""

import logging

# Where torchao is installed, transformers imports it, which then warns of kernels for GPUs that are not there.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
