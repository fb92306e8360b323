"""Lean libraries: what transformers, torch.export and ExecuTorch do many times over is done once.

    with lean_loading():
        model = Gemma3ForCausalLM.from_pretrained(...)
    with lean_lowering():
        ...

give the same model and the same program, byte for byte, in less time and memory. Everything that is changed in a
library to that end is in this file, one function per change; each says what the library does, why that is slow, and why
the result stays the same. Outside the `with` the libraries are as they were. QUANTIZE_GEMMA_STOCK_LIBRARIES=1 in the
environment leaves them as they are inside it too.

A change fits the code that it was written for and no other, so each names a hash of the functions' source that it
replaces or relies on; LibraryChanged is raised when it is not what is installed.
"""

import collections
import contextlib
import copy
import ctypes
import hashlib
import inspect
import json
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

# Linux 5.4 and later (asm-generic/mman-common.h).
MADV_PAGEOUT = 21
SWITCH = "QUANTIZE_GEMMA_STOCK_LIBRARIES"


class LibraryChanged(RuntimeError):
    """A library is not the version that a change here was written for."""


def lean_loading() -> contextlib.AbstractContextManager[None]:
    """Applies the changes to loading a quantized checkpoint; raises LibraryChanged if they are for another library."""
    return _changed(LOADING)


def lean_lowering() -> contextlib.AbstractContextManager[None]:
    """Applies the changes to exporting a program; raises LibraryChanged if they are for another library."""
    return _changed(LOWERING)


@contextlib.contextmanager
def example_picture(pixels: Any) -> Iterator[None]:
    """The vision encoder is exported with this picture, [1, channels, height, width], of which only the shape counts.

    optimum-executorch fetches a photograph from a web site instead. The switch does not reach this change: without it
    nothing is exported where there is no network.
    """
    from optimum.exporters.executorch.integrations import VisionExportableModule

    with replaced(VisionExportableModule, "prepare_export_inputs", lambda _: (pixels, None)):
        yield


@contextlib.contextmanager
def _changed(changes: "Changes") -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for change in changes if os.environ.get(SWITCH) != "1" else ():
            stack.enter_context(change())
        yield


