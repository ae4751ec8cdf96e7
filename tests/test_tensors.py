"""Safetensors: what the library accepts and we do not, what neither may accept, and the bytes we write."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save, save_file

from adapterhub.errors import IntegrityError, NotFound, UnsafeFile
from adapterhub.files.safetensors_header import MAX_HEADER, read_header, read_layout
from adapterhub.tensors import file

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def blob(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes):
    return {"a": {**ENTRY, **changes}}


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
DAMAGED = {
    "empty file": b"",
    "seven bytes": b"\7\0\0\0\0\0\0",
    "length only": (2).to_bytes(8, "little"),
    "length 2^64-1": b"\xff" * 8 + b"{}",
    "length beyond the file": (100).to_bytes(8, "little") + b"{}",
    "truncated data": blob({"a": ENTRY}, b"\0" * 7),
    "trailing byte": blob({"a": ENTRY}, b"\0" * 9),
    "overlap": blob({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12),
    "equal range": blob({"a": ENTRY, "b": ENTRY}),
    "hole": blob({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"\0" * 20),
    "shape overflow": blob(entry(shape=[1 << 62, 1 << 62])),
    "shape over 2^63": blob(entry(shape=[1 << 64])),
    "negative shape": blob(entry(shape=[-2])),
    "negative offset": blob(entry(data_offsets=[-8, 0])),
    "offsets backwards": blob(entry(data_offsets=[8, 0])),
    "float shape": blob(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}'),
    "true as a shape": blob(entry(shape=[True, 2])),
    "NaN as a shape": blob(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "number of 5,000 digits": blob(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
    "unknown field": blob(entry(code="x")),
    "field missing": blob({"a": {"dtype": "F32", "shape": [2]}}),
    "three offsets": blob(entry(data_offsets=[0, 8, 8])),
    "dtype a number": blob(entry(dtype=32)),
    "entry a list": blob({"a": [1]}),
    "metadata not text": blob({"__metadata__": {"a": 1}, "a": ENTRY}),
    "metadata a list": blob({"__metadata__": [], "a": ENTRY}),
    "duplicate name": blob(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)),
    "duplicate field": blob(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "not UTF-8": blob(b'{"\xff\xfe":1}'),
    "header cut": blob(b'{"a":'),
    "leading blank": blob(b" " + json.dumps({"a": ENTRY}).encode()),
    "header a list": blob(b"[]", b""),
}
UNSAFE = {
    "path as a name": blob({"../../etc/x": ENTRY}),
    "two dots": blob({"a..b": ENTRY}),
    "NUL in a name": blob({"a\0": ENTRY}),
    "escape in a name": blob({"\x1b[2J": ENTRY}),
    "newline in a name": blob({"a\n": ENTRY}),
    "no name": blob({"": ENTRY}),
    "1 MB name": blob({"a" * (1 << 20): ENTRY}),
    "513 byte name": blob({"a" * 513: ENTRY}),
    "metadata of 65 KB": blob({"__metadata__": {"a": "x" * 65537}, "a": ENTRY}),
    "unknown dtype": blob(entry(dtype="C64")),
    "nine dimensions": blob(entry(shape=[1] * 8 + [2])),
    "deep JSON": blob(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "deep tables": blob(b'{"a":' * 60_000 + b"1" + b"}" * 60_000),
    "70,000 tensors": blob(json.dumps({f"t{i}": EMPTY for i in range(70_000)}).encode(), b""),
    "140,000 tensors": blob(json.dumps({f"t{i}": EMPTY for i in range(140_000)}, separators=(",", ":")).encode()[:MAX_HEADER], b""),
    "header over 8 MiB": blob(json.dumps({"__metadata__": {"a": "x" * MAX_HEADER}}).encode()),
    "pickle": pickle.dumps({"a": 1}),
    "old pickle": b"\x80\x02}q\0X\x01\0\0\0aq\x01K\x01s.",
    "torch.save's zip": b"PK\x03\x04" + b"\0" * 60,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "data"),
    [pytest.param(IntegrityError, d, id=n) for n, d in DAMAGED.items()]
    + [pytest.param(UnsafeFile, d, id=n) for n, d in UNSAFE.items()],
)
def test_D1_D2_hostile_files_are_refused_at_once(tmp_path, kind, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        read_header(path)
    message = str(caught.value)
    assert len(message) < 400 and message.isprintable() and caught.value.hint
    with pytest.raises(kind):
        file.load(data)


def test_D1_D2_memory_is_bounded():
    """Headers of 8 MiB made of as many small objects as fit, in a process that has only the checker in it."""
    program = """
