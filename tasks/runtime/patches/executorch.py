"""Patches to ExecuTorch, written for 1.5.1: lowering takes time in proportion to the program, and less memory."""

import collections
import contextlib
import copy
import ctypes
import mmap
import sys
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.runtime.patches import replaced, written_for

if TYPE_CHECKING:
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node
    from torch.nn import Module

# Linux 5.4 and later (asm-generic/mman-common.h).
MADV_PAGEOUT = 21


@contextlib.contextmanager
def one_decomposition() -> Iterator[None]:
    """Decompose a program once instead of three times.

    Each time, ExecuTorch traces the program from scratch. The first time, the table is empty, so the program only
    becomes functional, which the second time does, too; the partitioner does not look at the program in between. The
    third time undoes the preservation of operators that the partitioner then rejects: without an operator that the
    third table decomposes and the second does not, nothing changes. An operator that is in both tables and is left
    after the second stays after the third for the same reason.

    Unnecessary once `_gen_edge_manager_for_partitioners` compares the tables with the graph on all of its paths, as it
    does on one of them since 1.5.
    """
    from executorch.exir.backend.canonical_partitioners.config_partitioner import ConfigerationBasedPartitioner
    from executorch.exir.program import _program
    from torch.export import ExportedProgram

    written_for(_program._gen_edge_manager_for_partitioners, "14a2b38bd338a215")
    written_for(ConfigerationBasedPartitioner.ops_to_not_decompose, "9713395f05ceec1b")
    stock = ExportedProgram.run_decompositions
    written_for(stock, "c74cbc17d3874021")
    tables: weakref.WeakKeyDictionary[ExportedProgram, set[object]] = weakref.WeakKeyDictionary()

    def run_decompositions(
        self: ExportedProgram, decomp_table: Any = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        result: ExportedProgram
        if decomp_table is None:
            result = stock(self, decomp_table, decompose_custom_triton_ops)
            return result
        table: set[object] = set(dict(decomp_table))
        if not table:
            return self
        previous_table = tables.get(self)
        if previous_table is not None and not any(
            node.target in table - previous_table for node in _every_node(self.graph_module)
        ):
            return self
        result = stock(self, decomp_table, decompose_custom_triton_ops)
        tables[result] = table
        return result

    with replaced(ExportedProgram, "run_decompositions", run_decompositions):
        yield


@contextlib.contextmanager
def cached_shapes() -> Iterator[None]:
    """Compute the shapes of an operator's results once for all passes.

    Nearly every pass of ExecuTorch traces the whole graph with fake tensors, layer by layer, whatever it changes. An
    operator's result for fake tensors depends only on their shapes, strides, and dtypes and on its other arguments, so
    an earlier result can be reused. An edge operator returns the same as its ATen operator; a delegate is an operator
    of its own. Operators run as before if their result depends on values or is not a tensor, or if they have other
    arguments, such as real tensors.

    Unnecessary once `ExportPass` keeps a node's `val` when neither the node nor its inputs change. This function is
    long because its inner functions share libraries that are imported only at the first export.
    """
    import torch
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.dialects.edge._ops import EdgeOpOverload
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from executorch.exir.pass_base import ProxyValue, _ExportPassBase
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils import _pytree as pytree

    stock = _ExportPassBase._fx
    written_for(stock, "d21aacbb5c107fba")
    constants = int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format
    objects = FakeTensor, torch.SymInt, LoweredBackendModule
    by_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
    results: dict[object, object] = {}
    # {id: (object, layout)}. Keeping the object prevents its id from being reused.
    layouts: dict[int, tuple[object, object]] = {}

    def layout_of(leaf: Any) -> object:
        if isinstance(leaf, constants):
            return type(leaf), leaf
        if id(leaf) not in layouts:
            delegate = isinstance(leaf, LoweredBackendModule)
            identity = id(leaf) if delegate else _layout(leaf) if isinstance(leaf, FakeTensor) else leaf.node.expr
            layouts[id(leaf)] = leaf, identity
        return layouts[id(leaf)][1]

    def remembers(kind: str, operator: object) -> bool:
        if kind != "call_function" or operator is executorch_call_delegate:
            return kind == "call_function"
        return isinstance(operator, torch._ops.OpOverload) and by_value.isdisjoint(operator.tags)

    def _fx(self: Any, kind: str, target: object, args: object, kwargs: object, meta: object) -> object:
        operator = target._op if isinstance(target, EdgeOpOverload) else target
        if not remembers(kind, operator):
            return stock(self, kind, target, args, kwargs, meta)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        leaves = [leaf.data if isinstance(leaf, ProxyValue) else leaf for leaf in leaves]
        if not all(isinstance(leaf, (*constants, *objects)) for leaf in leaves):
            return stock(self, kind, target, args, kwargs, meta)
        key = self.fake_tensor_mode, operator, structure, tuple(map(layout_of, leaves))
        cached_result = results.get(key)
        if cached_result is None:
            proxy = stock(self, kind, target, args, kwargs, meta)
            if all(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(proxy.data)):
                results[key] = proxy.data
            return proxy
        with replaced(self.interpreter, "call_function", lambda *_: cached_result):
            return stock(self, kind, target, args, kwargs, meta)

    with replaced(_ExportPassBase, "_fx", _fx):
        yield


def _layout(tensor: "FakeTensor") -> tuple[object, ...]:
    """Return the properties of a fake tensor that an operator's result depends on."""
    extents = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    plain = tuple(extent if isinstance(extent, int) else extent.node.expr for extent in extents)
    return plain, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, type(tensor), id(tensor.fake_mode)


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Let the copies of partitions that go to XNNPACK share their weights.

    ExecuTorch makes a deep copy of every partition before it lowers the first one, in case a backend writes to the
    graph: a second copy of the model. XNNPACK's passes replace weights with new tensors, but never write to a weight.

    Unnecessary once `XnnpackBackend` defines `copy_exported_program_for_preprocess` like this.
    """
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir.backend.backend_details import BackendDetails

    written_for(BackendDetails.copy_exported_program_for_preprocess, "161d76674b18cbbd")

    def copy_program(cls: object, edge_program: "ExportedProgram", compile_specs: object) -> "ExportedProgram":
        weights = [*edge_program.state_dict.values(), *edge_program.constants.values()]
        return copy.deepcopy(edge_program, {id(weight): weight for weight in weights})

    with replaced(XnnpackBackend, "copy_exported_program_for_preprocess", classmethod(copy_program)):
        yield


@contextlib.contextmanager
def paged_out_weights() -> Iterator[None]:
    """Ask the system to take back the pages of the checkpoint's file once their weights are packed.

    Packing reads the weights, and their pages stay in memory next to the packed weights and the program's content: a
    second copy of the model. The system may take a file's pages back at any time, since it can read them again; this
    patch asks it to. Nothing is lost: pages that belong to no file stay in memory, or go to swap space.

    Unnecessary once XNNPACK's serializer drops what it has read of a memory-mapped file.
    """
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

    stock = XnnpackBackend.preprocess
    written_for(stock, "62f7dc915f1ef40c")
    page = mmap.PAGESIZE
    # On other systems, MADV_PAGEOUT does not exist.
    advise = ctypes.CDLL(None).madvise if sys.platform == "linux" else lambda *_: None

    def preprocess(program: "ExportedProgram", specs: object) -> object:
        # The passes may have replaced them with other tensors.
        weights = _weights(program)
        result = stock(program, specs)
        for weight in weights:
            first = -(-weight.data_ptr() // page) * page
            size = (weight.data_ptr() + weight.nbytes - first) // page * page
            if size > 0:
                advise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)
        return result

    with replaced(XnnpackBackend, "preprocess", staticmethod(preprocess)):
        yield


def _weights(program: "ExportedProgram") -> "list[Tensor]":
    import torch

    values = [*program.state_dict.values(), *program.constants.values()]
    return [weight for weight in values if isinstance(weight, torch.Tensor)]


@contextlib.contextmanager
def needed_passes() -> Iterator[None]:
    """Run XNNPACK's passes only on partitions with operators that they change.

    Each of the 17 passes traces the partition again, changed or not, verifies it before and after, and formats it for a
    debug log. No pass changes a partition without the operators below.

    Unnecessary once `XNNPACKPass` returns early when its target operators are absent. This function is long because of
    the table of passes.
    """
    from executorch.backends.transforms import addmm_mm_to_linear
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.backends.xnnpack import _passes
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
    from executorch.exir.dialects._ops import ops

    manager = _passes.XNNPACKPassManager
    written_for(manager, "7fcec85f18a3016d")
    for name, digest in XNNPACK_PASSES.items():
        written_for(getattr(_passes, name), digest)
    written_for(RemoveCloneOpsTransform, "8c3444d8f8bbceb0")
    written_for(addmm_mm_to_linear, "9a0237833ac93426")
    written_for(sdpa, "72dc165858843f37")
    written_for(bilinear_2d, "516f2e3fcb9c6835")
    aten, dim_order = ops.edge.aten, ops.edge.dim_order_ops
    batch_norms = {aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default}
    operators_of_pass: dict[str, set[object]] = {
        "XNNPACKRemoveCloneOpsTransform": {aten.clone.default, dim_order._clone_dim_order.default},
        "DimOrderOpsRevertPass": {
            dim_order._clone_dim_order.default,
            dim_order._empty_dim_order.default,
            dim_order._to_dim_order_copy.default,
        },
        "ConvertToUpsampleBilinear2d": {aten.upsample_bilinear2d.vec},
        # It also removes a view_copy before or after a linear.
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

    def is_idle(name: str, nodes: list["Node"]) -> bool:
        if name in operators_of_pass:
            return operators_of_pass[name].isdisjoint(node.target for node in nodes)
        if name == "PropagateCustomMetaPass":
            return not any("custom" in node.meta for node in nodes)
        if name == "ConstPropPass":
            calls = [node for node in nodes if node.op == "call_function"]
            return not any(all(argument.op == "get_attr" for argument in node.all_input_nodes) for node in calls)
        return False

    stock = manager.transform

    def transform(self: Any) -> object:
        passes = self.passes
        for step in passes:
            if not is_idle(step.__name__, list(self._exported_program.graph.nodes)):
                self.passes = [step]
                self._exported_program = stock(self)
        return self._exported_program

    with replaced(manager, "transform", transform):
        yield


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
    "Conv1dUnsqueezePass": "6e235a5ac754089d",
    "PReLUReshapePass": "063a4ac4abd8944f",
    "RemoveRedundantCopyPass": "61192c6844c1c4e7",
}


@contextlib.contextmanager
def deferred_code() -> Iterator[None]:
    """Generate a graph's Python code once, after all partitions are extracted from it.

    After each partition, ExecuTorch generates and compiles the code of the whole graph and of every partition so far,
    which is quadratic in the number of partitions, although nothing calls that code in between.

    Unnecessary once `_create_partitions_in_graph_module` recompiles once, at its end.
    """
    from executorch.exir.backend import backend_api
    from torch.fx import GraphModule

    stock = backend_api._create_partitions_in_graph_module
    written_for(stock, "2c8bd8d290ecfb2d")
    written_for(GraphModule.recompile, "98adb1519c457ae4")

    def create_partitions(*args: object, **kwargs: object) -> object:
        stale: dict[int, GraphModule] = {}

        def recompile(self: GraphModule) -> None:
            stale[id(self)] = self

        with replaced(GraphModule, "recompile", recompile):
            partitions = stock(*args, **kwargs)
        for module in stale.values():
            module.recompile()
        return partitions

    with replaced(backend_api, "_create_partitions_in_graph_module", create_partitions):
        yield


@contextlib.contextmanager
def sorted_in_place() -> Iterator[None]:
    """Sort a graph in place after a partition is extracted from it.

    After each partition, ExecuTorch copies all nodes into a new graph, in topological order: this is quadratic in the
    number of nodes, and copying a node costs a hundred times as much as moving it. Nodes and their users end up in the
    same order as in the copy.

    Unnecessary once torch's `legalize_graph` moves nodes instead of copying them.
    """
    from executorch.exir import lowered_backend_module
    from torch.fx.passes import tools_common

    stock = tools_common.legalize_graph
    written_for(stock, "6dc8094b32ebd463")

    def legalize_graph(module: "GraphModule") -> "GraphModule":
        order = _topological(module.graph)
        for node in order:
            node.users.clear()
        end = module.graph._root
        for node in order:
            end.prepend(node)
            for argument in node.all_input_nodes:
                argument.users[node] = None
        module.recompile()
        return module

    with replaced(lowered_backend_module, "legalize_graph", legalize_graph):
        yield


def _topological(graph: "Graph") -> "list[Node]":
    """Return the nodes in the order that torch.fx's legalize_graph gives them: breadth-first, arithmetic ahead."""
    import operator

    import torch

    aten = torch.ops.aten
    names = "add", "mul", "sub", "floordiv", "truediv", "mod", "le", "lt", "ge", "gt", "eq", "ne"
    priority = {getattr(operator, name) for name in names}
    priority |= {
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        aten._assert_async.msg,
    }
    priority |= {aten.scalar_tensor.default, aten._assert_scalar.default}
    nodes = list(graph.nodes)
    input_counts = {node: len(node.all_input_nodes) for node in nodes}
    queue = collections.deque(node for node in nodes if not input_counts[node])
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for user in node.users:
            input_counts[user] -= 1
            if not input_counts[user]:
                (queue.appendleft if user.op == "call_function" and user.target in priority else queue.append)(user)
    assert len(order) == len(nodes), f"{len(nodes) - len(order)} nodes of the graph depend on themselves"
    return order


@contextlib.contextmanager
def descendants_as_bits() -> Iterator[None]:
    """Decide whether two partitions may merge, using one integer per node.

    The partitioner builds the sets of all descendants and all ancestors of every node, which is quadratic in time and
    memory. For every pair of partitions, it checks whether an outside node that uses one of them has a descendant in
    them, and then searches the graph for the same nodes. Both checks are the same, and an integer with a bit for each
    descendant is enough for it.

    Unnecessary once `_DependencyViewer` keeps bit sets.
    """
    from executorch.exir.backend.canonical_partitioners import group_partitioner

    written_for(group_partitioner._DependencyViewer, "a6d3ee37edb6ec3a")
    written_for(group_partitioner.GroupBasedPartitioner._can_merge_partitions, "08428a6ba5abd129")

    class Descendants:
        def __init__(self, graph_module: "GraphModule") -> None:
            nodes = list(graph_module.graph.nodes)
            self.bit = {node: 1 << index for index, node in enumerate(nodes)}
            self.below: dict[Node, int] = {}
            for node in reversed(nodes):
                below = 0
                for user in node.users:
                    below |= self.bit[user] | self.below[user]
                self.below[node] = below

    def can_merge(self: Any, first: Any, second: Any, partitions: Any) -> bool:
        viewer = self.dependency_viewer
        nodes = {**partitions[first].nodes, **partitions[second].nodes}
        member_bits = 0
        for node in nodes:
            member_bits |= viewer.bit[node]
        users = {user for node in nodes for user in node.users if user not in nodes}
        return not any(viewer.below[user] & member_bits for user in users)

    with (
        replaced(group_partitioner, "_DependencyViewer", Descendants),
        replaced(group_partitioner.GroupBasedPartitioner, "_can_merge_partitions", can_merge),
    ):
        yield


def _every_node(module: "Module") -> "Iterator[Node]":
    import torch

    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from part.graph.nodes
