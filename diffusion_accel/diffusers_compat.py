"""What diffusers and accelerate keep to themselves and this toolkit needs all the same: one small function for each.

No other module uses their private names (a test looks), so a new release of diffusers is checked by reading this file.
What it says was seen in diffusers 0.42.1 and accelerate 1.15. Where something is gone, a function answers as if it had
not been there, unless it says otherwise. Importing it imports neither.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .module_tree import parts_of

if TYPE_CHECKING:
    import torch
    from diffusers import ContextParallelConfig, DiffusionPipeline, ModelMixin
    from diffusers.configuration_utils import FrozenDict
    from diffusers.hooks import HookRegistry, ModelHook
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

_REGISTRY = "_diffusers_hook"
#: what hooks of diffusers and accelerate leave on a module (accelerate: the hook, and the forward below it)
LEFT_BY_HOOKS = frozenset({_REGISTRY, "_hf_hook", "_old_forward", "forward"})
#: entries of a model's config that say where it comes from, some in any order, and nothing of what it computes
ORIGIN_ENTRIES = frozenset({"_name_or_path", "_use_default_values", "_diffusers_version"})


# ---------------------------------------------------------------------- chains of hooks (diffusers.hooks)
def registry_of(module: nn.Module) -> HookRegistry | None:
    """The registry of a module's own hooks (`_diffusers_hook`), or None.

    `HookRegistry.check_if_exists_or_initialize` makes one where there is none, and asks a wrapper's attributes, which
    answer for the model inside.
    """
    return vars(module).get(_REGISTRY)


def has_registry(attributes: dict[str, Any]) -> bool:
    """Whether a module with these attributes has a registry of its own (`_diffusers_hook`)."""
    return _REGISTRY in attributes


def set_registry(module: nn.Module, registry: HookRegistry) -> None:
    """Give a module a registry (`_diffusers_hook`): diffusers has no way to make one with another target."""
    vars(module)[_REGISTRY] = registry


def drop_registry(module: nn.Module) -> None:
    """Take an empty registry (`_diffusers_hook`) off a module: diffusers leaves it there for good."""
    vars(module).pop(_REGISTRY, None)


def lowest_function(registry: HookRegistry | None) -> tuple[Any, str] | None:
    """Where a chain of hooks keeps the module's own function: an object and the name of its attribute; None without
    hooks.

    It is in the first of `_fn_refs`, as `original_forward` below a hook with a `new_forward`, else as `forward`.
    """
    if registry is None or not registry._fn_refs:
        return None
    first = registry._fn_refs[0]
    return first, "forward" if first.original_forward is None else "original_forward"


def hook_names(registry: HookRegistry | None) -> list[str]:
    """The names of the hooks in a chain, the innermost first (`_hook_order`)."""
    return list(getattr(registry, "_hook_order", ()))


def sink(registry: HookRegistry) -> None:
    """Move the hook that was added last below all others, next to the module's own function; it has a `new_forward`.

    diffusers puts every hook around those that are there, so the links (`_hook_order`, `_fn_refs`) are changed here.
    """
    *others, last = registry._fn_refs
    place = lowest_function(registry)
    if not others or place is None:
        return
    module, (lowest, name) = registry._module_ref, place
    own, chain, ours = getattr(lowest, name), last.original_forward, module.forward
    order = list(registry._hook_order)
    try:
        ours.__wrapped__ = own  # it was that of the chain, which now holds it
        last.original_forward = own
        setattr(lowest, name, ours)
        module.forward = chain
        registry._fn_refs[:], registry._hook_order[:] = [last, *others], [order[-1], *order[:-1]]
    except BaseException:  # an interrupt in the middle: as it was, so that it can be removed
        last.original_forward, module.forward = chain, ours
        setattr(lowest, name, own)
        registry._fn_refs[:], registry._hook_order[:] = [*others, last], order
        raise


def unchain(registry: HookRegistry, name: str) -> None:
    """Remove a hook, also from between others; nothing if it is not there.

    diffusers' `remove_hook` connects the hook that was added next to the function below the removed one, but for a
    hook with a `new_forward` of its own in the wrong place: it would no longer run, and its removal would bring the
    removed hook back. So the links (`_hook_order`, `_fn_refs`) are mended here.
    """
    if name not in registry.hooks:
        return
    place, hook = registry._hook_order.index(name), registry.hooks[name]
    removed, following = registry._fn_refs[place], registry._fn_refs[place + 1 : place + 2]
    below = removed.forward if removed.original_forward is None else removed.original_forward
    links = [(ref, ref.forward, ref.original_forward) for ref in following]
    hooks, order, refs = dict(registry.hooks), list(registry._hook_order), list(registry._fn_refs)
    try:
        registry.remove_hook(name, recurse=False)
        for ref, forward, original in links:
            if original is not None:
                ref.forward, ref.original_forward = forward, below
    except BaseException:  # an interrupt in the middle: whole again, so that it can be begun again
        registry.hooks.update(hooks)
        registry._hook_order[:], registry._fn_refs[:] = order, refs
        for ref, forward, original in links:
            ref.forward, ref.original_forward = forward, original
        raise
    forget(hook)


def forget(hook: ModelHook) -> None:
    """Let a removed hook and its place in the chain (`fn_ref`) forget each other: in a cycle they would keep the module
    alive."""
    if hook.fn_ref is not None:
        vars(hook.fn_ref).update(dict.fromkeys(vars(hook.fn_ref)))
        hook.fn_ref = None


# ---------------------------------------------------------------------- offloading (accelerate)
def has_offload_hook(module: nn.Module) -> bool:
    """Whether accelerate has put a hook on a module (`_hf_hook`): it is offloaded, or spread over devices."""
    return hasattr(module, "_hf_hook")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's own weights in for each call and away again (`_hf_hook.offload`, of
    sequential offload)."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def offloads_models(pipe: DiffusionPipeline) -> bool:
    """Whether whole models of a pipeline are offloaded (`_all_hooks`, of `enable_model_cpu_offload`)."""
    return bool(getattr(pipe, "_all_hooks", None))


# ---------------------------------------------------------------------- pipelines
def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline computes, also with its models offloaded (`_execution_device`); `device` says where they are.

    Where no hook of anybody is on its models, which are all in one place, that is it: diffusers' property looks through
    all parts of all models several times.
    """
    models = [value for value in vars(pipe).values() if hasattr(value, "named_parameters")]
    first = [next(model.parameters(), None) for model in models]
    places = {None if parameter is None else parameter.device for parameter in first}
    place = places.pop() if len(places) == 1 else None
    hooked = any(LEFT_BY_HOOKS & vars(part).keys() for model in models for part in parts_of(model))
    return pipe._execution_device if place is None or hooked else place