from adapterhub.errors import HubError
from adapterhub.files.safetensors_header import MAX_HEADER, read_header
for text in (
    b'{"a":[' + b"[]," * 2_700_000 + b"1]}",
    b'{"a":[' + b"{}," * 2_700_000 + b"1]}",
    b'{"a":[' + b"1," * 4_100_000 + b"1]}",
    b'{"a":[' + b"[]," * 800_000 + b"1]}",
    b"{" + b",".join(b'"%d":1' % i for i in range(700_000)) + b"}",
    b"{" + b",".join(b'"%d":1' % i for i in range(550_000)) + b"}",
):
    assert len(text) <= MAX_HEADER
    try:
        read_header(len(text).to_bytes(8, "little") + text)
    except HubError:
        continue
    raise AssertionError("accepted")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 << 10  # KiB, the interpreter and the texts included


def test_header_is_what_the_library_wrote(tmp_path):
    given = {
        "model.layers.0.x": torch.randn(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True]),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    save_file(given, path, metadata={"format": "pt"})
    assert read_header(path) == {
        "b": ("BF16", (5,)),
        "empty": ("F32", (0, 7)),
        "f8": ("F8_E4M3", (3,)),
        "flag": ("BOOL", (1,)),
        "model.layers.0.x": ("F32", (3, 4)),
        "scalar": ("I64", ()),
    }
    offset = read_layout(path)["model.layers.0.x"].offset
    assert path.read_bytes()[offset : offset + 48] == given["model.layers.0.x"].numpy().tobytes()
    loaded = file.load(path)
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[n].float(), given[n].float()) and loaded[n].dtype == given[n].dtype for n in given)


def test_names_come_in_their_order(tmp_path):
    """The library gives them in another order at each call, and an optimiser counts parameters by their order."""
    names = [f"layers.{n}.{key}" for n in range(16) for key in ("down", "up")]
    data = save({name: torch.zeros(1) for name in reversed(names)})
    (tmp_path / "file").write_bytes(data)
    for source in (data, tmp_path / "file"):
        assert list(file.load(source)) == sorted(names)


def test_no_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFound):
            read_header(path)


def test_a_pipe_is_refused_unopened(tmp_path):
    """To open one waits for whoever writes to it: forever."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UnsafeFile, match="no plain file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_D8_values_that_are_no_numbers(tmp_path, bad, dtype):
    given = {"fine": torch.zeros(3), "broken": torch.tensor([0, bad, 0], dtype=dtype)}
    with pytest.raises(UnsafeFile, match="broken"):
        file.dump(given)
    data = save(given)
    with pytest.raises(UnsafeFile, match="broken") as caught:
        file.load(data)
    assert "fine" not in str(caught.value)


def test_equal_tensors_give_equal_bytes(device):
    a, b = torch.randn(4, 6), torch.arange(5)
    shared = torch.randn(8, 6)
    data = file.dump({"x.a": a, "x.b": b, "top": shared[:4], "low": shared[4:]})
    other = file.dump(
        {
            "low": shared[4:].clone(),
            "x.b": b.clone(),
            "top": shared[:4].to(device).requires_grad_(),
            "x.a": a.t().contiguous().t(),
        }
    )
    assert data == other
    loaded = file.load(data, device)
    assert torch.equal(loaded["x.a"].cpu(), a) and loaded["x.a"].device.type == device
    assert data != file.dump({"x.a": a + 1e-6, "x.b": b, "top": shared[:4], "low": shared[4:]})


@pytest.mark.parametrize("name", ["../x", "a b", "", "é"])
def test_a_name_that_load_refuses_is_not_written(name):
    with pytest.raises(UnsafeFile):
        file.dump({name: torch.zeros(1)})
