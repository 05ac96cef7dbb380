"""The only file that sends anything to the Hugging Face hub, and only when it is asked to."""

from __future__ import annotations

from pathlib import Path

from polyrank.errors import InputError


class UploadError(InputError):
    """A folder cannot be uploaded."""


def check_online() -> None:
    """Refuses where the hub is turned off.

    Raises:
        UploadError: if HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise UploadError("--push: HF_HUB_OFFLINE is set, so nothing is sent to the hub; unset it, or leave --push out")


def upload(folder: Path, repo: str) -> str:
    """Uploads a folder as one commit; a repository that is made for it is private.

    Args:
        folder: what to upload, all of it.
        repo: ``user/name`` on the hub.

    Returns:
        The repository's address.

    Raises:
        UploadError: if the hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    check_online()
    try:
        made = HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by polyrank")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        again = f"it is written, and `hf upload {repo} {folder}` tries again"
        raise UploadError(f"--push: {repo}: the hub did not take {folder} ({again}): {error}") from None
    return str(made)
