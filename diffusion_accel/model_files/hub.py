"""Why a model of the hub could not be loaded, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

from .names import HUB_ID

_OFFLINE = "offline mode is on (HF_HUB_OFFLINE); download it once without that, or name a local folder"
_UNREACHABLE = "the hub cannot be reached; check the connection, or name a local folder"
#: class names in an error's chain of causes, the first that is found decides -> what it means; {} is the id
_REASONS = {
    "OfflineModeIsEnabled": f"it is not on this machine, and {_OFFLINE}",
    "GatedRepoError": "it needs a login: accept its terms at https://huggingface.co/{}, then run `hf auth login`",
    "RepositoryNotFoundError": (
        "the hub has no such model, or it is private: check the spelling, or log in with `hf auth login`"
    ),
    "RevisionNotFoundError": "it has no such revision",
    "LocalEntryNotFoundError": f"it is not on this machine, and {_UNREACHABLE}",
    "RemoteEntryNotFoundError": "it lacks a file that is needed: it may be no diffusers pipeline",
    "EntryNotFoundError": "it lacks a file that is needed: it may be no diffusers pipeline",
    "ConnectError": f"it is not on this machine, and {_UNREACHABLE}",
    "TimeoutException": f"it is not on this machine, and {_UNREACHABLE}",
    "NetworkError": f"it is not on this machine, and {_UNREACHABLE}",
    "gaierror": f"it is not on this machine, and {_UNREACHABLE}",
    "TimeoutError": f"it is not on this machine, and {_UNREACHABLE}",
    "ConnectionError": f"it is not on this machine, and {_UNREACHABLE}",
}


def hub_reason(name: str, error: BaseException) -> str | None:
    """What went wrong with the hub id `name`; None if it is no hub id, or the hub has nothing to do with it."""
    if not HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    kinds: set[str] = set()
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        kinds |= {cls.__name__ for cls in type(link).__mro__}
        link = link.__cause__ or link.__context__
    return next((text.replace("{}", name) for kind, text in _REASONS.items() if kind in kinds), None)
