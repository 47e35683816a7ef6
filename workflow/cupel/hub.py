"""Models of the Hugging Face hub: a repository at a commit, in the hub's own cache. No code of it is run."""

from collections.abc import Sequence
from pathlib import Path

from cupel.files import digest


class ModelUnavailable(OSError):
    """A model could not be had; the text says why and what to do."""


def snapshot(repository: str, revision: str | None, files: Sequence[str], left_out: Sequence[str] = ()) -> Path:
    """Folder of a model (`owner/name`) in the hub's cache; large files are compared with the sha256 that the hub states.

    Args:
        revision: commit, tag or branch; None: the newest. The name of the folder is the commit found.
        files, left_out: patterns of the files that are taken, and of those among them that are not.

    Raises:
        ModelUnavailable: the hub is out of reach and its cache lacks the model, or it gives no access, or knows no such model.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    where, said = f"{repository}{f' at {revision}' if revision else ''}", None
    try:
        try:
            said = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=15)
        except (GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:  # no network, switched off, broken: what its cache holds may be enough
            reason = "it is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else type(error).__name__
        found = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files),
                                       ignore_patterns=list(left_out), local_files_only=said is None))
    except GatedRepoError:
        raise ModelUnavailable(
            f"{repository} is gated: accept its licence on its hub page with your account, make a read token there, and "
            "give it as the environment variable HF_TOKEN or by `hf auth login`; then run the same command again") from None
    except HFValidationError:
        raise ModelUnavailable(f"{repository!r} is no folder that is there, and no name of the hub, owner/name") from None
    except RevisionNotFoundError:
        raise ModelUnavailable(f"{repository} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ModelUnavailable(f"the hub knows no {repository}, or shows it only to an account with access: check the name, "
                               "or give a token as HF_TOKEN or by `hf auth login`") from None
    except Exception as error:  # the hub client raises many kinds, all of them mean "not from here"
        if said is None:
            raise ModelUnavailable(f"the hub does not answer ({reason}), and its cache {constants.HF_HUB_CACHE} does not "
                                   f"hold {where}") from None
        raise ModelUnavailable(f"{where} was not fetched whole ({type(error).__name__}: "
                               f"{(str(error).splitlines() or [''])[0][:200]}); run the same command again (it goes on where "
                               "it stopped)") from None
    for sibling in said.siblings or [] if said else []:
        path = found / sibling.rfilename
        if sibling.lfs is not None and path.is_file() and digest(path) != sibling.lfs.sha256:
            path.resolve().unlink()
            raise ModelUnavailable(f"{repository}: {sibling.rfilename} is damaged and has been removed; run the same command "
                                   "again to fetch it anew")
    return found
