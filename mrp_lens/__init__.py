"""mrp_lens: study unlearning inside a language model, on the residual stream, with TransformerLens.

The public names stand in `__init__.pyi`. They are imported on first use: importing torch takes seconds, and `--help` needs none of it.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("mrp_lens")
