"""Patches to optimum-executorch, written for 1.1.0."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.runtime.patches import replaced, written_for

if TYPE_CHECKING:
    from torch.nn import Module


@contextlib.contextmanager
def example_image(pixels: object) -> Iterator[None]:
    """Export the vision encoder with this image, [1, channels, height, width], of which only the shape counts.

    optimum-executorch downloads a photograph from a website instead, so it cannot export without a network connection.
    The environment variable does not turn this patch off.

    Unnecessary once `VisionExportableModule.prepare_export_inputs` creates an image from the configuration.
    """
    from optimum.exporters.executorch.integrations import VisionExportableModule

    with replaced(VisionExportableModule, "prepare_export_inputs", lambda _: (pixels, None)):
        yield


@contextlib.contextmanager
def one_export() -> Iterator[None]:
    """Export a decoder once, and remove redundant transposes from the exported program.

    optimum-executorch turns the exported decoder into a module, removes transposes that undo each other, and exports
    that module again, which takes longer than the first time. The second export has the same operators with the same
    inputs, and the pass works on the graph of a program just as on that of a module.

    Unnecessary once `CausalLMExportableModule.export` and `MultiModalTextToTextExportableModule.export` run
    `RemoveRedundantTransposes` on the program.
    """
    import torch
    from executorch.extension.llm.export.export_passes import RemoveRedundantTransposes
    from optimum.exporters.executorch import integrations
    from torch.export import ExportedProgram

    written_for(integrations.MultiModalTextToTextExportableModule.export, "308e2e74e748359b")
    written_for(integrations.CausalLMExportableModule.export, "628a7421b86c9c5a")
    written_for(RemoveRedundantTransposes, "b3cc7ad6264abe4e")
    stock_module, stock_export = ExportedProgram.module, torch.export.export
    programs: weakref.WeakKeyDictionary[Module, ExportedProgram] = weakref.WeakKeyDictionary()

    def module(self: ExportedProgram, check_guards: bool = True) -> "Module":
        result = stock_module(self, check_guards=check_guards)
        programs[result] = self
        return result

    def export(module: "Module", *args: Any, **kwargs: Any) -> ExportedProgram:
        program = programs.get(module)
        if program is None:
            return stock_export(module, *args, **kwargs)
        RemoveRedundantTransposes().call(program.graph_module)
        return program

    with replaced(ExportedProgram, "module", module), replaced(torch.export, "export", export):
        yield
