"""Models by name: a path on this machine, or a repository of the Hugging Face Hub, downloaded or from the local cache."""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from mergekit_cl.errors import CheckpointError

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)

_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.spm", "*.codes", "*.py"]
_NEEDED += ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
"""What a merge reads or copies. No pickle is downloaded."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")


def resolve(where: str | Path, revision: str | None = None) -> Path:
    """Find the file or folder that a user names; what exists on this machine wins over a repository of the same name.

    A `Path` is never looked up on the hub. The environment of huggingface_hub holds: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE.

    Args:
        where: A path, or a hub id: ``"name"`` or ``"organisation/name"``.
        revision: A branch, tag or commit of the repository.

    Raises:
        CheckpointError: There is neither, or a revision is asked of a local path.

    """
    if not str(where):
        raise CheckpointError("the path of a model is empty; give a file, a folder or a hub id")
    if os.path.exists(where):
        if revision is not None:
            raise CheckpointError(
                f'{where}: is a local path, which has no revision "{revision}"; leave the revision away, or check it out there'
            )
        return Path(where)
    if isinstance(where, Path) or not _HUB_ID.fullmatch(where) or where.lower().endswith(_WEIGHTS):
        raise CheckpointError(_no_such(where))
    return _download(where, revision)


def _download(where: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f'{_no_such(where)}; if it is a model of the Hugging Face Hub: pip install "mergekit-cl[hub]"'
        ) from error
    try:
        return Path(snapshot_download(where, revision=revision, allow_patterns=_NEEDED))
    except Exception as error:  # of the network, the server, the cache or the disk: all mean that there is no folder
        reason = " ".join(str(error).split()) or type(error).__name__
        at = "" if revision is None else f' at revision "{revision}"'
        near = _did_you_mean(where)
        raise CheckpointError(
            f"{where}: neither a folder here{near and f' ({near})'} nor a model of the Hugging Face Hub{at}: {reason}"
        ) from error


def _no_such(where: str | Path) -> str:
    near = _did_you_mean(where)
    return f"{where}: no such file or folder{near and f'; {near}'}"


def _did_you_mean(where: str | Path) -> str:
    """Ask for the path beside one that does not exist whose name is nearest, if any is near."""
    path = Path(where)
    try:
        near = get_close_matches(path.name, os.listdir(path.parent), n=1)
    except (OSError, ValueError):
        near = []
    return f'did you mean "{path.parent / near[0]}"?' if near else ""
