"""Controlled benchmarks for visual attention: does a module look at the right place?

mnistattn.generate("mbg", "data/mbg")          make a data set
mnistattn.load("data/mbg", "train")            read it, as a torch data set
mnistattn.evaluate("ctx", data="data/mbg")     train a model and score it
@mnistattn.register("mine")                    make an attention of yours known by a name
"""

from importlib import import_module

from mnistattn.errors import InputError, MnistattnError

__all__ = ["InputError", "MnistattnError", "evaluate", "export", "generate", "load", "load_arrays",
           "register", "sweep"]  # fmt: skip

# Imported when first used: the command line must not wait for torch to print a help text.
_LAZY = {
    "generate": "mnistattn.dataset.write",
    "load": "mnistattn.dataset.torch_data",
    "load_arrays": "mnistattn.dataset.torch_data",
    "export": "mnistattn.dataset.export",
    "evaluate": "mnistattn.evaluation.run",
    "sweep": "mnistattn.evaluation.sweep",
    "register": "mnistattn.models.registry",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mnistattn' has no attribute '{name}'")
