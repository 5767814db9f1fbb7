"""The model card of a trained model, and its way to the Hub."""

import argparse
import shlex
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData


def save_model_card(folder: Path, description: str, base_model: str | None, tags: list[str]) -> None:
    """Write the README.md of a trained model."""
    data = ModelCardData(
        library_name="diffusers", base_model=base_model, tags=["bitdance", "diffusers-training", *tags]
    )
    partial = folder / ".README.md.partial"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n\n{description}\n").save(partial)
    partial.replace(folder / "README.md")


def open_repository(args: argparse.Namespace) -> str:
    """
    Create the repository of `--push_to_hub`, or find that it is there and may be written to; its id, with its owner.

    Raises:
        ValueError: if neither can be done.
    """
    name = args.hub_model_id or args.output_dir.resolve().name
    api = HfApi(token=args.hub_token)
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    except Exception as error:  # the client's errors and those of its connections have no common class of their own
        raise ValueError(f"--push_to_hub: the repository {name} cannot be written to: {error}") from error
    return repo_id


def push_to_hub(args: argparse.Namespace, repo_id: str) -> None:
    """
    Upload the output folder, without its checkpoints, logs and codes, to the Hub.

    Raises:
        RuntimeError: if that fails; it says where everything lies and how to upload it.
    """
    ignored = ["checkpoint-*", ".checkpoint-*", f"{args.logging_dir}/*", "codes/*"]
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=ignored,
        )
    except Exception as error:  # see above
        excluded = [part for pattern in ignored for part in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(args.output_dir), ".", *excluded])
        raise RuntimeError(
            f"The training is done and all of it is in {args.output_dir}, but the upload to {repo_id} failed: {error}"
            f"\nTo upload it: {command}"
        ) from error
