"""Patches to torch, written for 2.15.0: torch.export does no work that only torch.compile needs."""

import contextlib
from collections.abc import Iterator

from quantize_gemma.tasks.runtime.patches import replaced, written_for


@contextlib.contextmanager
def no_common_subexpressions() -> Iterator[None]:
    """Compile dynamo's guards as they are, without looking for common subexpressions.

    To find violated constraints, torch.export has dynamo build the guards of what it traced. Before dynamo compiles
    them, it parses and prints every expression several times to compute shared parts once. Nothing calls the guards of
    an export, so this work is wasted.

    Unnecessary once `CheckFunctionManager` skips `build_guard_function` for exports.
    """
    from torch._dynamo import guards

    written_for(guards.PyExprCSEPass, "fc278c4377c1786c")
    written_for(guards.build_guard_function, "d170a91139653a01")

    def count(self: object, expressions: list[str]) -> None:
        pass

    def replace(self: object, expression: str) -> tuple[list[str], str]:
        return [], expression

    with replaced(guards.PyExprCSEPass, "count", count), replaced(guards.PyExprCSEPass, "replace", replace):
        yield


@contextlib.contextmanager
def uncopied_weights() -> Iterator[None]:
    """Keep the weights themselves, not copies of them, while dynamo traces.

    For torch.export, dynamo copies the value of every weight twice and keeps one copy until it is done: a second model
    in memory. It needs real values for operators that do not work on fake tensors, and copies them so that running
    such an operator does not change the caller's weights. No decoder or encoder has such an operator, and one that had
    would only read its weights.

    Unnecessary once `cache_real_value_when_export` copies a value only when an operator asks for it.
    """
    from torch._dynamo.variables import builder

    written_for(builder._clone_input, "fdee93dcef3fc957")
    written_for(builder.cache_real_value_when_export, "f7d4268f430034c3")

    def return_value(value: object, fake_mode: object) -> object:
        return value

    with replaced(builder, "_clone_input", return_value):
        yield
