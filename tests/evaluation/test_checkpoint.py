"""Files of weights: whole, or one sentence; never unpickled."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnistattn.errors import InputError
from mnistattn.evaluation.checkpoint import (
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(4, 3),
        "turned": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "half": torch.randn(3).bfloat16(),
        "none": torch.zeros(0, 2),
        "learned": torch.nn.Parameter(torch.randn(2)),
    }


def test_round_trip(tmp_path):
    note = {"identity": {"model": "ctx", "lr": 0.003}, "history": [{"epoch": 1, "loss": 0.1}]}
    save_tensors(tmp_path / "a.safetensors", tensors(), note)
    loaded, found = load_tensors(tmp_path / "a.safetensors")
    assert found == note
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def cut_in_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def flipped_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8] ^= 0xFF
    file.write_bytes(data)


def huge_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text("not a checkpoint\n")


def foreign(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(file))


def foreign_note(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(file), metadata={"format": "pt"})


def broken_note(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(file), metadata={"mnistattn": "{"})


def torch_saved(file: Path) -> None:
    torch.save(tensors(), file)


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Trap(str(file.with_name("trapped")))))


def missing(file: Path) -> None:
    file.unlink()


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE = [truncated, cut_in_the_header, flipped_header, huge_header, empty, text, foreign,
          foreign_note, broken_note, torch_saved, pickled, missing, directory]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_file_is_one_sentence(tmp_path, damage):
    file = tmp_path / "a.safetensors"
    save_tensors(file, tensors(), {})
    damage(file)
    with pytest.raises(InputError) as caught:
        load_tensors(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message and message.endswith(".")
    assert ("does not exist" in message) == (damage is missing)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_saving_leaves_the_old_file(tmp_path, monkeypatch, error):
    file = tmp_path / "a.safetensors"
    save_tensors(file, tensors(), {"epoch": 1})

    write = Path.write_bytes

    def fail(path, data):
        write(path, data[: len(data) // 2])
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(Path, "write_bytes", fail)
        save_tensors(file, tensors(), {"epoch": 2})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert load_tensors(file)[1] == {"epoch": 1}


def test_a_file_may_be_read_by_whom_other_files_may(tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "other"
    save_tensors(file, tensors(), {})
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_saving_replaces(tmp_path):
    file = tmp_path / "a.safetensors"
    for epoch in (1, 2):
        save_tensors(file, tensors(), {"epoch": epoch})
    assert load_tensors(file)[1] == {"epoch": 2}
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path, kind):
    def steps(network, optimizer, count: int) -> None:
        for i in range(count):
            optimizer.zero_grad()
            network(torch.full((2, 3), i + 1.0)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = kind(network.parameters(), 0.01)
    steps(network, optimizer, 3)
    state = {f"last.{k}": v for k, v in network.state_dict().items()}
    save_tensors(tmp_path / "a", state | optimizer_tensors(optimizer), {})
    steps(network, optimizer, 3)

    other = torch.nn.Linear(3, 2)
    again = kind(other.parameters(), 0.01)
    loaded, _ = load_tensors(tmp_path / "a")
    other.load_state_dict({k[5:]: v for k, v in loaded.items() if k.startswith("last.")})
    restore_optimizer(again, loaded)
    steps(other, again, 3)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    saved = (o.state_dict()["state"] for o in (optimizer, again))
    for one, two in zip(*(s.values() for s in saved), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def test_any_flipped_bit_is_found(tmp_path):
    """In the tensors, too, which safetensors itself does not check."""
    file = tmp_path / "a.safetensors"
    save_tensors(file, tensors(), {"history": [1, 2, 3]})
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    missed = []
    for at in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        file.write_bytes(flipped)
        try:
            load_tensors(file)
            missed.append(at)
        except InputError as error:
            assert "is damaged" in str(error)
    # Blanks may fill the header up: what stands there instead changes nothing that is read.
    assert all(8 <= at < 8 + length and data[at : at + 1] == b" " for at in missed)


def test_files_without_a_digest_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"mnistattn": "{}"})
    loaded, note = load_tensors(tmp_path / "old.safetensors")
    assert note == {} and torch.equal(loaded["a"], torch.ones(2))
