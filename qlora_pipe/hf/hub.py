"""The model hub: what is in the local cache, and fetching what is not. Imports neither torch nor transformers."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from qlora_pipe.errors import SourceError

_WANTED = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
_WANTED += ["special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt", "added_tokens.json"]
# Some checkpoints ship their weights a second time in the publisher's own layout.
_UNWANTED = ["consolidated*", "original/*"]


def cached(name: str) -> Path:
    """The folder of a hub model that was downloaded before; raises SourceError if it was not."""
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise SourceError(
            f"{name}: expected a model on this machine, found none, and a plan downloads nothing; "
            "`qlora-pipe source CONFIG` fetches it"
        ) from error


def download(name: str) -> Path:
    """The folder of a hub model, fetched if need be; raises SourceError."""
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:
        raise SourceError(
            f"{name}: could not be fetched from the hub ({error}); check the name and the connection, or give a local "
            "folder"
        ) from error
