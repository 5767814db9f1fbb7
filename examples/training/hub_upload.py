"""The model card of a trained model, and its way to the Hub."""

import argparse
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


def push_to_hub(args: argparse.Namespace) -> None:
    """Upload the output folder, without its checkpoints and logs, to the Hub."""
    api = HfApi(token=args.hub_token)
    repo_id = api.create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True).repo_id
    ignored = ["checkpoint-*", ".checkpoint-*", f"{args.logging_dir}/*", "codes/*"]
    api.upload_folder(
        repo_id=repo_id, folder_path=args.output_dir, commit_message="End of training", ignore_patterns=ignored
    )
