"""The Llama family: its rules, table of layers, modules and Hugging Face form, as `FAMILY`.

May import trainer.models, checkpoint.model_config and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