def announced_steps(pipe: DiffusionPipeline) -> Any:
    """How many steps a pipeline is about to do (`_num_timesteps`, set just before the loop); None where it does not
    say. Its public twin `num_timesteps` is missing from many pipelines, and raises before the first call."""
    return getattr(pipe, "_num_timesteps", None)


def guidance_scale_of(pipe: DiffusionPipeline) -> Any:
    """The guidance scale of the running call (`_guidance_scale`); None where a pipeline keeps none. Its public twin
    `guidance_scale` raises before the first call."""
    return getattr(pipe, "_guidance_scale", None)


def progress_bar_settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What `set_progress_bar_config` was told (`_progress_bar_config`); empty before it was."""
    return getattr(pipe, "_progress_bar_config", {})


def unpacked_latents(pipe: Any, latents: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor:
    """Packed latents (B, S, C) as the VAE takes them (`_unpack_latents` of Flux and its kin), for an image of so many
    pixels; None: the pipeline's usual size (`default_sample_size`).

    Raises:
        ValueError: the pipeline does not say how.
    """
    side = getattr(pipe, "default_sample_size", 0) * pipe.vae_scale_factor
    try:
        z: torch.Tensor = pipe._unpack_latents(latents, height or side, width or side, pipe.vae_scale_factor)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{type(pipe).__name__} does not say how its latents are packed") from error
    return z


def current_timestep(pipe: DiffusionPipeline) -> Any:
    """The timestep of the running call, also while a pipeline's own `current_timestep` multiplies or hides it."""
    return pipe._current_timestep or pipe.current_timestep


