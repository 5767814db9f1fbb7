"""What was trained, on its way to the Hub."""

import argparse

from accelerate.logging import get_logger
from huggingface_hub import HfApi

logger = get_logger(__name__)


def push_to_hub(args: argparse.Namespace) -> None:
    """
    Upload the output folder, without its checkpoints, logs, codes and class pictures, to the Hub.

    Raises:
        Exception: what the upload raises; all that was trained stands in the folder, and the log has the command that
            uploads it.
    """
    ignored = ["checkpoint-*", ".*", f"{args.logging_dir}/*", "codes/*", "class_pictures/*"]
    name = args.hub_model_id or args.output_dir.resolve().name
    try:
        api = HfApi(token=args.hub_token)
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, commit_message="End of training", ignore_patterns=ignored
        )
    except Exception:
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in ignored)
        logger.error(f"The upload failed. Nothing is lost; try again: hf upload {name} {args.output_dir} . {excluded}")
        raise
