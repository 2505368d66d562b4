"""What the command line makes of the library's errors: an exit code, and flags in place of arguments' names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusion_accel.errors import AccelerationError

FAILURE, USAGE = 1, 2
#: error -> exit code, by name: some are defined beside torch, which is not imported for them
EXIT_CODES = {
    "ConfigurationError": USAGE,
    "UnsupportedPipelineError": USAGE,
    "FeatureConflictError": USAGE,
    "NoDeviceError": FAILURE,  # a configuration error of the launcher, not of this command
    "AccelerationError": FAILURE,
}


def exit_code(error: AccelerationError) -> int:
    """The exit code of an error: that of its nearest kind in `EXIT_CODES`. The failure of another process of the job
    (parallel.launch.ProcessFailedError) brings the code with which that one ended."""
    own = getattr(error, "exit_code", None)
    return (
        int(own)
        if own is not None
        else next(EXIT_CODES[k.__name__] for k in type(error).__mro__ if k.__name__ in EXIT_CODES)
    )


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library in the words of a command.

    The library names arguments: `count must be …`, `strength 0.01 of …`, `pass overwrite=True`, `… does not take
    mask_image`. Such a name is replaced by the flag where it stands for an argument and nothing else.

    Args:
        message: of an error.
        flags: name of a parameter -> its flag, such as count -> --count.
    """
    if not flags:
        return message
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))

    def flag(match: re.Match[str]) -> str:
        return flags[match["name"]]

    def listed(match: re.Match[str]) -> str:
        return ", ".join(flags.get(name, name) for name in match[0].split(", "))

    message = re.sub(rf"^(?P<name>{names})(?= must | needs? | is needed|: )", flag, message)
    message = re.sub(rf"(?<![\w-])(?P<name>{names})=True\b", flag, message)
    message = re.sub(rf"(?:^|(?<=use )|(?<=or )|(?<=with ))(?P<name>{names})(?= [\d.]+ )", flag, message)
    message = re.sub(r"^(?P<name>(?:control_|mask_)?image)(?= \S+ (?:is|has) )", flag, message)
    message = re.sub(r"(?<=\()(?P<name>restart)(?=\))", lambda match: flags.get("restart", match[0]), message)
    message = re.sub(rf"(?<= needs )(?:(?:{names})(?:, |$))+$", listed, message)
    return re.sub(r"(?<= does not take )[\w, ]+$", listed, message)
