"""An exported folder, put on the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from mrp_lens.edits.serialization import CONFIG_FILE, TENSOR_FILE
from mrp_lens.export.checkpoint import check_inside

CARD = "README.md"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")  # what from_pretrained may pick up
MESSAGE = "Upload an edited model with mrp_lens"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a folder that `export_hf` wrote, or one with an edit and a card; nothing on disk changes.

    Args:
        folder: a model (`config.json`, safetensors) or an edit, with its `README.md`.
        repo_id: "owner/name", or "name" for a repository of one's own; made if there is none.
        private: that only the owner sees the repository. One that exists keeps what it is, so a public one is refused
            unless `private=False`.
        token: of a user who may write there. None: the one of `hf auth login` or HF_TOKEN.
        endpoint: of the Hub. None: HF_ENDPOINT, or huggingface.co.
        revision: branch; made if there is none. None: "main".
        commit_message: None: says that mrp_lens did it.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: no such folder, or it lacks what it must hold.
        ValueError: a name that the Hub does not take, a link that leads out of the folder, a public repository, or one with
            weights that would be loaded instead of these or beside them.
        PermissionError: nobody is logged in, or the token may not write there.
        ConnectionError: the Hub cannot be reached.
        OSError: the Hub refuses for another reason.

    Example:
        >>> push_to_hub("out", "me/my-model-edited")  # doctest: +SKIP
    """
    source = Path(folder)
    _check_folder(source)
    check_name(repo_id)
    api = HfApi(endpoint=endpoint, token=token, library_name="mrp_lens", library_version=version("mrp_lens"))
    with _explained(repo_id, str(api.endpoint)):
        found = _found(api, repo_id) or api.model_info(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        name = str(found.id)
        if private and found.private is False:
            raise ValueError(
                f"{name} exists on {api.endpoint} and is public: everybody would see this model. Choose another repository, make that one "
                "private in its settings, or pass private=False"
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
            found = api.model_info(name, revision=revision)
        _check_leftovers(source, name, [str(file.rfilename) for file in found.siblings or ()])
        commit = api.upload_folder(
            repo_id=name, folder_path=source, revision=revision, commit_message=commit_message or MESSAGE
        )
    return str(commit.commit_url)


def _found(api: Any, repo_id: str) -> Any | None:
    """What the Hub says of a repository; None if it shows none, or if its owner is not named."""
    try:
        return api.model_info(repo_id) if "/" in repo_id else None
    except RepositoryNotFoundError:
        return None


def _check_folder(folder: Path) -> None:
    """Refuse what is no model and no edit, and what would upload files from elsewhere.

    Raises:
        FileNotFoundError: says what is missing.
        ValueError: a link leads out of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}; give one that mrp_lens.export_hf(...) wrote")
    if not _is_model(folder) and not ((folder / CONFIG_FILE).is_file() and (folder / TENSOR_FILE).is_file()):
        raise FileNotFoundError(
            f"{folder} holds neither a model (config.json and .safetensors) nor an edit ({CONFIG_FILE} and {TENSOR_FILE}); "
            "give a folder that mrp_lens.export_hf(...) wrote"
        )
    if not (folder / CARD).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {CARD}, and nobody should meet an edited model without one; export it with mrp_lens.export_hf(...), "
            "which writes the card"
        )
    for file in folder.rglob("*"):  # an upload follows links
        check_inside(folder, file)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def check_name(repo_id: str) -> None:
    """Refuse a name that the Hub does not take.

    Raises:
        ValueError: says why.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} cannot be the name of a repository: {error} Write 'owner/name', such as 'me/my-model-edited'"
        ) from error


def _check_leftovers(folder: Path, name: str, present: list[str]) -> None:
    """Refuse to leave weights of an earlier model beside those of this one: transformers may load the earlier ones.

    Raises:
        ValueError: names them.
    """
    if not _is_model(folder):
        return
    stale = [file for file in present if "/" not in file and file.endswith(WEIGHTS) and not (folder / file).exists()]
    if stale:
        raise ValueError(
            f"{name} holds weights that this folder does not have ({', '.join(stale)}), and they may be loaded instead of these; delete them "
            "there, or choose another repository or revision"
        )


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """What goes wrong inside is raised as an error that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so {endpoint} is not asked; unset it to upload") from error
    except (HTTPError, RuntimeError) as error:
        # A failed upload of one large file arrives as a RuntimeError around the Hub's answer.
        cause = error if isinstance(error, HTTPError) else error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(cause, repo_id, endpoint) from error
        if isinstance(cause, HTTPError):
            raise ConnectionError(
                f"{endpoint} cannot be reached ({cause}); check the network and try again: what has arrived there is not sent again"
            ) from error
        raise OSError(f"uploading to {repo_id} failed ({cause}); try again") from error


def _refusal(error: Any, repo_id: str, endpoint: str) -> OSError:
    """An answer of the Hub as an error with its remedy."""
    status = error.response.status_code
    said = f" It says: {error.server_message}" if error.server_message else ""
    if status == 401:
        return PermissionError(
            f"{endpoint} does not know who is asking: no token, or one that is not valid. Run `hf auth login`, or pass token=...{said}"
        )
    if status == 403:
        return PermissionError(
            f"this token may not write to {repo_id} on {endpoint}. Use a token with the permission to write (`hf auth login`, or token=...), "
            f"or a repository of your own{said and '.' + said}"
        )
    if status in (409, 412):
        return OSError(f"{repo_id} was changed by somebody else at the same time; try again.{said}")
    if status == 404:
        return OSError(f"there is no {repo_id}, or no such revision, that this token can see on {endpoint}.{said}")
    return OSError(f"{endpoint} answered {status} about {repo_id}: {error.server_message or error}")