def origin_of(component: object) -> str | None:
    """The folder or hub id that a pipeline or model was loaded from (`_name_or_path` of its config); None if none."""
    return getattr(component, "config", {}).get("_name_or_path")


def set_origin(pipe: DiffusionPipeline, location: str) -> None:
    """Note where a pipeline comes from (`_name_or_path` of its config), as diffusers does when it loads one itself."""
    pipe.register_to_config(_name_or_path=location)


@contextmanager
def configured(pipe: Any, **values: Any) -> Iterator[None]:
    """While the block runs, the configuration of a pipeline (`_internal_dict`) has these values, too: nothing of
    diffusers takes one out again."""
    before = pipe._internal_dict
    if values:
        pipe.register_to_config(**values)
    try:
        yield
    finally:
        pipe._internal_dict = before


def whole_config(scheduler: Any) -> dict[str, Any]:
    """The configuration of a scheduler with the values that are its class's defaults, for another class: `from_config`
    leaves them to that class's own defaults (`_use_default_values`)."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


# ---------------------------------------------------------------------- models
def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """The classes of blocks that `compile_repeated_blocks` compiles (`_repeated_blocks`), as it does not tell."""
    return tuple(getattr(model, "_repeated_blocks", None) or ())


def with_present_names(model: ModelMixin, tensors: dict[str, torch.Tensor]) -> None:
    """Rename stored tensors of older versions in place (`_fix_state_dict_keys_on_load`), as loading a model does."""
    model._fix_state_dict_keys_on_load(tensors)


def expendable_names(cls: type[ModelMixin]) -> tuple[str, ...]:
    """Patterns of stored names that a model class does not want (`_keys_to_ignore_on_load_unexpected`)."""
    return tuple(cls._keys_to_ignore_on_load_unexpected or ())


def set_config_entry(config: FrozenDict, key: str, value: object) -> None:
    """Set an entry of a model's frozen config in place, as entry and as attribute: loading a quantized model does that
    to `quantization_config`, and `register_to_config` would make another table, while IP-Adapter keeps attributes on
    this one."""
    OrderedDict.__setitem__(config, key, value)
    vars(config)[key] = value


def drop_config_entry(config: FrozenDict, key: str) -> None:
    """Take an entry of a model's frozen config (`FrozenDict`) away in place: it has no way of its own to do so."""
    if key in config:
        OrderedDict.__delitem__(config, key)
        vars(config).pop(key, None)


# ---------------------------------------------------------------------- single files of a model's authors
def original_repository(tensors: Mapping[str, Any]) -> str:
    """The hub id of the pipeline that diffusers takes a file with these tensors to be of (`fetch_diffusers_config` of
    `single_file_utils`, which looks at names and shapes); what it does not know it takes for SD 1.5."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config  # heavy: diffusers

    return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])


def converted_names(cls: type, config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a file by the names of a model class, as its `from_single_file` converts them
    (`_get_single_file_loadable_mapping_class` and `SINGLE_FILE_LOADABLE_CLASSES` of `single_file_model`).

    Args:
        cls: the class.
        config: of the model.
        tensors: in the names of the model's authors, or what stands for tensors; emptied by some conversions.

    Returns:
        Nothing where diffusers has no conversion for the class.
    """
    from diffusers.loaders import single_file_model  # heavy: diffusers

    kind = single_file_model._get_single_file_loadable_mapping_class(cls)
    if kind is None:
        return {}
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    found: dict[str, Any] = convert(checkpoint=tensors, config=config)
    return found


# ---------------------------------------------------------------------- context parallelism (experimental in diffusers)
# In 0.42 masks for every head are not shared by heads, and LTX 2's plan forgets its sound (diffusers' issue 14316).
_FAILING_PLANS = ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel")
_TORCH_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")


