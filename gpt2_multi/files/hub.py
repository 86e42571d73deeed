"""From a name or a path to a folder of files: a folder itself, the demo model, or a model of the Hugging Face hub.

huggingface_hub does the fetching and keeps the cache; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they
mean there. It is imported when a name has to be fetched, not before.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_multi.errors import CheckpointError

DEMO = Path(__file__).parents[1] / "demo"
TIMEOUT = 10.0  # seconds without an answer; the hub's own client would wait for ever


def _sharded(single: str) -> tuple[str, ...]:
    """A file of weights, its shards, and their index."""
    stem, suffix = single.split(".")
    return single, f"{stem}-[0-9]*-of-[0-9]*.{suffix}", f"{single}.index.json"


CHAT, CHATS = "chat_template.jinja", "additional_chat_templates/*.jinja"  # the template of a chat, and those by name

# The files of a model folder, as patterns of the shell: nothing else in the library lists them.
SETTINGS = ("config.json", "generation_config.json")
RENAMED = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}  # transformers' name -> OpenAI's
TOKENIZER = (
    *RENAMED, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    CHAT, CHATS,
)  # fmt: skip
# Of tokenizers of another kind, which their own libraries read.
FOREIGN = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
WEIGHTS = {  # of each format; the first that a model has is fetched
    "safetensors": _sharded("model.safetensors"),
    "pytorch": _sharded("pytorch_model.bin"),
    "tf-h5": _sharded("tf_model.h5"),
    "flax-msgpack": _sharded("flax_model.msgpack"),
    "keras-hub": ("model.weights.h5", "metadata.json"),
    "openai": ("model.ckpt.*", "checkpoint", "hparams.json", *RENAMED.values()),
    "nanogpt": ("ckpt.pt",),
}
SAVED_MODEL = ("assets", "assets.extra", "fingerprint.pb", "keras_metadata.pb", "saved_model.pb", "variables")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name is one of these."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def varied(pattern: str, variant: str | None) -> str:
    """The name of a file of weights in a variant, such as model.fp16.safetensors; other files keep theirs."""
    if not variant or not (parts := re.fullmatch(r"(model|\w+_model)(-.*)?(\.\w+)(\.index)?(\.json)?", pattern)):
        return pattern
    stem, shard, suffix, index, json = parts.groups(default="")
    return f"{stem}{suffix}{index}.{variant}{json}" if index else f"{stem}.{variant}{shard}{suffix}"


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | os.PathLike[str] = "",
    variant: str | None = None,
    kinds: Iterable[str] = tuple(WEIGHTS),
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """The local folder of a model: a folder as it is, "demo", a published GPT-2's short name, or a name on the hub.

    A folder that exists comes first, whatever its name. `allow_patterns` are the files to fetch, by default those of a
    model and its tokenizer, with weights of the first of `kinds` that there is, in a `variant` where one is named.
    `subfolder` is where they lie within. Raises CheckpointError for whatever cannot be found or fetched.
    """
    name, within = os.fspath(name_or_path), Path(os.fspath(subfolder or ""))
    if within.is_absolute() or ".." in within.parts:
        raise CheckpointError(f"subfolder: expected a folder within {name}, found {os.fspath(subfolder)!r}")
    if (kind := _kind(name)) == "folder":
        return _inside(Path(name), within)
    if kind == "file":
        raise CheckpointError(f"{name}: expected a model folder, found a file; give the folder that it lies in")
    if name == "demo":
        return _inside(DEMO, within)
    if not isinstance(name_or_path, str) or _looks_like_path(name):
        raise CheckpointError(
            f"{name!r}: there is no such folder; check the path, or give a name on the hub such as gpt2"
        )
    repo = ARCHIVE[name].hub_id if name in ARCHIVE else name
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "force_download": force_download}
    fetch = partial(_fetch, repo, options, local_files_only, within)
    if allow_patterns is not None:
        return fetch(allow_patterns)
    for weights in ([varied(pattern, variant) for pattern in WEIGHTS[kind]] for kind in kinds):
        found = fetch([*SETTINGS, *TOKENIZER, *FOREIGN, *weights])
        if any(list(found.glob(pattern)) for pattern in weights):
            return found
    if local_files_only or _offline():  # huggingface_hub itself says so only since version 2
        raise CheckpointError(_not_cached(repo, local_files_only))
    return found


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _not_cached(repo: str, local: bool) -> str:
    way = "without local_files_only" if local else "without HF_HUB_OFFLINE"
    return f"{repo}: not (or not whole) in the cache, and the hub may not be asked; fetch it once {way}"


def _inside(folder: Path, within: Path) -> Path:
    if not (folder / within).is_dir():
        raise CheckpointError(f"{folder / within}: there is no such folder; check subfolder")
    return folder / within


def _kind(name: str) -> str:
    try:
        return "folder" if name and Path(name).is_dir() else "file" if name and Path(name).exists() else "nothing"
    except (OSError, ValueError):  # longer than a path may be, or with a zero byte in it
        return "nothing"


def _looks_like_path(name: str) -> bool:
    return not name or name[0] in "./~\\" or name.endswith(("/", "\\")) or name.count("/") > 1 or ":" in name


def _fetch(repo: str, options: dict[str, Any], local: bool, within: Path, patterns: Sequence[str]) -> Path:
    """Ask the hub first, within a time; where it does not answer, what the cache has will do."""
    from huggingface_hub import snapshot_download

    refusal = None if local else _ask(repo, options["revision"], options["token"])
    wanted = [(within / pattern).as_posix() for pattern in patterns]
    try:
        found = snapshot_download(repo, **options, allow_patterns=wanted, local_files_only=local or refusal is not None)
    except Exception as error:  # whatever lies between here and the hub has its own kinds
        raise CheckpointError(_sentence(repo, options["revision"], refusal or error, local)) from error
    if not Path(found, within).is_dir():
        raise CheckpointError(f"{repo}: the hub has none of {', '.join(wanted)} there; it is not a model to load")
    return Path(found, within)


def _ask(repo: str, revision: str | None, token: str | bool | None) -> Exception | None:
    """Why the hub will not give a model, or None; the reason, where the cache lacks it too, is the user's to read."""
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).model_info(repo, revision=revision, timeout=TIMEOUT)
    except Exception as error:
        return error
    return None


