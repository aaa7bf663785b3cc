"""Fuzz the reader of headers with atheris: ``python tests/checkpoint/fuzz_header.py -max_total_time=300 [CORPUS]``.

A file is either read, and then its tensors cover it exactly, or it is refused with a `CheckpointError`. Not run by pytest.
"""

import json
import struct
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from mergekit_cl.errors import CheckpointError

atheris = import_module("atheris")
with atheris.instrument_imports(include=["mergekit_cl.checkpoint"]):
    from mergekit_cl.checkpoint import header

# json's parser in Python, which can be followed, instead of the one in C
decoder: Any = json.decoder
decoder.JSONObject = atheris.instrument_func(decoder.JSONObject)
decoder.JSONArray = atheris.instrument_func(decoder.JSONArray)
decoder.scanner.make_scanner = atheris.instrument_func(decoder.scanner.py_make_scanner)

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "a.safetensors"


def one(data: bytes) -> None:
    """Read a file of these bytes: as they are, or with the length of a header put before them."""
    if data[:1] == b"{":  # a fuzzer seldom finds a length that fits
        end = data.rfind(b"}") + 1
        data = struct.pack("<Q", end) + data
    path.write_bytes(data)
    try:
        file, tensors = header.read_header(path)
    except CheckpointError as error:
        str(error).encode()
        return
    assert file.size == len(data)
    start = 8 + int.from_bytes(data[:8], "little")
    for tensor in tensors:
        assert tensor.offset == start
        assert all(size >= 0 for size in tensor.shape)
        tensor.name.encode()
        start += tensor.nbytes
    assert start == len(data)


def seeds(corpus: Path) -> None:
    """Write some files to start from into an empty corpus."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for number, (contents, data) in enumerate(
        [
            ({}, 0),
            ({"a": entry}, 4),
            ({"a": entry, "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [4, 8]}}, 8),
            ({"__metadata__": {"format": "pt"}, "a": entry}, 4),
        ]
    ):
        (corpus / f"seed{number}").write_bytes(json.dumps(contents).encode() + bytes(data))


if __name__ == "__main__":
    corpora = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if not corpora:
        corpora = [Path(folder.name) / "corpus"]
        sys.argv.append(str(corpora[0]))
    corpora[0].mkdir(exist_ok=True)
    if not any(corpora[0].iterdir()):
        seeds(corpora[0])
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
