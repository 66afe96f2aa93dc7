"""Classes of the user's, loaded from files and modules: what is found, and every way to fail."""

import hashlib
import inspect
import os
import pickle
import sys
from pathlib import Path

import pytest
from torch import nn

from mnistattn.errors import InputError
from mnistattn.models.plugin import check_class, code_hash, load_class

ONE = """
from torch import nn, Tensor
from torch.nn import Linear  # imported: not of this file


class Mine(nn.Module):
    tag = "TAG"

    def forward(self, x, query):
        return x.mean(1, True)
"""
TWO = ONE + "\n\nclass Other(Mine):\n    pass\n"
NONE = (
    "from torch import nn\nfrom torch.nn import Linear\n\n\nclass Plain:\n    pass\n\n\nvalue = 3\n"
)


@pytest.fixture(autouse=True)
def same_imports():
    """Whatever a test loads is forgotten, and sys.path is as it was after each, failed or not."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    after = list(sys.path)
    sys.path[:] = path
    for name in set(loaded()) - modules:
        del sys.modules[name]
    assert after == path


@pytest.fixture
def file(tmp_path):
    """A function of text and name that writes a file."""

    def write(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refused(reference: str) -> str:
    """The sentence with which a reference is refused, without its full stop."""
    with pytest.raises(InputError) as caught:
        load_class(reference)
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"
    return str(caught.value)[:-1]


def loaded() -> list[str]:
    """The modules in sys.modules that tests here bring in."""
    return [n for n in sys.modules if n.startswith("mnistattn_plugin_") or "_of_a_test" in n]


# -------------------------------------------------------------------------------- what is found


def test_a_class_of_a_file(file):
    path = file(TWO)
    for name in ("Mine", "Other"):
        cls = load_class(f"{path}:{name}")
        assert cls.__name__ == name and issubclass(cls, nn.Module)
        assert inspect.getsourcefile(cls) == str(path)


def test_a_file_with_one_class_needs_no_name(file):
    assert load_class(str(file(ONE))).__name__ == "Mine"


def test_a_file_with_several_classes_needs_a_name(file):
    path = file(TWO)
    assert refused(str(path)) == (
        f"{path} defines 2 nn.Modules (Mine, Other): name one, as {path}:CLASS"
    )


def test_a_file_without_a_class_says_so(file):
    path = file(NONE)
    assert f"{path} defines 0 nn.Modules (none)" in refused(str(path))
    assert refused(f"{path}:Mine") == f"{path} has no class 'Mine': it defines no nn.Module"


def test_a_class_that_the_file_imports_can_be_named(file):
    assert load_class(f"{file(ONE)}:Linear") is nn.Linear


@pytest.mark.parametrize("how", ["absolute", "relative", "here", "dotted"])
def test_a_path_of_any_form(file, how, tmp_path, monkeypatch):
    path = file(ONE, "sub/mine.py")
    monkeypatch.chdir(path.parent if how == "here" else tmp_path)
    name = {"absolute": str(path), "here": "mine.py", "relative": "sub/mine.py",
            "dotted": "./sub/../sub/mine.py"}[how]  # fmt: skip
    assert load_class(name).tag == load_class(f"{name}:Mine").tag == "TAG"


@pytest.mark.skipif(os.name == "nt", reason="no colons in paths there")
def test_a_folder_or_file_with_a_colon(file):
    for name in ("a:b/mine.py", "a:mine.py"):
        path = file(ONE, name)
        assert load_class(str(path)).__name__ == load_class(f"{path}:Mine").__name__ == "Mine"


def test_a_class_of_a_module(file, tmp_path, monkeypatch):
    file("", "package_of_a_test/__init__.py")
    file(TWO, "package_of_a_test/inner.py")
    monkeypatch.chdir(tmp_path)  # a user's own modules lie where they stand
    cls = load_class("package_of_a_test.inner:Other")
    assert (cls.__module__, cls.__name__) == ("package_of_a_test.inner", "Other")
    assert load_class("package_of_a_test.inner:Other") is cls
    assert "defines 2 nn.Modules" in refused("package_of_a_test.inner")
    assert load_class("torch.nn:Linear") is nn.Linear
    assert load_class("mnistattn.models.template").__name__ == "MyAttention"


def test_a_file_imports_its_neighbours(file, tmp_path, monkeypatch):
    file("SHARED = 7\n", "folder/neighbour_of_a_test.py")
    path = file("from neighbour_of_a_test import SHARED\n" + ONE.replace('"TAG"', "SHARED"),
                "folder/mine.py")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert load_class("folder/mine.py").tag == 7
    assert load_class(f"{path}:Mine").tag == 7
    assert str(path.parent) not in sys.path


def test_files_with_one_stem_in_two_folders_do_not_collide(file):
    paths = [file(ONE.replace("TAG", tag), f"{tag}/mine.py") for tag in ("one", "two")]
    first, second = (load_class(str(p)) for p in paths)
    assert (first.tag, second.tag) == ("one", "two")
    assert first.__module__ != second.__module__
    for cls, path in zip((first, second), paths, strict=True):
        assert getattr(sys.modules[cls.__module__], "Mine") is cls  # noqa: B009
        assert inspect.getsourcefile(cls) == str(path) and "TAG" not in inspect.getsource(cls)
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_changed_file_is_loaded_anew(file):
    assert load_class(str(file(ONE))).tag == "TAG"
    assert load_class(str(file(ONE.replace("TAG", "another tag")))).tag == "another tag"


# ------------------------------------------------------------------------------- what is refused


def test_a_file_that_is_not_there(tmp_path):
    for name in ("missing.py", "missing.py:Mine"):
        said = refused(f"{tmp_path}/{name}")
        assert said.startswith(f"{tmp_path}/missing.py does not exist"), said
    (tmp_path / "folder.py").mkdir()
    assert "folder.py does not exist" in refused(f"{tmp_path}/folder.py:Mine")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n\nraise RuntimeError('the sky fell')\n", 3, "RuntimeError on import: the sky fell"),
        ("raise RuntimeError\n", 1, "RuntimeError on import: no message"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", 2, "ZeroDivisionError on import: division"),
        ("import nothing_of_a_test\n", 1, "ModuleNotFoundError on import: No module named"),
        ("import sys\n\nsys.exit(3)\n", 3, "SystemExit on import: 3"),
        ("import sys\nsys.exit()\n", 2, "SystemExit on import: "),
        ("exit('bye')\n", 1, "SystemExit on import: bye"),
        ("x = 1\n\n\ndef f(:\n", 4, "SyntaxError on import: invalid syntax"),
        ("if True:\n    x = 1\n  y = 2\n", 3, "IndentationError on import: "),
        ("from torch import nn\n\n\nclass A(nn.Modul):\n    pass\n", 4, "AttributeError on import"),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError on import"),  # raised elsewhere
        ("import bad_of_a_test\n", 1, "SyntaxError on import: "),  # its line 3 is another file's
        ("\nimport raises_of_a_test\n", 2, "KeyError on import: 'gone'"),
    ],
)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_what_a_file_raises_is_one_sentence_with_its_line(
    file, text, line, said, relative, tmp_path, monkeypatch
):
    file("\n\ndef f(:\n", "sub/bad_of_a_test.py")
    file("\n\n\nraise KeyError('gone')\n", "sub/raises_of_a_test.py")
    path = file(text, "sub/mine.py")
    monkeypatch.chdir(tmp_path)
    name = "sub/mine.py" if relative else str(path)
    before = loaded()
    found = refused(f"{name}:Mine")
    assert found.startswith(f"{name}, line {line}, raises {said}"), found
    assert loaded() == before


def test_bytes_that_are_no_text_are_refused(tmp_path):
    for content in (b"x = 1\0\n", b"x = '\xff\xfe'\n", b"\x80"):
        (tmp_path / "mine.py").write_bytes(content)
        assert "Error on import: " in refused(f"{tmp_path}/mine.py:Mine")


def test_a_failing_file_leaves_the_one_that_was_loaded(file):
    cls = load_class(str(file(ONE)))
    module = sys.modules[cls.__module__]
    path = file("x = 1\nraise ValueError('not this time')\n")
    assert "line 2" in refused(str(path))
    assert sys.modules[cls.__module__] is module and module.Mine is cls
    del sys.modules[cls.__module__]
    refused(str(path))
    assert cls.__module__ not in sys.modules


@pytest.mark.parametrize(("wrong", "right"), [("Mien", "Mine"), ("other", "Other"), ("Zq", None)])
def test_a_class_that_is_not_there(file, wrong, right):
    path = file(TWO)
    found = refused(f"{path}:{wrong}")
    assert found.startswith(f"{path} has no class '{wrong}': it defines Mine, Other")
    assert found.endswith(f"Did you mean '{right}'" if right else "Mine, Other")


@pytest.mark.parametrize("name", ["Plain", "value", "nn", "function"])
def test_what_is_no_module_class_is_refused(file, name):
    path = file(NONE + "\n\ndef function(x, query):\n    return x\n")
    assert f"{path}:{name} is no class of torch.nn.Module" in refused(f"{path}:{name}")


def test_a_class_without_a_forward_is_refused(file):
    path = file("from torch import nn\n\n\nclass Mine(nn.Module):\n    pass\n")
    for reference in (path, f"{path}:Mine"):
        assert f"{path}:Mine has no forward" in refused(str(reference))
    with pytest.raises(InputError, match="mine is no class"):
        check_class(nn.Linear(1, 1), "mine")


@pytest.mark.parametrize("reference", ["nothing_of_a_test:Mine", "nothing_of_a_test.inner:Mine"])
def test_a_module_that_is_not_there(reference):
    module = reference.partition(":")[0]
    assert refused(reference).startswith(f"there is no module '{module}' here: install it")


@pytest.mark.parametrize("reference", ["my-file:Mine", "a b:Mine", ":Mine", "mine.txt/x:Mine", ""])
def test_what_is_neither_file_nor_module(reference):
    assert "is neither a file FILE.py nor the name of a module" in refused(reference)


def test_what_a_module_raises_is_one_sentence_with_its_line(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file("x = 1\nraise RuntimeError('the sky fell')\n", "falls_of_a_test.py")
    file("\n\ndef f(:\n", "bad_of_a_test.py")
    file("import sys\nsys.exit(4)\n", "quits_of_a_test.py")
    file("import nothing_of_a_test\n", "needs_of_a_test.py")
    for name, said in {
        "falls_of_a_test": ", line 2, raises RuntimeError on import: the sky fell",
        "bad_of_a_test": " raises SyntaxError on import: .*line 3",
        "quits_of_a_test": ", line 2, raises SystemExit on import: 4",
        "needs_of_a_test": ", line 1, raises ModuleNotFoundError on import: No module named",
    }.items():
        with pytest.raises(InputError, match=f"^{name}{said}"):
            load_class(f"{name}:Mine")
        assert name not in sys.modules


# ------------------------------------------------------------------------------ the code's digest


def test_the_hash_is_of_the_file_and_not_of_its_line_ends(tmp_path):
    path = tmp_path / "mine.py"
    digests = []
    for text in (ONE, ONE.replace("\n", "\r\n"), ONE + "# a remark\n", ONE.replace("TAG", "GAT")):
        path.write_bytes(text.encode())
        digests.append(code_hash(load_class(str(path))))
    assert digests[0] == hashlib.sha256(ONE.encode()).hexdigest()
    assert digests[0] == digests[1] and len(set(digests)) == 3
    (tmp_path / "elsewhere").mkdir()
    other = path.rename(tmp_path / "elsewhere" / "renamed.py")
    assert code_hash(load_class(str(other))) == digests[3]


def test_what_has_no_file_has_no_hash():
    names: dict = {"nn": nn, "__name__": "no_file_of_a_test"}
    exec("class Mine(nn.Module):\n    pass\n", names)
    assert code_hash(names["Mine"]) == code_hash(int) == ""
