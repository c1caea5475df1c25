"""The decoders that most families are: rules, table of layers, modules, Hugging Face form.

A family of them says what its layers add to a plain Llama's. May import trainer.models,
checkpoint.model_config and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
