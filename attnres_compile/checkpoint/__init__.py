"""Saved checkpoints: one file per format, and what they share.

safetensors.py   one ``.safetensors`` file, or new parameters only
pt.py            ``.pt`` and ``.pth``: state dicts, and pickled modules where that is allowed
pt2.py           ``.pt2``: programs of torch.export
onnx.py          ``.onnx``: graphs of any exporter, weights inside or beside them
huggingface.py   a directory with config.json and shards of either kind

record.py        what every format says of the conversion: the plan, as JSON
names.py         the parameter names of Kimi K3 and of flash-linear-attention
writing.py       outputs that are there whole or not at all
filling.py       tensors into a model, checked before anything changes
saving.py        `save` and `load`
converting.py    a checkpoint to a converted one and back, without a model in memory
"""
