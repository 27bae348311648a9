"""What single operations say of dimensions, on functions of a few lines."""

from __future__ import annotations

import string

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_prune.structure.tracing import trace
from hf_prune.structure.unify import Atom, Prod, leaves, resolve

V, D = 17, 6  # vocabulary and hidden size


class Model(nn.Module):
    """Parameters of the given shapes, and a function of `x` `[2, T, D]` and the parameters."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(V, D))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(*shape)))
        self.function = function

    def forward(self, input_ids, use_cache):
        x = F.embedding(input_ids, self.embedding)
        return self.function(x, *(p for name, p in self.named_parameters() if name != "embedding"))


def traced(function, **shapes):
    """Layouts of the parameters as text, fixed atoms in capitals; and the tracer."""
    with torch.device("meta"):
        model = Model(function, **shapes)
    tracer, terms = trace(model)
    names: dict[int, str] = {}

    def show(term):
        term = resolve(term)
        if isinstance(term, Atom):
            name = names.setdefault(id(term), string.ascii_lowercase[len(names)])
            return name.upper() if term.fixed else name
        if isinstance(term, Prod):
            return "(" + " ".join(show(factor) for factor in term.factors) + ")" if term.factors else "1"
        return "[" + " + ".join(show(part) for part in term.parts) + "]"

    return {name: " , ".join(show(term) for term in found) for name, found in terms.items()}, tracer


def test_projections_and_gate_share_their_inner_axis():
    found, tracer = traced(
        lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
        gate=(8, D),
        up=(8, D),
        down=(D, 8),
    )
    assert found == {"embedding": "a , b", "gate": "c , b", "up": "c , b", "down": "d , c"}
    assert [term.size for term in tracer.consumed["down"]] == [8]
    assert tracer.unsupported_ops == {}


def test_fused_gate_and_up_are_two_parts():
    def mlp(x, gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.gelu(gate) * up, down)

    assert traced(mlp, gate_up=(16, D), down=(D, 8))[0]["gate_up"] == "[c + c] , b"


def test_residual_ties_output_to_input():
    found, _ = traced(lambda x, w: x + F.linear(x, w), w=(D, D))
    assert found["w"] == "b , b"


def attend(q, k, v):
    scores = (q @ k.transpose(-1, -2)).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


def test_queries_of_one_kv_group_go_together():
    def attention(x, q, kv, o):
        queries = F.linear(x, q).view(2, -1, 6, 4).transpose(1, 2)
        keys = F.linear(x, kv).view(2, -1, 3, 4).transpose(1, 2)
        keys = keys[:, :, None].expand(2, 3, 2, -1, 4).reshape(2, 6, -1, 4)  # repeat_kv
        return F.linear(attend(queries, keys, keys), o)

    found, tracer = traced(attention, q=(24, D), kv=(12, D), o=(D, 24))
    assert found["q"] == "(c d e) , b"
    assert found["kv"] == "(c e) , b"
    assert found["o"] == "f , (c d e)"
    heads = {atom.size for name in ("q", "o") for term in tracer.consumed[name] for atom in leaves(term) if atom.heads}
    assert heads == {3, 2}


def test_fused_qkv_interleaved_per_head():
    def attention(x, qkv, o):
        q, k, v = F.linear(x, qkv).view(2, -1, 3, 12).transpose(1, 2).chunk(3, dim=-1)
        return F.linear(attend(q, k, v), o)

    found, _ = traced(attention, qkv=(36, D), o=(D, 12))
    assert found["qkv"] == "(c [d + d + e]) , b"
    assert found["o"] == "f , (c e)"


def test_fused_qkv_in_blocks():
    def attention(x, qkv, o):
        q, k, v = (part.view(2, -1, 3, 4).transpose(1, 2) for part in F.linear(x, qkv).split(12, dim=-1))
        return F.linear(attend(q, k, v), o)

    found, _ = traced(attention, qkv=(36, D), o=(D, 12))
    assert found["qkv"] == "[(c d) + (c d) + (c e)] , b"


def test_strided_slices_are_a_trailing_factor():
    def mlp(x, gate_up, down):  # gpt-oss: gate and up alternate
        both = F.linear(x, gate_up)
        return F.linear(both[..., ::2] * both[..., 1::2], down)

    found, _ = traced(mlp, gate_up=(16, D), down=(D, 8))
    assert found["gate_up"].startswith("(c ")
    assert found["down"] == "e , c"


def test_depthwise_convolution_keeps_channels_apart():
    def mix(x, w, conv, out):
        y = F.conv1d(F.linear(x, w).transpose(1, 2), conv, padding=2, groups=8)[..., :-2]
        return F.linear(y.transpose(1, 2), out)

    found, _ = traced(mix, w=(8, D), conv=(8, 1, 3), out=(D, 8))
    assert (found["w"], found["conv"], found["out"]) == ("c , b", "c , 1 , d", "e , c")


def test_convolution_within_groups():
    def mix(x, w, conv, out):
        y = F.conv1d(F.linear(x, w).transpose(1, 2), conv, padding=1, groups=2)
        return F.linear(y.transpose(1, 2), out)

    found, _ = traced(mix, w=(8, D), conv=(6, 4, 3), out=(D, 6))
    assert found["w"] == "(c d) , b"
    assert found["conv"] == "(c e) , d , f"
    assert found["out"] == "g , (c e)"


def test_cat_and_pad_make_parts():
    def join(x, a, b, out):
        y = torch.cat([F.linear(x, a), F.linear(x, b)], dim=-1)
        return F.linear(F.pad(y, (0, 2)), out)

    found, _ = traced(join, a=(4, D), b=(3, D), out=(D, 9))
    assert (found["a"], found["b"]) == ("c , b", "d , b")
    assert found["out"] == "e , [c + d + F]"


def test_a_slice_across_a_product_fixes_only_that_dimension():
    def shift(x, w, out):
        y = F.linear(x, w).view(2, -1, 4, 3).transpose(1, 2)  # heads stay apart
        y = y.flatten(2)[..., 1:-2].sum(-1)
        return F.linear(y, out)

    found, _ = traced(shift, w=(12, D), out=(D, 4))
    assert found["w"] == "(c D) , b"
    assert found["out"] == "e , c"


def test_norm_mixes_but_does_not_fix():
    found, tracer = traced(lambda x, w, n: F.layer_norm(F.linear(x, w), (8,), n), w=(8, D), n=(8,))
    assert found["w"] == "c , b"
    assert found["n"] == "c"
    del tracer


def test_tokens_are_rows_of_the_embedding():
    found, tracer = traced(lambda x, w: F.linear(x, w), w=(V, D))
    assert found["embedding"] == "a , b"
    assert tracer.token_tables == {"embedding"}
    assert found["w"] == "c , b"


def test_solve_of_triangular_systems_leaves_batch_and_columns_alone():
    def solve(x, w, out):
        y = F.linear(x, w).view(2, -1, 4, 2).transpose(1, 2)
        square = y @ y.transpose(-1, -2)
        return F.linear(torch.linalg.solve_triangular(square, y, upper=False).transpose(1, 2).flatten(2), out)

    found, _ = traced(solve, w=(8, D), out=(D, 8))
    assert found["w"] == "(c d) , b"
    assert found["out"] == "e , (c d)"


def test_rows_of_a_system_of_equations_cannot_go():
    def solve(x, w, out):
        y = F.linear(x, w).transpose(1, 2)
        return F.linear(torch.linalg.solve_triangular(y @ y.transpose(1, 2), y, upper=False).transpose(1, 2), out)

    found, _ = traced(solve, w=(8, D), out=(D, 8))
    assert found["w"] == "C , b"


def maxima(scores):
    first = scores.max(-1, keepdim=True)[1]
    return torch.cat([first, scores.scatter(-1, first, -torch.inf).max(-1, keepdim=True)[1]], -1)


@pytest.mark.parametrize(
    ("choose", "free"),
    [
        (lambda scores: scores.topk(2)[1], True),
        (lambda scores: scores.topk(2)[1].to(torch.int32).t().contiguous().t(), True),
        (maxima, True),
        (lambda scores: scores.topk(2)[1] % 5, False),  # which numbers come out depends on how many there are
        (lambda scores: scores.topk(2)[1].flip(-1).sort(-1)[0], False),
        (lambda scores: scores.argsort(-1)[:, :2], False),
        (lambda scores: torch.ones(5).topk(2)[1].expand(len(scores), 2), False),
    ],
)
def test_what_is_looked_up_by_a_choice_lies_on_the_axis_that_it_chooses_from(choose, free):
    def mixture(x, router, bias, experts):
        flat = x.reshape(-1, D)
        chosen = choose((F.linear(flat, router) + bias).softmax(-1))
        return experts[chosen.reshape(-1)] @ flat.repeat_interleave(2, 0)[..., None]

    found, tracer = traced(mixture, router=(5, D), bias=(5,), experts=(5, 8, D))
    axes = [found["router"][0], found["bias"][0], found["experts"][0]]
    if free:
        assert axes == ["c", "c", "c"]
    else:
        assert axes[2].isupper()
    if free:
        bias = next(own for own in tracer.known.values() if own.parameter == "bias")
        assert [atom.chosen for atom in leaves(bias.terms[0])] == [2]


def test_experts_visited_one_by_one_are_all_seen():
    def experts(x, router, first, second):
        flat = x.reshape(-1, D)
        chosen = F.linear(flat, router).topk(2)[1]
        mask = F.one_hot(chosen, 3).permute(2, 1, 0)
        result = torch.zeros_like(flat)
        for expert in mask.sum((-1, -2)).nonzero():
            expert = int(expert[0])
            place, token = torch.where(mask[expert])
            result.index_add_(
                0, token, F.linear(F.linear(flat[token], (first, second)[expert % 2]), (first, second)[expert % 2].t())
            )
            del place
        return result

    found, tracer = traced(experts, router=(3, D), first=(8, D), second=(5, D))
    assert (found["first"], found["second"]) == ("d , b", "e , b")
    assert {"first", "second"} <= set(tracer.consumed)
    assert tracer.unsupported_ops == {}


def test_a_comparison_of_lengths_is_decided():
    def checked(x, w):
        lengths = torch.ones(x.shape[:2]).sum(1)
        assert lengths.max().item() == x.shape[1]
        return F.linear(x, w)

    assert traced(checked, w=(8, D))[0]["w"] == "c , b"


def test_values_that_depend_on_weights_stop_the_trace():
    with pytest.raises(Exception, match="_local_scalar_dense"):
        traced(lambda x, w: F.linear(x, w) * F.linear(x, w).sum().item(), w=(8, D))


def test_an_operation_without_a_rule_fixes_what_it_touches_and_is_reported():
    def odd(x, w, other, out):
        y = F.linear(x, w)
        spectrum = torch.fft.rfft(y, dim=-1).real
        return F.linear(F.gelu(F.linear(x, other)), out) + spectrum.sum()

    found, tracer = traced(odd, w=(8, D), other=(8, D), out=(D, 8))
    assert found["w"].startswith("C")
    assert found["other"].startswith("d , ")  # what it does not touch stays free
    assert set(tracer.unsupported_ops) == {"_fft_r2c"}
    assert tracer.unsupported_ops["_fft_r2c"] == "the model"


@pytest.mark.parametrize(
    "operation", [torch.sort, lambda x: torch.flip(x, (-1,)), lambda x: x.unfold(-1, 2, 1).sum(-1)]
)
def test_entries_that_change_places_are_fixed(operation):
    def mix(x, w, v):
        result = operation(F.linear(x, w))
        result = result[0] if isinstance(result, tuple) else result
        return F.linear(result, v)

    size = 7 if "unfold" in str(operation.__code__.co_names if hasattr(operation, "__code__") else "") else 8
    found, _ = traced(mix, w=(8, D), v=(D, size))
    assert found["w"].startswith("C , ")


def test_constants_do_not_tie_layers_together():
    def two_layers(x, a, b):
        positions = torch.arange(8.0)  # one constant meets the weights of two layers
        return (F.linear(x, a) * positions).sum() + (F.linear(x, b) * positions).sum()

    found, _ = traced(two_layers, a=(8, D), b=(8, D))
    assert found["a"].split(" , ")[0] != found["b"].split(" , ")[0]


def test_how_a_constant_was_put_together_does_not_matter():
    def alibi(x, w, out):
        slopes = torch.cat([torch.arange(4.0), torch.arange(2.0)])
        return F.linear(F.linear(x, w) * slopes, out)

    found, _ = traced(alibi, w=(6, D), out=(D, 6))
    assert found["w"] == "c , b"


def test_softmax_of_less_than_three_dimensions_finds_no_heads():
    """Heads are those of attention scores; a router's probabilities, or those of a weight, have none."""

    def mix(x, w, o):
        return F.linear(F.linear(x, w.softmax(1)), o)

    _, tracer = traced(mix, w=(8, D), o=(D, 8))
    assert not any(atom.heads for terms in tracer.consumed.values() for term in terms for atom in leaves(term))


