"""What the reuse engine did, for people: its counters in words."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_accel.report import several, size

#: what is done at steps that are not computed whole
_KINDS = {"hold": "held", "shallow": "in the outer blocks only", "decoder": "in the decoder only"}


def in_words(counters: Mapping[str, float]) -> str:
    """Counters of `Reuse` and `EncoderReuse`, see there; what did not happen is left out."""
    count = dict.fromkeys(("full_steps", "reused_steps", "decoder_steps"), 0.0) | dict(counters)
    said = []
    if "blocks_run" in counters:  # one of diffusers' caches
        blocks, attentions = (several(count[f"{what}_run"], "time") for what in ("blocks", "attentions"))
        said.append(f"blocks of the denoiser computed {blocks}, attentions {attentions}")
    if "full_steps" in counters:
        kinds = {kind: count.get(f"{kind}_steps", 0) for kind in ("hold", "shallow")}
        kinds["decoder"] = count["reused_steps"] - sum(kinds.values())
        said.append(f"{several(count['full_steps'], 'step')} computed")
        said += [f"{number:g} {_KINDS[kind]}" for kind, number in kinds.items() if number]
    if count.get("decoder_runs", 0) < count["decoder_steps"]:
        said.append(f"the decoder called {several(count['decoder_runs'], 'time')} for {count['decoder_steps']:g} steps")
    if count.get("corrected_steps"):
        said.append(f"{several(count['corrected_steps'], 'computed step')} corrected by what was tuned")
    if count.get("unguided_steps"):
        said.append(f"one branch of guidance left out at {several(count['unguided_steps'], 'step')}")
    if "controlnet_runs" in counters:
        runs, skipped = (several(count[f"controlnet_{what}"], "time") for what in ("runs", "skipped"))
        said.append(f"the ControlNet called {runs}, left out {skipped}")
    if count.get("noise_injections"):
        said.append(f"prior noise added at {several(count['noise_injections'], 'step')}")
    if count.get("peak_cache_bytes"):
        said.append(f"at most {size(count['peak_cache_bytes'])} kept in memory")
    return ", ".join(said)