def push(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what `save` writes into a folder to a model of the hub, which is made where it is missing.

    Returns the address of the commit. Raises CheckpointError where the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message or "Upload a GPT-2", commit_description=commit_description,
            )  # fmt: skip
        except Exception as error:
            raise CheckpointError(_sentence(repo_id, revision, error, False)) from error
    return str(commit.commit_url)


def _sentence(repo: str, revision: str | None, error: Exception, local: bool) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)  # before version 1, some have no answer
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r}: neither a folder here nor a name that the hub could have; expected owner/name"
    if local or isinstance(error, errors.OfflineModeIsEnabled):
        return _not_cached(repo, local)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: the hub has no revision {revision!r} of it; check the branch, tag or commit"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{repo}: the hub refuses access ({status}); ask for access on its page, and give a token that has it"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{repo}: neither a folder here nor a model on the hub that this token can see ({status}); check the name, "
            "and give a token if it is private"
        )
    if status:
        return f"{repo}: the hub answered with an error ({status}) and the cache lacks the model; try again later"
    while error.__cause__ or error.__context__:  # the first of a chain of errors is what happened
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{repo}: could not be fetched ({reason}); check the network, or give a folder that holds the model"


class Archived(NamedTuple):
    """A published GPT-2: where the hub keeps it, and its size."""

    hub_id: str
    n_layer: int
    n_head: int
    n_embd: int


ARCHIVE = {
    "gpt2": Archived("openai-community/gpt2", 12, 12, 768),
    "gpt2-medium": Archived("openai-community/gpt2-medium", 24, 16, 1024),
    "gpt2-large": Archived("openai-community/gpt2-large", 36, 20, 1280),
    "gpt2-xl": Archived("openai-community/gpt2-xl", 48, 25, 1600),
    "distilgpt2": Archived("distilbert/distilgpt2", 6, 12, 768),
}

# What programs of 2019 and 2020 look a published GPT-2 up in: its short name -> where the hub keeps a file of it.
GPT2_PRETRAINED_MODEL_ARCHIVE_LIST = TF_GPT2_PRETRAINED_MODEL_ARCHIVE_LIST = list(ARCHIVE)


def _archive_map(file: str) -> dict[str, str]:
    return {name: f"https://huggingface.co/{known.hub_id}/resolve/main/{file}" for name, known in ARCHIVE.items()}


GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP = _archive_map("config.json")
GPT2_PRETRAINED_MODEL_ARCHIVE_MAP = _archive_map("pytorch_model.bin")
TF_GPT2_PRETRAINED_MODEL_ARCHIVE_MAP = _archive_map("tf_model.h5")