@pytest.mark.parametrize("write", [lambda s: s.softmax(-1), lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()])
def test_a_softmax_finds_heads_however_it_is_written(write):
    def attention(x, q, o):
        heads = F.linear(x, q).unflatten(-1, (4, 2)).transpose(1, 2)
        return F.linear((write(heads @ heads.mT) @ heads).transpose(1, 2).flatten(2), o)

    _, tracer = traced(attention, q=(8, D), o=(D, 8))
    assert [atom.heads for term in tracer.consumed["o"] for atom in leaves(term)] == [True, False]


@pytest.mark.parametrize(
    ("stretch", "differs"),
    [
        (lambda index: index.expand(4, -1, -1), False),
        (lambda index: index.repeat(4, 1, 1), False),
        (lambda index: index + torch.arange(4)[:, None, None], True),
    ],
)
def test_what_is_stretched_over_heads_does_not_differ_along_them(stretch, differs):
    def attention(x, q, o):
        heads = F.linear(x, q).unflatten(-1, (4, 2)).transpose(1, 2)
        scores = (heads @ heads.mT) * stretch(torch.arange(121).view(1, 11, 11))
        return F.linear((scores.softmax(-1) @ heads).transpose(1, 2).flatten(2), o)

    _, tracer = traced(attention, q=(8, D), o=(D, 8))
    heads = next(leaves(tracer.consumed["o"][0]))
    assert heads.heads
    assert bool(heads.origins) == differs


