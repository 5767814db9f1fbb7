"""What was trained, on its way to the Hub."""

import argparse
import shlex

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

logger = get_logger(__name__)


def repository_name(args: argparse.Namespace) -> str:
    """As it was asked for; the Hub puts the owner in front where that is missing."""
    return args.hub_model_id or args.output_dir.resolve().name


def open_repository(args: argparse.Namespace) -> str | None:
    """
    Create the repository of `--push_to_hub`, or find that it is there and may be written to; its id, with its owner,
    or None where the Hub cannot be reached now: the upload at the end tries again.

    Raises:
        ValueError: if the Hub refuses.
    """
    name = repository_name(args)
    api = HfApi(token=args.hub_token)
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError) as error:
        raise ValueError(f"--push_to_hub: the repository {name} cannot be written to: {error}") from error
    except Exception as error:  # connections have errors of their own, which have no common class
        logger.warning(f"--push_to_hub: the Hub cannot be reached ({error}); the upload at the end will try again.")
        return None
    return repo_id


def push_to_hub(args: argparse.Namespace, repo_id: str | None) -> None:
    """
    Upload the output folder, without its checkpoints, logs, codes and class pictures, to the Hub.

    Raises:
        RuntimeError: if that fails; it says where everything lies and how to upload it.
    """
    ignored = ["checkpoint-*", ".checkpoint-*", f"{args.logging_dir}/*", "codes/*", "class_pictures/*"]
    known, repo_id = repo_id is not None, repo_id or repository_name(args)
    try:
        if not known:
            repo_id = open_repository(args) or repo_id
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=ignored,
        )
    except Exception as error:  # of the Hub, its client or the connection
        excluded = [part for pattern in ignored for part in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(args.output_dir), ".", *excluded])
        raise RuntimeError(
            f"The training is done and all of it is in {args.output_dir}, but the upload to {repo_id} failed: {error}"
            f"\nTo upload it: {command}"
        ) from error
