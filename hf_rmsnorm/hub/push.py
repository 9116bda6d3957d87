"""Uploading a checkpoint to the Hub, after checks that need no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import PatchError
from .answers import well_formed
from .card_merge import BEGIN
from .cards import make_card, read_config, write_card
from .folders import read_json
from .loading import from_pretrained
from .records import RECORD

# The base class of what its HTTP library raises, of which huggingface_hub has had more than one.
TRANSPORT_ERROR: Any = HfHubHTTPError.__mro__[1]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    exclude: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Upload the checkpoint in `folder`, patched or not, and return the commit's address.

    Before anything is sent: the checkpoint is loaded as its readers will load it, and its card is
    checked. A patched checkpoint whose card lost our section (`Trainer` writes a card of its own)
    gets it back. The repository and the branch are made if they do not exist.

    Args:
        private: visibility of a new repository; the Hub's default for None.
        revision: branch to upload to; the main one for None.
        exclude: glob patterns of files to leave out.
        trust_remote_code: run modeling code that lies in `folder`, for the check.

    Raises:
        PatchError: the folder is no checkpoint, or one that would not load as what it says.
        ValueError: a repository name that cannot be one.
        PermissionError: there is no token, or the Hub refused it.
        ConnectionError: the Hub cannot be reached.
        OSError: the Hub refused the upload for another reason, or what answered is no Hub.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    check_checkpoint(folder, trust_remote_code)
    check_card(folder)
    api = HfApi()
    if get_token() is None:
        raise PermissionError(
            "there is no token to upload with: run `hf auth login`, or set HF_TOKEN"
        )
    try:
        with well_formed():
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                revision=revision,
                commit_message=commit_message or f"Upload {folder.resolve().name}",
                ignore_patterns=list(exclude or ()),
            )
            return str(commit.commit_url)
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = PermissionError if status in (401, 403) else OSError
        raise kind(f"{api.endpoint} refused: {_line(error)}") from error
    except (TRANSPORT_ERROR, ConnectionError) as error:
        raise ConnectionError(f"cannot reach {api.endpoint}: {_line(error)}") from error
    except RuntimeError as error:  # a worker thread's; the reason is its cause
        raise OSError(f"the upload failed: {_line(error.__cause__ or error)}") from error


def check_checkpoint(folder: Path, trust_remote_code: bool = False) -> None:
    """Load it as a reader will; `PatchError` if that fails or would make up weights."""
    if not folder.is_dir():
        raise PatchError(f"{folder} is not a folder")
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise PatchError(f"{folder} has no weights: no .safetensors or .bin file")
    try:
        model = from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, RuntimeError, ImportError) as error:
        raise PatchError(f"{folder} does not load: {_line(error)}") from error
    for name in (getattr(model.config, "auto_map", None) or {}).values():
        code = folder / f"{str(name).partition('.')[0]}.py"
        if "--" not in str(name) and not code.is_file():  # `repo--module.Class` lies elsewhere
            raise PatchError(f"{code} is missing: nobody without the package could load {folder}")


def check_card(folder: Path) -> None:
    """`PatchError` for a card that the Hub would refuse, or that belongs to another checkpoint."""
    config = read_json(folder / "config.json")
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except ValueError as error:
        raise PatchError(f"{path} cannot be read as a model card: {error}") from None
    if RECORD in config and BEGIN not in text:
        write_card(folder)
    if not path.exists():
        return
    try:
        data = ModelCard.load(path).data
        bases = data.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            validate_repo_id(base)
        tags = data.get("tags") or []
    except HFValidationError as error:
        raise PatchError(f"{path}: base_model is no name on the Hub: {_line(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise PatchError(f"{path} is not a valid model card: {_line(error)}") from None
    wanted = make_card(read_config(folder), None).data.get("tags") if RECORD in config else []
    if missing := [tag for tag in wanted if tag not in tags]:
        raise PatchError(
            f"{path} lacks the tags {', '.join(missing)}: it is of another checkpoint, or was "
            "edited; `hf-rmsnorm card` brings it up to date"
        )


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
