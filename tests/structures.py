"""Hand-made structures for tests, named as transformers names the tensors of Llama, Phi3 and Mixtral."""

from __future__ import annotations

from hf_prune.structure.axes import Axis, BranchModule, Member, Owner, Structure
from hf_prune.structure.layouts import Concat, Fixed, Layout, Product, Units


class _Builder:
    def __init__(self) -> None:
        self.layouts: dict[str, tuple[Layout, ...]] = {}
        self.members: dict[str, list[Member]] = {}
        self.owners: dict[str, Owner] = {}

    def add(self, name, layouts, carried, owner=None):
        """`carried`: `(axis, dim, role)` triples."""
        self.layouts[name] = layouts
        for axis, dim, role in carried:
            self.members.setdefault(axis, []).append(Member(name, dim, role))
        if owner is not None:
            self.owners[name] = owner


def llama(
    num_layers=8, hidden=256, mlp=1024, kv=4, group=2, head_dim=32, vocab=8192, *, fused=False, tied=True, experts=0
) -> Structure:
    """A Llama; `fused`: Phi3's qkv and gate_up; `experts`: Mixtral's 3-D expert weights."""
    build = _Builder()
    d = Units("hidden", hidden)
    build.add("model.embed_tokens.weight", (Fixed(vocab), d), [("hidden", 1, "producer")])
    for i in range(num_layers):
        attention, mlp_name, prefix = f"layers.{i}.attention", f"layers.{i}.mlp", f"model.layers.{i}."
        k, m = Units(attention, kv), Units(mlp_name, mlp)
        q_rows, kv_rows = Product((k, Fixed(group), Fixed(head_dim))), Product((k, Fixed(head_dim)))
        in_attention, in_mlp = Owner(i, "attention"), Owner(i, "mlp")
        made = [(attention, 0, "producer"), ("hidden", 1, "consumer")]
        if fused:
            rows = Concat((q_rows, kv_rows, kv_rows))
            build.add(prefix + "self_attn.qkv_proj.weight", (rows, d), made, in_attention)
        else:
            for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
                build.add(f"{prefix}self_attn.{name}_proj.weight", (rows, d), made, in_attention)
        used = [(attention, 1, "consumer"), ("hidden", 0, "producer")]
        build.add(prefix + "self_attn.o_proj.weight", (d, q_rows), used, in_attention)
        _add_mlp(build, prefix, d, m, fused, experts, in_mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            build.add(f"{prefix}{name}.weight", (d,), [("hidden", 0, "other")], Owner(i, None))
    build.add("model.norm.weight", (d,), [("hidden", 0, "other")])
    build.add("lm_head.weight", (Fixed(vocab), d), [("hidden", 1, "consumer")])

    axes = [Axis("hidden", "hidden", None, hidden, exact=False)]
    for i in range(num_layers):
        axes += [Axis(f"layers.{i}.attention", "attention", i, kv), Axis(f"layers.{i}.mlp", "mlp", i, mlp)]
    axes += [Axis(name, "layer", None, num_layers) for name in ("layers", "layers.attention", "layers.mlp")]
    branches = {f"layers.{i}.attention": BranchModule("self_attn", ["zeros", None]) for i in range(num_layers)}
    branches.update({f"layers.{i}.mlp": BranchModule("mlp", "zeros") for i in range(num_layers)})
    return Structure(
        model_type="mixtral" if experts else "phi3" if fused else "llama",
        axes={axis.name: axis for axis in axes},
        layouts=build.layouts,
        members={name: tuple(found) for name, found in build.members.items()},
        layer_paths=tuple(f"model.layers.{i}" for i in range(num_layers)),
        owners=build.owners,
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        branch_modules=branches,
    )


def _add_mlp(build, prefix, d, m, fused, experts, owner):
    made, used = (
        [(m.axis, 0, "producer"), ("hidden", 1, "consumer")],
        [(m.axis, 1, "consumer"), ("hidden", 0, "producer")],
    )
    if experts:
        after_expert = (
            [(axis, dim + 1, role) for axis, dim, role in made],
            [(axis, dim + 1, role) for axis, dim, role in used],
        )
        gate_up, down = (Fixed(experts), Concat((m, m)), d), (Fixed(experts), d, m)
        build.add(prefix + "mlp.gate.weight", (Fixed(experts), d), [("hidden", 1, "consumer")], owner)
        build.add(prefix + "mlp.experts.gate_up_proj", gate_up, after_expert[0], owner)
        build.add(prefix + "mlp.experts.down_proj", down, after_expert[1], owner)
        return
    if fused:
        build.add(prefix + "mlp.gate_up_proj.weight", (Concat((m, m)), d), made, owner)
    else:
        for name in ("gate", "up"):
            build.add(f"{prefix}mlp.{name}_proj.weight", (m, d), made, owner)
    build.add(prefix + "mlp.down_proj.weight", (d, m), used, owner)
