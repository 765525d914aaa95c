"""Models on Hugging Face: found by name, downloaded to its cache, and uploaded.

Access, cache, mirrors and proxies are those of huggingface_hub: `hf auth login`, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle1.storage import model_folder

MODEL_FILES = (
    *("transformer*.safetensors", "transformer.safetensors.index.json"),
    *("dvae.safetensors", "image_tokenizer.safetensors"),
    *("autoencoder.safetensors", "decoder*.safetensors", "decoder.safetensors.index.json"),
    *("prior*.safetensors", "prior.safetensors.index.json"),
    *("upsampler*.safetensors", "upsampler.safetensors.index.json"),
    *("vocab.json", "words.json", "model_info.json", "generation.json", "clip/*", "text-*/*"),
)
"""Files of a model folder; others in a repository are neither downloaded nor replaced."""
CARD_NAME = "README.md"
LOGIN = "log in with hf auth login, or set HF_TOKEN"


def is_repo_name(name: str) -> bool:
    """Whether `name` is the form of a repository's name, user/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_repo_name(repo: str) -> None:
    """Raise a ValueError unless `repo` is the form of a repository's name."""
    if not is_repo_name(repo):
        raise ValueError(f"the repository is {repo!r}, expected a name such as user/model")


def find_model(name: str | Path) -> Path:
    """Return the folder of a model: `name`, its newest checkpoint, or a repository's snapshot.

    A folder takes precedence over a repository of the same name.

    Raises: ValueError where there is no such folder, and no such repository that can be read.
    """
    folder = model_folder(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or not is_repo_name(name):
        raise ValueError(f"no model at {name}: the folder does not exist")
    from huggingface_hub import snapshot_download

    with _one_error(f"no model at {name}: the folder does not exist, and", name):
        return Path(snapshot_download(name, allow_patterns=[*MODEL_FILES]))


def upload(folder: Path, repo: str, card: str, private: bool | None = None) -> str:
    """Upload a model folder to a repository, which is created where it does not exist.

    A card that the repository already has is kept: its owner may have edited it.

    Args:
        card: the model card of a repository that has none.
        private: whether a new repository is private; None is the default of the account.

    Returns: the address of the repository.

    Raises: ValueError where it cannot be written, or is public though `private` is set.
    """
    from huggingface_hub import HfApi

    check_repo_name(repo)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    api = HfApi(library_name="dalle1")
    with _one_error(f"cannot upload to {repo}:", repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise ValueError(f"{repo} is public; use another name, or make it private before")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Upload a dalle1 model",
            ignore_patterns=CARD_NAME if api.file_exists(url.repo_id, CARD_NAME) else None,
            delete_patterns=[*MODEL_FILES],
        )
    return str(url)


@contextmanager
def _one_error(start: str, repo: str) -> Iterator[None]:
    """Turn every error of huggingface_hub into a ValueError of one line that starts so."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        why = f"access to {repo} has to be requested at {constants.ENDPOINT}/{repo}; then {LOGIN}"
        raise ValueError(f"{start} {why}") from error
    except errors.RepositoryNotFoundError as error:
        why = f"Hugging Face has no model {repo} that you can read; check the name, or {LOGIN}"
        raise ValueError(f"{start} {why}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.is_offline_mode():
            why = f"{repo} is not in Hugging Face's cache; unset HF_HUB_OFFLINE to use the network"
        else:
            why = f"{constants.ENDPOINT} cannot be reached; check the connection"
        raise ValueError(f"{start} {why}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = error.server_message or f"{constants.ENDPOINT} answers {status}"
        remedy = LOGIN if status in (401, 403) else "try again later"
        raise ValueError(f"{start} {why}; {remedy}") from error
    except ValueError:
        raise
    except Exception as error:  # those of a connection are the HTTP library's own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{start} a request to {constants.ENDPOINT} failed ({reason}); check the connection"
        ) from error