def test_a_tensor_in_memory_meets_those_without_memory():
    offset = torch.ones(8)
    found, _ = traced(lambda x, w, o: F.linear(F.linear(x, w) + offset, o), w=(8, D), o=(D, 8))
    assert found["w"].split(" , ")[0] == found["o"].split(" , ")[1]


def test_log_sigmoid_is_elementwise():
    found, tracer = traced(lambda x, w, o: F.linear(F.logsigmoid(F.linear(x, w)), o), w=(8, D), o=(D, 8))
    assert (found["w"], found["o"]) == ("c , b", "d , c")
    assert tracer.unsupported_ops == {}


@pytest.mark.parametrize(
    "statistic",
    [
        lambda y: y.kthvalue(1)[0].unsqueeze(-1),
        lambda y: y.kthvalue(5, dim=-1, keepdim=True)[0],
        lambda y: y.mode()[0].unsqueeze(-1),
        lambda y: y.mode(keepdim=True)[0],
        lambda y: y.median(-1, keepdim=True)[0],
        lambda y: y.amax(-1, keepdim=True),
    ],
)
def test_a_statistic_mixes_the_dimension_that_it_reduces(statistic):
    def mlp(x, w, o):
        y = F.linear(x, w)
        return F.linear(y - statistic(y), o)

    found, tracer = traced(mlp, w=(8, D), o=(D, 8))
    assert (found["w"], found["o"]) == ("c , b", "d , c")
    assert tracer.unsupported_ops == {}
    assert [bool(atom.mixed) for atom in leaves(tracer.consumed["o"][0])] == [True]