def context_parallel_plan(cls: type) -> Any:
    """How a transformer class is shared along its sequence (`_cp_plan`); None if diffusers does not say, or says what
    fails."""
    return None if cls.__name__ in _FAILING_PLANS else getattr(cls, "_cp_plan", None)


def parallel_config(model: ModelMixin) -> Any:
    """What `enable_parallelism` has made of a model (`_parallel_config`); None if it was not called."""
    return model._parallel_config


def set_parallel_config(model: nn.Module, value: object) -> None:
    """Set, or with None take away, what `enable_parallelism` sets on a model and its attention processors
    (`_parallel_config`): it cannot be undone, and in 0.42 fails without an accelerator."""
    for owner in (model, *(attention.processor for attention in _attentions(model))):
        owner._parallel_config = value


def make_parallel_config(
    config: ContextParallelConfig, rank: int, world: int, device: torch.device, mesh: DeviceMesh
) -> Any:
    """What `enable_parallelism` makes of a `ContextParallelConfig` (`ParallelConfig` of `_modeling_parallel`)."""
    from diffusers.models._modeling_parallel import ParallelConfig  # a private module: only where it is needed

    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(rank, world, device, mesh=mesh)
    return parallel


def unshareable_backend(model: nn.Module) -> tuple[str, Iterable[str]] | None:
    """An attention backend of a model that cannot share its sequence, and those that can
    (`_supports_context_parallel`); None if all can."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Backends  # private: only where needed

    for backend in _backends(model):
        if not Backends._is_context_parallel_available(backend):
            return backend.value, sorted(Backends._supports_context_parallel)
    return None


def other_backend(model: nn.Module) -> str | None:
    """An attention backend of a model that does not call torch's `scaled_dot_product_attention`; None if all do."""
    return next((backend.value for backend in _backends(model) if backend.value not in _TORCH_BACKENDS), None)


def _backends(model: nn.Module) -> list[Any]:
    """The attention backends of a model.

    `_AttentionBackendRegistry` knows them, and `_attention_backend` of a processor says which one was chosen for it.
    """
    from diffusers.models.attention_dispatch import (  # a private class: only where it is needed
        AttentionBackendName,
        _AttentionBackendRegistry,
    )

    chosen = {getattr(m.processor, "_attention_backend", None) for m in _attentions(model)}
    usual = _AttentionBackendRegistry.get_active_backend()[0]
    return [usual if backend is None else AttentionBackendName(backend) for backend in chosen]


def _attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(getattr(m, "processor", None), "_parallel_config")]


# ---------------------------------------------------------------------- diffusers' caches
def taylorseer_finds(denoiser: nn.Module) -> bool:
    """Whether TaylorSeer's cache would be put on any module of a denoiser.

    It takes the modules whose whole names fit its patterns (`_TRANSFORMER_BLOCK_IDENTIFIERS`); where there are none
    (Wan: blocks.0.attn1) it does nothing and says nothing.
    """
    from diffusers.hooks import taylorseer_cache  # heavy: diffusers

    patterns = getattr(taylorseer_cache, "_TRANSFORMER_BLOCK_IDENTIFIERS", (".*",))
    return any(re.fullmatch(pattern, name) for name, _ in denoiser.named_modules() for pattern in patterns)


def cacheable_blocks(denoiser: nn.Module) -> bool:
    """Whether diffusers' caches of whole blocks find at least two blocks in a denoiser, and know what each returns.

    They look for lists of certain names (`_ALL_TRANSFORMER_BLOCK_IDENTIFIERS`), and for the classes of their blocks in
    `TransformerBlockRegistry`.
    """
    from diffusers.hooks.first_block_cache import (  # heavy: diffusers
        _ALL_TRANSFORMER_BLOCK_IDENTIFIERS,
        TransformerBlockRegistry,
    )
    from torch.nn import ModuleList  # heavy: torch

    lists = [
        part
        for name, part in denoiser.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(part, ModuleList)
    ]
    classes = [type(block) for blocks in lists for block in blocks]
    try:
        for cls in classes:
            TransformerBlockRegistry.get(cls)
    except ValueError:
        return False
    return len(classes) > 1