def source_hash(function: Any) -> str:
    """Returns the hash by which a change here knows the code that it was written for."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def _written_for(function: Any, digest: str) -> None:
    found = source_hash(function)
    if found != digest:
        name = (
            f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__module__") else function.__name__
        )
        raise LibraryChanged(
            f"{name} is not the code that tasks/lean.py was written for "
            f"(source {found} instead of {digest}): check the change there, or set {SWITCH}=1 to do without it"
        )


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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


@contextlib.contextmanager
def _own_metadata() -> Iterator[None]:
    """A quantized weight is put together with its own metadata, not with everybody's.

    transformers calls torchao for one weight at a time, but with the metadata of all, through which torchao looks for
    every weight that might be meant, comparing it with everything there is: cubic in the number of weights. It returns
    those whose tensors it was given, and these are the one's.
    """
    from torchao.prototype.safetensors import safetensors_support
    from transformers.integrations import torchao

    stock = safetensors_support.unflatten_tensor_state_dict
    _written_for(stock, "0f9620cf89e8c76b")
    _written_for(torchao.TorchAoDeserialize, "539a3d244cc09a99")

    def unflatten(tensors: dict[str, Any], metadata: dict[str, Any]) -> Any:
        modules = {name.rsplit(".", 1)[0] for name in tensors}
        own = {name: value for name, value in metadata.items() if name.rsplit(".", 1)[0] in modules}
        return stock(tensors, {**own, "tensor_names": json.dumps(list(own))})

    with replaced(torchao, "unflatten_tensor_state_dict", unflatten):
        yield


@contextlib.contextmanager
def _shared_quantizer() -> Iterator[None]:
    """Copies of the rule by which weights are put together share the quantizer.

    transformers copies the rule for every weight, and with it the quantizer and the metadata of all weights, which
    nobody writes to.
    """
    from transformers import core_model_loading
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    _written_for(core_model_loading.convert_and_load_state_dict_in_model, "9c66a82c4c3b5503")

    def share(self: Any, memo: dict[int, Any]) -> Any:
        return self

    with replaced(TorchAoHfQuantizer, "__deepcopy__", share):
        yield


@contextlib.contextmanager
def _shared_provenance() -> Iterator[None]:
    """Copies of a node's provenance share it.

    torch.fx notes in every node of a traced graph which node it was traced from, which was traced from another one,
    and so on, and copies the whole chain whenever a graph is traced again: the longer the chain the slower. The links
    of the chain are never written to once they are made, so a reference does as well as a copy.
    """
    from torch.fx.traceback import NodeSource

    _written_for(NodeSource, "0e29c3d55d6345c3")

    def share(self: Any, memo: dict[int, Any]) -> Any:
        return self

    with replaced(NodeSource, "__deepcopy__", share):
        yield


@contextlib.contextmanager
def _plain_guards() -> Iterator[None]:
    """Guard code is compiled as it is, common subexpressions and all.

    torch.export has dynamo build the guards of what it traced, to find violated constraints while it collects them;
    nobody calls the compiled guard function. Before it compiles it, dynamo parses and prints every expression several
    times over to share what they have in common, to make calls faster that never come.
    """
    from torch._dynamo import guards

    _written_for(guards.PyExprCSEPass, "fc278c4377c1786c")
    _written_for(guards.build_guard_function, "6dda0d6e669fb49b")

    def count(self: Any, expressions: list[str]) -> None:
        pass

    def replace(self: Any, expression: str) -> tuple[list[str], str]:
        return [], expression

    with replaced(guards.PyExprCSEPass, "count", count), replaced(guards.PyExprCSEPass, "replace", replace):
        yield


@contextlib.contextmanager
def _uncopied_values() -> Iterator[None]:
    """Dynamo keeps the weights that it meets, not copies of them.

    While it traces for torch.export it copies the value of every weight, twice, and keeps one copy until it is done:
    a second model in memory. It does so to be able to run an operator on real values when one on fake tensors needs
    them, without changing the caller's. No operator of a decoder or an encoder does; one that did would read.
    """
    from torch._dynamo.variables import builder

    _written_for(builder._clone_input, "0a081e31c15a61b3")
    _written_for(builder.cache_real_value_when_export, "f7d4268f430034c3")

    def keep(value: Any, fake_mode: Any) -> Any:
        return value

    with replaced(builder, "_clone_input", keep):
        yield


@contextlib.contextmanager
def _one_export() -> Iterator[None]:
    """A decoder is exported once, and loses its idle transposes in the program that came of it.

    optimum-executorch makes a module of the exported decoder again, takes out transposes that undo each other, and
    exports that module, which costs more than the first time. What is exported has the same operators with the same
    inputs either way, and the pass works on a program's graph as it does on a module's.
    """
    import torch
    from executorch.extension.llm.export.export_passes import RemoveRedundantTransposes
    from optimum.exporters.executorch import integrations
    from torch.export import ExportedProgram

    _written_for(integrations.MultiModalTextToTextExportableModule.export, "308e2e74e748359b")
    _written_for(integrations.CausalLMExportableModule.export, "628a7421b86c9c5a")
    _written_for(RemoveRedundantTransposes, "b3cc7ad6264abe4e")
    stock_module, stock_export = ExportedProgram.module, torch.export.export
    programs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def module(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = stock_module(self, *args, **kwargs)
        programs[made] = self
        return made

    def export(module: Any, *args: Any, **kwargs: Any) -> Any:
        program = programs.get(module)
        if program is None:
            return stock_export(module, *args, **kwargs)
        RemoveRedundantTransposes().call(program.graph_module)
        return program

    with replaced(ExportedProgram, "module", module), replaced(torch.export, "export", export):
        yield


@contextlib.contextmanager
def _fewer_decompositions() -> Iterator[None]:
    """A program is decomposed once instead of three times.

    Each of the three traces it from scratch. The first has an empty table, which only makes the program functional,
    and so does the next; the partitioner is asked in between but does not look at the program. The third undoes the
    keeping of those operators that the partitioner then does not want: it changes nothing if there are none, that is
    if no operator is left that the third table decomposes and the second did not. An operator that stands in both
    tables and is left after the second stays after the third for the same reason.
    """
    from executorch.exir.backend.canonical_partitioners.config_partitioner import ConfigerationBasedPartitioner
    from executorch.exir.program import _program
    from torch.export import ExportedProgram

    _written_for(_program._gen_edge_manager_for_partitioners, "1165268e5782bf8f")
    _written_for(ConfigerationBasedPartitioner.ops_to_not_decompose, "9713395f05ceec1b")
    stock = ExportedProgram.run_decompositions
    _written_for(stock, "c74cbc17d3874021")
    tables: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()

    def run_decompositions(self: Any, decomp_table: Any = None, decompose_custom_triton_ops: bool = False) -> Any:
        if decomp_table is None:
            return stock(self, decomp_table, decompose_custom_triton_ops)
        table = set(dict(decomp_table))
        if not table:
            return self
        done = tables.get(self)
        if done is not None and not any(node.target in table - done for node in _every_node(self.graph_module)):
            return self
        decomposed = stock(self, decomp_table, decompose_custom_triton_ops)
        tables[decomposed] = table
        return decomposed

    with replaced(ExportedProgram, "run_decompositions", run_decompositions):
        yield


@contextlib.contextmanager
def _remembered_shapes() -> Iterator[None]:
    """A pass that traces a graph again computes no operator's shape that was computed before.

    Nearly every pass of ExecuTorch runs the whole graph with fake tensors, whatever it changes, layer for layer. What
    an operator gives for fake tensors is decided by their shapes, strides and types, and by its other arguments: the
    result from before stands in for it. An edge operator gives what its ATen operator gives; a delegate is an operator
    of its own. Operators whose result depends on values, and those that are given anything else, real tensors for
    example, are run as before; so are those whose result is no tensor.
    """
    import torch
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.dialects.edge._ops import EdgeOpOverload
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from executorch.exir.pass_base import ProxyValue, _ExportPassBase
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils import _pytree as pytree

    stock = _ExportPassBase._fx
    _written_for(stock, "d21aacbb5c107fba")
    constants = int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format
    objects = FakeTensor, torch.SymInt, LoweredBackendModule
    by_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
    results: dict[Any, Any] = {}
    # With each key what it was made of, so that its id stays its own.
    layouts: dict[int, tuple[Any, Any]] = {}

    def layout_of(leaf: Any) -> Any:
        if isinstance(leaf, constants):
            return type(leaf), leaf
        if id(leaf) not in layouts:
            delegate = isinstance(leaf, LoweredBackendModule)
            own = id(leaf) if delegate else _layout(leaf) if isinstance(leaf, FakeTensor) else leaf.node.expr
            layouts[id(leaf)] = leaf, own
        return layouts[id(leaf)][1]

    def remembers(kind: str, operator: Any) -> bool:
        if kind != "call_function" or operator is executorch_call_delegate:
            return kind == "call_function"
        return isinstance(operator, torch._ops.OpOverload) and by_value.isdisjoint(operator.tags)

    def _fx(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        operator = target._op if isinstance(target, EdgeOpOverload) else target
        if not remembers(kind, operator):
            return stock(self, kind, target, args, kwargs, meta)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        leaves = [leaf.data if isinstance(leaf, ProxyValue) else leaf for leaf in leaves]
        if not all(isinstance(leaf, (*constants, *objects)) for leaf in leaves):
            return stock(self, kind, target, args, kwargs, meta)
        key = self.fake_tensor_mode, operator, structure, tuple(map(layout_of, leaves))
        known = results.get(key)
        if known is None:
            proxy = stock(self, kind, target, args, kwargs, meta)
            if all(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(proxy.data)):
                results[key] = proxy.data
            return proxy
        with replaced(self.interpreter, "call_function", lambda *_: known):
            return stock(self, kind, target, args, kwargs, meta)

    with replaced(_ExportPassBase, "_fx", _fx):
        yield


def _layout(tensor: Any) -> tuple[Any, ...]:
    """Returns what an operator on fake tensors sees of one."""
    extents = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    plain = tuple(extent if isinstance(extent, int) else extent.node.expr for extent in extents)
    return plain, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, type(tensor), id(tensor.fake_mode)


@contextlib.contextmanager
def _interpreted_delegates() -> Iterator[None]:
    """The shape of a delegate's results is found by interpreting its graph.

    A pass that meets a delegate makes a module of the delegate's program, with attributes for its weights and Python
    code for its graph, compiles the code, and calls it with fake tensors. Interpreting the graph with the same
    arguments calls the same operators.
    """
    import torch
    from executorch.exir import delegate
    from torch._subclasses.fake_tensor import FakeTensorMode

    _written_for(delegate, "06cf009c74e7f2a0")
    kernels = delegate.executorch_call_delegate.python_key_table
    stock = kernels[FakeTensorMode]

    def call(mode: Any, lowered_module: Any, *args: Any) -> Any:
        program = lowered_module.original_module
        signature = program.graph_signature
        if signature.buffers_to_mutate:
            return stock(mode, lowered_module, *args)
        weights = {**program.state_dict, **program.constants}
        owned = {spec.arg.name: weights[spec.target] for spec in signature.input_specs if spec.target is not None}
        given = iter(args)
        names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        inputs = [owned[name] if name in owned else next(given) for name in names]
        with mode:
            return tuple(torch.fx.Interpreter(program.graph_module).run(*inputs))

    kernels[FakeTensorMode] = call
    try:
        yield
    finally:
        kernels[FakeTensorMode] = stock


@contextlib.contextmanager
def _shared_weights() -> Iterator[None]:
    """Copies of the partitions share their weights.

    ExecuTorch copies every partition with all its weights before the first is given to XNNPACK, in case a backend
    writes to them: a second copy of the model. XNNPACK's passes put new tensors in the place of weights, but write to
    none.
    """
    from types import SimpleNamespace

    import torch
    from executorch.exir.backend import backend_api

    _written_for(backend_api.lower_all_submodules_to_backend, "127a1e6ff26baa84")

    def deepcopy(value: Any) -> Any:
        if not isinstance(value, torch.export.ExportedProgram):
            return copy.deepcopy(value)
        weights = [*value.state_dict.values(), *value.constants.values()]
        return copy.deepcopy(value, {id(weight): weight for weight in weights})

    with replaced(backend_api, "copy", SimpleNamespace(copy=copy.copy, deepcopy=deepcopy)):
        yield


@contextlib.contextmanager
def _released_weights() -> Iterator[None]:
    """Weights are let go when they are packed into a delegate.

    The model, the programs that torch.export made of it, those in between, and every delegate's own program hold
    them until the program is written, next to the packed ones and to the file's content. After packing nobody reads
    them: the methods' programs have handed them to the delegates, and of a delegate's program passes take the shapes
    alone, which fake tensors have. What a method still uses itself, a shared weight for example, stays.
    """
    from executorch.exir.backend import backend_api

    stock = backend_api.lower_all_submodules_to_backend
    _written_for(stock, "127a1e6ff26baa84")

    def lower(backend_id: str, nodes: dict[str, list[Any]], programs: dict[str, Any]) -> None:
        partitions = [node.meta["submodule_program"] for calls in nodes.values() for node in calls]
        stock(backend_id, nodes, programs)
        used = {_storage(weight) for program in programs.values() for weight in _weights(program)}
        for partition in partitions:
            packed = [weight.untyped_storage() for weight in _weights(partition) if _storage(weight) not in used]
            shapes = {node.name: node.meta.get("val") for node in partition.graph.nodes if node.op == "placeholder"}
            for spec in partition.graph_signature.input_specs:
                for held in partition._state_dict, partition._constants:
                    if spec.target in held:
                        held[spec.target] = shapes[spec.arg.name]
            for storage in packed:
                if storage.resizable():
                    storage.resize_(0)

    with replaced(backend_api, "lower_all_submodules_to_backend", lower):
        yield


@contextlib.contextmanager
def _mapped_weights() -> Iterator[None]:
    """Weights that are a part of the checkpoint's file leave memory once they are packed into a delegate.

    Packing reads them in, and they stay, next to the packed ones and to the file's content: a second model in memory.
    The system may take pages of a file back at any time, for it can read them again; here it is asked to. Nothing is
    lost: pages that are no file's stay where they are, or go to swap space if there is some.
    """
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from torch._subclasses.fake_tensor import FakeTensor

    stock = XnnpackBackend.preprocess
    _written_for(stock, "62f7dc915f1ef40c")
    page = mmap.PAGESIZE
    # Elsewhere the request has another number, and nothing is asked.
    advise: Any = ctypes.CDLL(None).madvise if sys.platform == "linux" else lambda *_: None

    def preprocess(program: Any, specs: Any) -> Any:
        # The passes put others in their place.
        weights = [weight for weight in _weights(program) if not isinstance(weight, FakeTensor)]
        packed = stock(program, specs)
        for weight in weights:
            first = -(-weight.data_ptr() // page) * page
            size = (weight.data_ptr() + weight.nbytes - first) // page * page
            if size > 0:
                advise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)
        return packed

    with replaced(XnnpackBackend, "preprocess", staticmethod(preprocess)):
        yield


def _weights(program: Any) -> list[Any]:
    import torch

    held = [*program.state_dict.values(), *program.constants.values()]
    return [weight for weight in held if isinstance(weight, torch.Tensor)]


def _storage(weight: Any) -> int:
    return int(weight.untyped_storage()._cdata)


@contextlib.contextmanager
def _no_idle_passes() -> Iterator[None]:
    """XNNPACK's passes run on a partition only if it holds what they look for.

    Each of the 17 traces the partition again, whether it has changed something or not, verifies it before and after,
    and prints it, for a log that nobody reads. None changes anything in a partition without the operators below.
    """
    from executorch.backends.transforms import addmm_mm_to_linear
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.backends.xnnpack import _passes
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
    from executorch.exir.dialects._ops import ops

    manager = _passes.XNNPACKPassManager
    _written_for(manager, "7fcec85f18a3016d")
    for name, digest in XNNPACK_PASSES.items():
        _written_for(getattr(_passes, name), digest)
    _written_for(RemoveCloneOpsTransform, "8c3444d8f8bbceb0")
    _written_for(addmm_mm_to_linear, "9a0237833ac93426")
    _written_for(sdpa, "72dc165858843f37")
    _written_for(bilinear_2d, "516f2e3fcb9c6835")
    aten, dim_order = ops.edge.aten, ops.edge.dim_order_ops
    batch_norms = {aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default}
    wanted: dict[str, set[Any]] = {
        "XNNPACKRemoveCloneOpsTransform": {aten.clone.default, dim_order._clone_dim_order.default},
        "DimOrderOpsRevertPass": {
            dim_order._clone_dim_order.default,
            dim_order._empty_dim_order.default,
            dim_order._to_dim_order_copy.default,
        },
        "ConvertToUpsampleBilinear2d": {aten.upsample_bilinear2d.vec},
        # It also takes the view_copy away that stands before or after a linear.
        "ConvertToLinearPass": {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.view_copy.default},
        "ConvertToSDPAPass": {aten._softmax.default},
        "FuseBatchNormPass": batch_norms,
        "DecomposeBatchNorm": batch_norms,
        "FuseActivationPass": {aten.relu.default, aten.hardtanh.default},
        "DecomposeConcatenate": {aten.cat.default},
        "RemoveGetItemPass": {aten.max_pool2d_with_indices.default, aten.max.dim},
        "InsertPadQDQPass": {aten.constant_pad_nd.default},
        "Conv1dUnsqueezePass": {aten.convolution.default},
        "PReLUReshapePass": {aten._prelu_kernel.default},
        "RemoveRedundantCopyPass": {aten._to_copy.default},
    }

    def is_idle(name: str, nodes: list[Any]) -> bool:
        if name in wanted:
            return wanted[name].isdisjoint(node.target for node in nodes)
        if name == "PropagateCustomMetaPass":
            return not any("custom" in node.meta for node in nodes)
        if name == "ConstPropPass":
            called = [node for node in nodes if node.op == "call_function"]
            return not any(all(given.op == "get_attr" for given in node.all_input_nodes) for node in called)
        return False

    stock = manager.transform

    def transform(self: Any) -> Any:
        passes = self.passes
        for step in passes:
            if not is_idle(step.__name__, list(self._exported_program.graph.nodes)):
                self.passes = [step]
                self._exported_program = stock(self)
        return self._exported_program

    with replaced(manager, "transform", transform):
        yield


@contextlib.contextmanager
def _late_code() -> Iterator[None]:
    """Python code of a graph that is being cut into partitions is generated when all are cut out.

    Each cut generates and compiles the code of the whole graph and of every partition so far, quadratic in the number
    of partitions, although nothing calls that code between two cuts.
    """
    from executorch.exir.backend import backend_api
    from torch.fx import GraphModule

    stock = backend_api._create_partitions_in_graph_module
    _written_for(stock, "2c8bd8d290ecfb2d")
    _written_for(GraphModule.recompile, "98adb1519c457ae4")

    def create_partitions(*args: Any, **kwargs: Any) -> Any:
        stale: dict[int, Any] = {}

        def recompile(self: Any) -> None:
            stale[id(self)] = self

        with replaced(GraphModule, "recompile", recompile):
            partitions = stock(*args, **kwargs)
        for module in stale.values():
            module.recompile()
        return partitions

    with replaced(backend_api, "_create_partitions_in_graph_module", create_partitions):
        yield


@contextlib.contextmanager
def _sorted_in_place() -> Iterator[None]:
    """A graph from which a partition was cut is sorted where it is, instead of being copied in order.

    After each cut ExecuTorch makes a new graph of copies of all nodes, in topological order: quadratic in the number of
    nodes, and a copy of a node costs a hundred times what moving it does. Nodes and their users come into the very
    order that the copies have.
    """
    from executorch.exir import lowered_backend_module
    from torch.fx.passes import tools_common

    stock = tools_common.legalize_graph
    _written_for(stock, "6dc8094b32ebd463")

    def legalize_graph(module: Any) -> Any:
        order = _topological(module.graph)
        for node in order:
            node.users.clear()
        end = module.graph._root
        for node in order:
            end.prepend(node)
            for given in node.all_input_nodes:
                given.users[node] = None
        module.recompile()
        return module

    with replaced(lowered_backend_module, "legalize_graph", legalize_graph):
        yield


@contextlib.contextmanager
def _short_ancestries() -> Iterator[None]:
    """Whether two partitions can be merged is found without the set of descendants of every node.

    The partitioner builds the set of all descendants and the set of all ancestors of every node, quadratic in time
    and memory, and then asks of every pair of partitions whether a node outside that uses one of them has a
    descendant in them, and after that, of the same nodes, whether one is reached from there in the graph. Both are
    the same question. One integer per node, with a bit for each descendant, answers it.
    """
    from executorch.exir.backend.canonical_partitioners import group_partitioner

    _written_for(group_partitioner, "e7540c82b898199b")

    class Descendants:
        def __init__(self, graph_module: Any) -> None:
            nodes = list(graph_module.graph.nodes)
            self.bit = {node: 1 << place for place, node in enumerate(nodes)}
            self.below: dict[Any, int] = {}
            for node in reversed(nodes):
                below = 0
                for user in node.users:
                    below |= self.bit[user] | self.below[user]
                self.below[node] = below

    def can_merge(self: Any, one: Any, other: Any, partitions: Any) -> bool:
        viewer = self.dependency_viewer
        nodes = {**partitions[one].nodes, **partitions[other].nodes}
        inside = 0
        for node in nodes:
            inside |= viewer.bit[node]
        users = {user for node in nodes for user in node.users if user not in nodes}
        return not any(viewer.below[user] & inside for user in users)

    with (
        replaced(group_partitioner, "_DependencyViewer", Descendants),
        replaced(group_partitioner.GroupBasedPartitioner, "_can_merge_partitions", can_merge),
    ):
        yield


def _topological(graph: Any) -> list[Any]:
    """Returns the nodes in the order that torch.fx's legalize_graph gives them: breadth first, arithmetic ahead."""
    import operator

    import torch

    aten = torch.ops.aten
    names = "add", "mul", "sub", "floordiv", "truediv", "mod", "le", "lt", "ge", "gt", "eq", "ne"
    ahead = {getattr(operator, name) for name in names}
    ahead |= {aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default, aten._assert_async.msg}
    ahead |= {aten.scalar_tensor.default, aten._assert_scalar.default}
    nodes = list(graph.nodes)
    missing = {node: len(node.all_input_nodes) for node in nodes}
    queue = collections.deque(node for node in nodes if not missing[node])
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                (queue.appendleft if user.op == "call_function" and user.target in ahead else queue.append)(user)
    assert len(order) == len(nodes), f"{len(nodes) - len(order)} nodes of the graph depend on themselves"
    return order


