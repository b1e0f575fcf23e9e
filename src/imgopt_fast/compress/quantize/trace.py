"""A model as a flat graph of functional ATen operations.

torch.export rather than torch.fx: it runs Python control flow on shapes ("same" padding, asserts, loops) where fx
stops at the first comparison of a size, and it spells every relu, add or flatten (module, function, method, operator,
in place) as one operation, so that a pattern is written once. Batch and image size stay dynamic where the model lets
them; padding that is computed from the image size is worth a fixed size, because only then a convolution can absorb
it. ResNet-50 traces in 1 to 4 s on one core. Sizes behind such padding are nested expressions, which took 200 s to
follow through tf_efficientnet_b0, so the first of them ends the attempt.
"""

import copy
import operator
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from imgopt_fast.compress.quantize.untraceable import silent_failure, untraceable
from imgopt_fast.nn import MaskedConv2d, MaskedLinear

aten = torch.ops.aten

# Operations that do nothing at inference.
IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.lift_fresh_copy.default,
}


def trace(model: nn.Module, sample: Tensor) -> tuple[GraphModule, tuple[int, ...] | None]:
    """The inference graph of `model`, and the image size that it is bound to (None: any).

    `sample` is a batch of real input; only its shape counts. The graph owns float32 copies of the parameters.
    Raises ValueError, which names the layer and its line, when torch.export cannot follow the model.
    """
    model = dense(_copy(_unwrapped(model))).eval().float()
    images = sample[:1].expand(2, *sample.shape[1:])  # a batch of 1 would be traced as a constant
    spatial = range(2, sample.ndim)
    program, size = None, None
    try:
        with _SizesUnused():
            program = _export(model, images, (0, *spatial))
    except Exception as refusal:  # the tracer raises what the model's own code raises, too
        first = refusal
    if program is None or (spatial and _passes_sizes_on(program)):
        try:
            program, size = _export(model, images, (0,)), tuple(sample.shape[2:])
        except Exception as refusal:
            raise untraceable(model, images, refusal if str(refusal) else first) from refusal
    graph = _flat(program)
    _make_functional(graph)
    _drop_identities(graph)
    _fold_constants(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, size


def layer_name(node: Node) -> str:
    """The qualified name of the innermost module that `node` was traced in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    name = next(reversed(stack.values()))[0] if stack else ""
    return "" if name.startswith("_empty") else str(name)


def constant(graph: GraphModule, value: Any) -> Tensor | None:
    """The tensor behind an argument of a node: a parameter, a buffer or a folded constant; None for anything else."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    found = operator.attrgetter(str(value.target))(graph)
    return found.detach() if isinstance(found, Tensor) else None


def add_constant(graph: GraphModule, before: Node, value: Tensor) -> Node:
    """A new constant of the graph, as a node in front of `before`."""
    index = sum(name.startswith("constant_") for name, _ in graph.named_buffers(recurse=False))
    graph.register_buffer(f"constant_{index}", value.detach().contiguous())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(f"constant_{index}")


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a node by the names in the operation's schema, defaults filled in."""
    operation: Any = node.target
    schema = operation._schema
    values = {argument.name: argument.default_value for argument in schema.arguments}
    values |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return values | node.kwargs


def dense(model: nn.Module) -> nn.Module:
    """`model` with every masked layer replaced, in place, by its dense counterpart of weight where(mask, weight, 0).

    Masks of torch.nn.utils.prune, which a hook applies in every forward, are applied for good.
    """
    for name, layer in list(model.named_modules()):
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(layer, hook._tensor_name)
        twin: nn.Linear | nn.Conv2d
        if isinstance(layer, MaskedLinear):
            twin = nn.Linear(layer.in_features, layer.out_features, device="meta")
        elif isinstance(layer, MaskedConv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            twin = nn.Conv2d(*sizes, layer.dilation, layer.groups, device="meta")
        else:
            continue
        twin.weight = nn.Parameter(torch.where(layer.weight_mask, layer.weight.detach(), 0))
        twin.bias = layer.bias
        if not name:
            return twin
        model.set_submodule(name, twin)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network that torch.compile's wrapper, or those of data-parallel training, runs."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; what hooks compute into attributes of a module, as torch.nn.utils.prune does, loses its history."""
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


def _export(model: nn.Module, images: Tensor, dynamic: tuple[int, ...]) -> torch.export.ExportedProgram:
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.AUTO),)
    with torch.no_grad(), silent_failure():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    if any(_writes_into_view(node, order) for node in order):
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's own, about its own trees
            program = program.run_decompositions({})  # exact for any aliasing, and slower than the rest of the trace
    return program


