"""Patches to libraries that save time and memory when loading and exporting, within a `with` block:

    with patched_loading():
        model = Gemma3ForCausalLM.from_pretrained(...)
    with patched_export():
        ...

The model and the program are byte-identical to those of the unpatched libraries. There is a module per library and a
function per patch, whose docstring says what the library does, why the result stays the same, and what upstream would
have to change to make the patch unnecessary. docs/performance.md lists what each patch saves.

A patch is applied only to the code that it was written for: it compares hashes of the source that it replaces or relies
on. If the installed source differs, the library is used unpatched, with a warning. The environment variable
QUANTIZE_GEMMA_DISABLE_PATCHES turns patches off: a list of names separated by commas, or `all`.
"""

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

from quantize_gemma.tasks.runtime.patches.private_api import warn

DISABLE = "QUANTIZE_GEMMA_DISABLE_PATCHES"

Patch = Callable[[], contextlib.AbstractContextManager[None]]


class SourceDiffers(Exception):
    """The source of a library differs from the code that a patch was written for."""


def loading_patches() -> tuple[Patch, ...]:
    """Return the patches that apply while a quantized checkpoint is loaded."""
    from quantize_gemma.tasks.runtime.patches import transformers

    return transformers.own_metadata, transformers.shared_quantizer


def export_patches() -> tuple[Patch, ...]:
    """Return the patches that apply while a program is exported."""
    from quantize_gemma.tasks.runtime.patches import executorch, optimum_executorch, torch

    return (
        optimum_executorch.one_export,
        torch.no_common_subexpressions,
        torch.uncopied_weights,
        executorch.one_decomposition,
        executorch.cached_shapes,
        executorch.shared_weights,
        executorch.paged_out_weights,
        executorch.needed_passes,
        executorch.deferred_code,
        executorch.sorted_in_place,
        executorch.descendants_as_bits,
    )


def patched_loading() -> contextlib.AbstractContextManager[None]:
    """Apply the patches for loading a quantized checkpoint that fit the installed libraries."""
    return applied(loading_patches())


def patched_export() -> contextlib.AbstractContextManager[None]:
    """Apply the patches for exporting a program that fit the installed libraries."""
    return applied(export_patches())


@contextlib.contextmanager
def applied(patches: tuple[Patch, ...]) -> Iterator[None]:
    """Apply the patches that fit the installed libraries and are not disabled."""
    disabled_names = os.environ.get(DISABLE, "").split(",")
    with contextlib.ExitStack() as stack:
        for patch in patches:
            if "all" in disabled_names or patch.__name__ in disabled_names:
                continue
            try:
                stack.enter_context(patch())
            # inspect raises OSError if there is no source to compare.
            except (AttributeError, ImportError, OSError, SourceDiffers) as error:
                warn(
                    f"the patch {patch.__name__} is not applied, so the stage needs more time or memory, but gives the "
                    f"same result: {error}"
                )
        yield


def written_for(source: Any, digest: str) -> None:
    """Raise SourceDiffers if the source of a function, class, or module does not have this digest."""
    if source_digest(source) != digest:
        name = ".".join(filter(None, (getattr(source, "__module__", None), getattr(source, "__qualname__", None))))
        raise SourceDiffers(f"{name or source.__name__} differs from the version that the patch was written for")


def source_digest(source: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the source of a function, class, or module."""
    return hashlib.sha256(inspect.getsource(source).encode()).hexdigest()[:16]


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a module or a class within the context, and restore it afterwards."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
