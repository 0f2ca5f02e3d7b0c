"""Files of a repository on the Hugging Face hub; without an answer, what the local cache holds."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mobile_runtime.errors import UserError

# Seconds to wait for the hub to answer before looking at the cache.
HUB_TIMEOUT_S = 10


def fetch(
    model: str,
    revision: str | None,
    choose: Callable[[list[str]], Sequence[str]],
    cached: Sequence[str],
    ways_out: str,
) -> tuple[Path, str]:
    """Download files of a repository; the folder that holds them, and the commit.

    choose: gives the patterns to download, of all files that the repository has. cached: patterns
    to look for in the cache where the hub does not answer. ways_out: what messages advise.
    Raises UserError with one sentence.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from requests import RequestException

    at = f"{model}@{revision}" if revision else model
    try:
        found = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S)
        files = [sibling.rfilename for sibling in found.siblings or []]
        folder = snapshot_download(
            model,
            revision=found.sha,
            allow_patterns=list(choose(files)),
            etag_timeout=HUB_TIMEOUT_S,
        )
        return Path(folder), str(found.sha)
    except GatedRepoError:
        raise UserError(
            f"{at} is gated: accept its licence on its hub page and run `hf auth login`; "
            f"or {ways_out}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"the hub's {model} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {model}, or it is private: check the name, or run "
            f"`hf auth login`; or {ways_out}"
        ) from None
    except HFValidationError as error:
        raise UserError(f"{model!r} is no hub id: {error}") from None
    except (RequestException, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        try:
            folder = snapshot_download(
                model, revision=revision, allow_patterns=list(cached), local_files_only=True
            )
        except (LocalEntryNotFoundError, FileNotFoundError):
            raise UserError(
                f"{at} is no folder here and not in the local cache, and the hub cannot be reached "
                f"({_reason(error)}); {ways_out}"
            ) from None
        return Path(folder), Path(folder).name


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return {"OfflineModeIsEnabled": "offline mode is on", "ConnectTimeout": "no answer"}.get(
        type(error).__name__, "no connection"
    )
