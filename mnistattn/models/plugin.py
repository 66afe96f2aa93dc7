"""Load a class of the user's: "path/to/file.py:Class" or "package.module:Class".

Whatever goes wrong in their code comes out as one sentence that names the place.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from mnistattn.errors import InputError
from mnistattn.generators.variants import closest


def load_class(reference: str) -> type:
    """The class that "FILE.py:CLASS" or "MODULE:CLASS" names. InputError if there is none.

    The class may be left out where the file defines a single nn.Module.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or place.endswith((":", "\\")) or "/" in name or name.endswith(".py"):
        place, name = reference, ""  # no class is named
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
    }
    if not name:
        if len(own) != 1:
            raise InputError(f"{place} defines {len(own)} nn.Modules ({', '.join(own) or 'none'}): "
                             f"name one, as {place}:CLASS.")  # fmt: skip
        return check_class(next(iter(own.values())), f"{place}:{next(iter(own))}")
    found = getattr(module, name, None)
    if found is None:
        there = f"it defines {', '.join(own)}" if own else "it defines no nn.Module"
        raise InputError(f"{place} has no class '{name}': {there}.{closest(name, own)}")
    return check_class(found, f"{place}:{name}")


def check_class(found: object, name: str) -> type:
    """found if it is a class of nn.Modules with a forward of its own, else an InputError."""
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise InputError(f"{name} is no class of torch.nn.Module: see 'mnistattn new-attention'.")
    if found.forward is nn.Module.forward:
        raise InputError(f"{name} has no forward(x, query): see 'mnistattn new-attention'.")
    return found


def code_hash(cls: type) -> str:
    """SHA-256 of the file that defines a class, line ends aside ("" where there is no file)."""
    try:
        file = inspect.getsourcefile(cls)
        return hashlib.sha256(Path(file or "").read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except (OSError, TypeError):
        return ""


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give FILE.py:CLASS, or MODULE:CLASS.")
    # A name of its own for each path, kept in sys.modules, so that inspect and pickle find it.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"mnistattn_plugin_{path.stem}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)  # it may import its neighbours
    before = sys.modules.get(name)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        _run(lambda: spec.loader.exec_module(module), str(path), spec.origin)
    except InputError:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    finally:
        sys.path.remove(folder)
    return module


def _module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"'{name}' is neither a file FILE.py nor the name of a module.")
    sys.path.insert(0, "")  # as `python -m` does: the user's own modules lie where they stand
    try:
        return _run(lambda: importlib.import_module(name), name)
    finally:
        sys.path.remove("")


def _run(load, name: str, file: str | None = None):
    """Import, and turn whatever the user's code raises into one sentence. file: a file's full path,
    as tracebacks have it."""
    try:
        return load()
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            raise InputError(
                f"there is no module '{name}' here: install it, or give FILE.py:CLASS."
            ) from error
        line, at = None, error.__traceback__
        while at:
            here = at.tb_frame.f_code.co_filename, at.tb_frame.f_globals.get("__name__")
            if (file or name) in here:
                line = at.tb_lineno
            at = at.tb_next
        if isinstance(error, SyntaxError) and error.filename == file:
            line = error.lineno
        where = f"{name}, line {line}," if line else name
        raise InputError(
            f"{where} raises {type(error).__name__} on import: {str(error) or 'no message'}."
        ) from error