def _name(node: Node) -> str:
    """The operation's name without overload, "relu_" for aten.relu_.default; "" for what is not an operation."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def _in_place(node: Node) -> bool:
    name = _name(node)
    return name.endswith("_") and not name.endswith("__")


def _writes_into_view(node: Node, order: dict[Node, int]) -> bool:
    """Whether `node` writes in place into memory that is read later under another name than its first argument's."""
    if not _in_place(node):
        return False
    written = root = node.args[0]
    while isinstance(root, Node) and _may_share_memory(root):
        root = root.args[0]
    if not isinstance(root, Node) or root.op != "call_function":
        return True  # the model's input or its parameters
    names = [root]
    for name in names:
        names += [user for user in name.users if _may_share_memory(user) and order[user] < order[node]]
    return any(order[user] > order[node] for name in names if name is not written for user in name.users)


def _may_share_memory(node: Node) -> bool:
    """Whether the result may be memory of the first argument: views, items of a list of them, in-place operations."""
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return aliases or node.target is operator.getitem


class _SizesUnused(TorchFunctionMode):
    """Ends a trace at padding that depends on the image size."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.pad:
            amounts = args[1] if len(args) > 1 else kwargs["pad"]
            if any(isinstance(amount, torch.SymInt) for amount in amounts):
                raise ValueError("padding is computed from the image size")
        return function(*args, **(kwargs or {}))


def _passes_sizes_on(program: torch.export.ExportedProgram) -> bool:
    """Whether sizes go through functions that fx cannot trace again."""
    for node in program.graph.nodes:
        if node.op != "call_function" or isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target is not aten.sym_size.int and node.target not in vars(operator).values():
            return True
    return False


def _flat(program: torch.export.ExportedProgram) -> GraphModule:
    """The program as an ordinary graph module: parameters as attributes, one tensor in, the model's own output.

    torch.export's modules carry a pytree code generator and tracer that neither pickle nor deepcopy quietly.
    """
    source = program.module(check_guards=False)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in source.graph.nodes:
        if node.op == "output":
            flat = [copies[value] if isinstance(value, Node) else value for value in node.args[0]]
            spec = program.call_spec.out_spec
            graph.output(flat[0] if spec is None else pytree.tree_unflatten(flat, spec))
        else:
            copies[node] = graph.node_copy(node, lambda old: copies[old])
    return GraphModule(source, graph)


def _make_functional(graph: GraphModule) -> None:
    """Turn each in-place operation into its functional twin; what reads the old value afterwards reads the new one."""
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if not _in_place(node):
            continue
        packet = getattr(aten, _name(node)[:-1], None)
        overload = node.target._schema.overload_name or "default"
        if packet is None or overload not in packet.overloads():
            raise ValueError(
                f"model: {layer_name(node) or 'forward'} writes in place with {node.target}; use a functional form"
            )
        node.target = getattr(packet, overload)
        written = node.args[0]
        later = [user for user in written.users if order[user] > order[node]]
        written.replace_all_uses_with(node, delete_user_cb=lambda user, later=later: user in later)


def _drop_identities(graph: GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target in IDENTITIES or _takes_all(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten.view.default:  # its input may be in another layout now: channels_last, not contiguous
            node.target = aten.reshape.default
        elif node.op == "call_function" and not node.users and _name(node).startswith(("_assert", "sym_constrain")):
            graph.graph.erase_node(node)


def _takes_all(node: Node) -> bool:
    """Whether `node` is a slice of everything, as networks write that trim what may be too long."""
    if node.target is not aten.slice.Tensor:
        return False
    values = arguments(node)
    taken, given = ([str(size) for size in value.meta["val"].shape] for value in (node, values["self"]))
    return values["step"] == 1 and taken == given


def _fold_constants(graph: GraphModule) -> None:
    """Compute once what depends on parameters alone: masks, weight standardisation, parametrizations."""
    for node in list(graph.graph.nodes):
        sources = node.all_input_nodes
        if (
            node.op != "call_function"
            or not sources
            or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        ):
            continue
        values = {source: constant(graph, source) for source in sources}
        if any(value is None for value in values.values()):
            continue
        with torch.no_grad():
            operation: Any = node.target
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            result = operation(*args, **kwargs)
        if isinstance(result, Tensor):
            node.replace_all_uses_with(add_constant(graph, node, result))