XNNPACK_PASSES = {
    "XNNPACKRemoveCloneOpsTransform": "45143105d38c4776",
    "DimOrderOpsRevertPass": "04efcf31f4ef6c1d",
    "ConvertToUpsampleBilinear2d": "711c5e3e00df8749",
    "ConvertToLinearPass": "8b1c34b3756ac59e",
    "PropagateCustomMetaPass": "2605f4cbed81e58a",
    "ConvertToSDPAPass": "d23a04af509e40ea",
    "ConstPropPass": "e157eae245386b5c",
    "FuseBatchNormPass": "d20f5c6a6f37a9b1",
    "DecomposeBatchNorm": "aa0abaea1b71743d",
    "FuseActivationPass": "751d5edc43de94d3",
    "DecomposeConcatenate": "03f83199646f7226",
    "RemoveGetItemPass": "c58434b5a108e03d",
    "InsertPadQDQPass": "3b29387c0a22b31d",
    "Conv1dUnsqueezePass": "e77fb6e9fc466db7",
    "PReLUReshapePass": "063a4ac4abd8944f",
    "RemoveRedundantCopyPass": "61192c6844c1c4e7",
}


def _every_node(module: Any) -> Iterator[Any]:
    import torch

    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from part.graph.nodes


Changes = tuple[Callable[[], contextlib.AbstractContextManager[None]], ...]
LOADING: Changes = (_own_metadata, _shared_quantizer)
LOWERING: Changes = (
    _one_export,
    _plain_guards,
    _uncopied_values,
    _shared_provenance,
    _fewer_decompositions,
    _remembered_shapes,
    _interpreted_delegates,
    _shared_weights,
    _mapped_weights,
    _released_weights,
    _no_idle_passes,
    _late_code,
    _sorted_in_place,
    _short_ancestries,
)
