"""Uploads and downloads, with the functions and arguments of huggingface_sb3 where it has them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_cyborg.hub.files import FILES, MODEL, check_is_empty

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LIBRARY = "sb3-cyborg"
"""Name of this package in the requests to the Hub."""

DOWNLOADED = ".cache/huggingface"
"""Folder of huggingface_hub in a folder that it has downloaded to."""


def push_to_hub(
    repo_id: str,
    run: str | Path,
    commit_message: str = "Upload an agent with sb3_cyborg",
    token: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> str:
    """
    Upload the agent of a run to the Hub, with a model card: task, returns, learning curve, video, use, config.

    The repository is created if there is none. Its files of the names in ``sb3_cyborg.hub.files`` are replaced, the model card
    among them; further files stay. No file holds a pickle.

    :param repo_id: Repository, as ``"<user or organization>/<name>"``.
    :param run: Folder of a run of ``TrainerV7``, or a file that it saved.
    :param commit_message: Message of the commit.
    :param token: Access token; ``None`` takes that of ``HF_TOKEN`` or of ``hf auth login``.
    :param private: Whether a repository that is created is private; ``None`` takes the default of the organization.
    :param revision: Branch to upload to; ``None`` takes ``main``.
    :param create_pr: Open a pull request instead of changing the branch.
    :param options: Further options of :func:`~sb3_cyborg.hub.packaging.package_run`: ``which``, ``n_eval_episodes``,
        ``deterministic``, ``seeds``, ``video``, ``device``, ``trust``, ``report``.
    :return: Address of the repository, or of the pull request.
    :raises ValueError: for a bad name of a repository, without a token, and as ``package_run`` does.
    :raises ImportError: if a package is missing, with the command that installs it.
    :raises OSError: for refusals of the Hub and failures of the network.
    """
    from sb3_cyborg.hub.packaging import package_run

    api = _api(repo_id, token)
    with _clear_errors(repo_id):
        api.whoami()  # before the evaluation, which may take minutes
    with tempfile.TemporaryDirectory() as folder:
        package_run(run, folder, repo_id, **options)
        with _clear_errors(repo_id):
            url = str(api.create_repo(repo_id, private=private, exist_ok=True))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(FILES),  # an `agent.onnx` of an earlier agent must not stay beside a new model
            )
    return str(getattr(commit, "pr_url", None) or url)


def load_from_hub(
    repo_id: str,
    filename: str = MODEL,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> str:
    """
    Download a file of an agent from the Hub into the cache. Nothing of it is read or run.

    ``MemoryPPO.load(load_from_hub(repo_id))`` loads the model, and ``TrainerV7.load(load_from_hub(repo_id))`` its environment
    as well. Both refuse a file with pickled objects, unless they are called with ``trust=True``.

    :param repo_id: Repository, as ``"<user or organization>/<name>"``.
    :param filename: File of the repository: ``"model.zip"``, or e.g. ``"agent.onnx"``.
    :param revision: Branch, tag or commit; ``None`` takes ``main``.
    :param token: Access token for a private repository; ``None`` takes that of ``HF_TOKEN`` or of ``hf auth login``.
    :param cache_dir: Folder of the cache; ``None`` takes that of huggingface_hub.
    :return: Path of the file on this machine.
    :raises ValueError: for a bad name of a repository, and if there is no such repository, revision or file.
    :raises ImportError: if huggingface_hub is missing, with the command that installs it.
    :raises OSError: for refusals of the Hub and failures of the network.
    """
    api = _api(repo_id, token)
    with _clear_errors(repo_id):
        return str(api.hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))


def download_from_hub(repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """
    Download all files of an agent from the Hub into a folder. Nothing of them is read or run.

    :param repo_id: Repository, as ``"<user or organization>/<name>"``.
    :param folder: Folder for the files: a new or empty one, or one of an earlier download, whose files are replaced.
    :param revision: As for :func:`load_from_hub`, like the other.
    :param token: Access token.
    :return: Path of the model's file in the folder.
    :raises ValueError: as :func:`load_from_hub`, for a folder with other files, and if the repository has no ``model.zip``.
    :raises ImportError: as :func:`load_from_hub`.
    :raises OSError: as :func:`load_from_hub`.
    """
    api, folder = _api(repo_id, token), Path(folder)
    if folder.exists() and not (folder / DOWNLOADED).is_dir():
        check_is_empty(folder)
    with _clear_errors(repo_id):
        # Asked first: without it, `snapshot_download` returns the files of an earlier download if the Hub cannot be reached.
        commit = api.model_info(repo_id, revision=revision).sha
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=list(FILES))
    path = folder / MODEL
    if not path.is_file():
        raise ValueError(
            f"The repository {repo_id!r} has no file {MODEL!r}: `push_to_hub` of this package has not written it."
        )
    return path


def _api(repo_id: str, token: str | None) -> HfApi:
    """
    :return: The client of the Hub.
    :raises ValueError: for a bad name of a repository.
    :raises ImportError: if huggingface_hub is missing.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its documentation has it
    except ImportError as error:
        raise ImportError('The Hub needs huggingface_hub: pip install "sb3-cyborg[hub]"') from error
    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise ValueError(f"`repo_id` must be '<user or organization>/<name>', got {repo_id!r}.")
    validate_repo_id(repo_id)
    return HfApi(token=token, library_name=LIBRARY)


@contextlib.contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """A context in which errors that the input causes are a ``ValueError``."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("The Hub needs an access token: run `hf auth login`, or set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no repository {repo_id!r} on the Hub, or it is not open to you: private and gated ones need a token "
            "(`hf auth login`, or HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"The repository {repo_id!r} has no such revision: {_last_line(error)}") from error
    except LocalEntryNotFoundError as error:  # a kind of `EntryNotFoundError`, but its cause is the network
        raise ConnectionError(f"The Hub cannot be reached, and the file is not in the cache: {error}") from error
    except EntryNotFoundError as error:
        raise ValueError(f"The repository {repo_id!r} has no such file: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
