"""Do the tests notice small faults in structure, surgery and checkpoint? Goes on from docs/mutants.json.

    python tests/benchmarks/mutants.py --per-folder 25           # a sample drawn evenly over functions
    python tests/benchmarks/mutants.py --again                   # those that survived, after tests were added
    python tests/benchmarks/mutants.py --only 'NAME'             # one mutant, printed; nothing is written

A mutant is one changed expression or statement, in a copy of the repository. The nearest test files run against it,
until one test fails. One process imports torch and transformers and forks for every mutant.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"
FOLDERS = ["format", "structure", "surgery", "checkpoint"]
# The longest key that a module's path begins with says which test files are near to it.
NEAREST = {
    "structure": ["test_rules.py", "test_structure.py", "test_unify.py"],
    "structure/layouts": ["test_layouts.py", "test_structure.py"],
    "structure/unify": ["test_unify.py", "test_rules.py", "test_structure.py"],
    "format": ["test_per_layer.py", "test_structure.py", "test_loading.py"],
    "surgery": ["test_surgery.py", "test_depth.py"],
    "surgery/in_place": ["test_recovery_in_place.py"],
    "surgery/judging": ["test_depth.py", "test_surgery.py"],
    "surgery/pruning": [
        "test_recovery_in_place.py",
        "test_surgery.py",
        "test_layers_on_disk.py::test_a_pruned_checkpoint_is_pruned_again",
        "test_layers_on_disk.py::test_buffers_that_are_saved_stay_with_their_layers",
    ],
    "surgery/slicing": ["test_recovery_in_place.py", "test_surgery.py"],
    "checkpoint": ["test_loading.py", "test_saving.py"],
    "checkpoint/hub": ["test_hub.py"],
    "format/per_layer": ["test_per_layer.py", "test_loading.py"],
    "checkpoint/autoload": ["test_checkpoint_traps.py", "test_loading.py"],
    "format/stock_guard": ["test_checkpoint_traps.py", "test_per_layer.py"],
    "format/remote_code": ["test_checkpoint_traps.py", "test_saving.py"],
}
COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"),
    ast.Div: ("/", "*"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`module`: path below hf_prune; `start`, `end`: what `after` replaces, in bytes of the file."""

    module: str
    function: str
    operator: str
    number: int
    before: str
    after: str
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.module}::{self.function}::{self.operator} {self.number}"


class _Finder(ast.NodeVisitor):
    """All mutants of a module. Messages of errors, annotations and what runs on import stay as they are."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.scope: list[str] = []
        self.in_function = False
        self.found: list[Mutant] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.visit(ast.parse(source))

    def text(self, node: ast.AST) -> str:
        return self.source[slice(*self.span(node))].decode()

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, operator: str, node: ast.AST, after: str) -> None:
        if not self.in_function:
            return
        function = ".".join(self.scope)
        self.counts[function, operator] += 1
        number = self.counts[function, operator]
        self.found.append(Mutant(self.module, function, operator, number, self.text(node), after, *self.span(node)))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        for child in node.body:
            self.visit(child)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.in_function = self.in_function, True
        if not outer:
            self.scope.append(node.name)
        for child in node.body:
            self.visit(child)
        self.in_function = outer
        if not outer:
            self.scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("statement removed", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self.add("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and self.text(node.value) != "None":
            self.add("returns None", node, "return None")
        self.generic_visit(node)

    def _condition(self, node: ast.If | ast.IfExp) -> None:
        if not isinstance(node.test, ast.Compare) or len(node.test.ops) > 1:
            self.add("condition negated", node.test, f"not ({self.text(node.test)})")
        self.generic_visit(node)

    visit_If = visit_IfExp = _condition  # noqa: N815

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            if not isinstance(test, ast.Compare):
                self.add("condition negated", test, f"(not ({self.text(test)}))")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            self._exchanged("comparison", node, left, right, COMPARISONS[type(op)])
            left = right
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not isinstance(node.left, ast.JoinedStr):
            self._exchanged("arithmetic", node, node.left, node.right, ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def _exchanged(
        self, operator: str, node: ast.expr, left: ast.expr, right: ast.expr, signs: tuple[str, str]
    ) -> None:
        """Between two operands lie the sign and perhaps parentheses."""
        start, end = self.span(node)
        first, last = self.span(left)[1], self.span(right)[0]
        between = self.source[first:last].decode().replace(*signs, 1)
        self.add(operator, node, self.source[start:first].decode() + between + self.source[last:end].decode())

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = " and " if isinstance(node.op, ast.Or) else " or "
        self.add("and, or", node, "(" + other.join(f"({self.text(value)})" for value in node.values) + ")")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self.add("constant", node, str(node.value + 1))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Positions in f-strings are not those of the file before Python 3.12."""

    def visit_Call(self, node: ast.Call) -> None:
        if len(node.args) >= 2 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            first, second = node.args[:2]
            if self.text(node.func) not in ("isinstance", "getattr", "hasattr", "setattr", "cast"):
                between = self.source[self.span(first)[1] : self.span(second)[0]].decode()
                start, end = self.span(node)
                head = self.source[start : self.span(first)[0]].decode()
                tail = self.source[self.span(second)[1] : end].decode()
                self.add("arguments swapped", node, head + self.text(second) + between + self.text(first) + tail)
        self.generic_visit(node)


def mutants_of(folder: str) -> list[Mutant]:
    package = ROOT / "hf_prune"
    return [
        mutant
        for path in sorted((package / folder).rglob("*.py"))
        for mutant in _Finder(path.relative_to(package).with_suffix("").as_posix(), path.read_bytes()).found
    ]


def sample(mutants: list[Mutant], num: int, seed: int) -> list[Mutant]:
    """`num` of them: a function at a time, in random order; of each, a random operator first. Longer ones begin so."""
    draw = random.Random(seed)
    of_function: dict[tuple[str, str], dict[str, list[Mutant]]] = defaultdict(lambda: defaultdict(list))
    for mutant in mutants:
        of_function[mutant.module, mutant.function][mutant.operator].append(mutant)
    queues = []
    for operators in of_function.values():
        for queue in operators.values():
            draw.shuffle(queue)
        names = list(operators)
        draw.shuffle(names)
        queues.append([mutant for name in names for mutant in operators[name][:1]])
    draw.shuffle(queues)
    rounds = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    return rounds[:num]


def _left(mutants: list[Mutant], state: dict, num: int) -> list[Mutant]:
    """Those of one folder to try until there are `num` results of it."""
    folder = mutants[0].module.split("/")[0]
    done = {name for name in state["mutants"] if name.startswith(f"{folder}/")}
    order = [mutant for mutant in sample(mutants, len(mutants), state["seed"]) if mutant.name not in done]
    return order[: max(0, num - len(done))]


def nearest_tests(module: str) -> list[str]:
    key = max((key for key in NEAREST if module.startswith(key)), key=len)
    return [f"tests/{name}" for name in NEAREST[key]]


def run_tests(copy: Path, tests: list[str], limit_s: float, modules_file: Path | None = None) -> dict:
    """Run the tests in a fork: {"outcome": "survived", "killed" or "time limit", "by": first failure, "cpu_s"}."""
    assert "hf_prune" not in sys.modules, "hf_prune must be imported by the forks alone"
    read, write = os.pipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pid = os.fork()
    if pid == 0:
        _in_fork(copy, tests, write, modules_file)
    os.close(write)
    deadline = time.monotonic() + limit_s
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended[0] == 0:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(read) as stream:
        said = stream.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    if ended[0] == 0:
        return {"outcome": "time limit", "by": "", "cpu_s": cpu_s}
    if said == "passed":
        return {"outcome": "survived", "by": "", "cpu_s": cpu_s}
    return {"outcome": "killed", "by": said or "the process died", "cpu_s": cpu_s}


def _in_fork(copy: Path, tests: list[str], write: int, modules_file: Path | None) -> None:
    os.setpgid(0, 0)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT), str(Path(__file__).parent)))]
    os.environ["PYTHONPATH"] = str(copy)

    class First:
        said = ""

        def pytest_runtest_logreport(self, report) -> None:
            if report.failed and not self.said:
                self.said = report.nodeid

        def pytest_collectreport(self, report) -> None:
            if report.failed and not self.said:
                self.said = f"{report.nodeid} (import)"

    import pytest

    first = First()
    said = ""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = pytest.main(["-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", *tests], plugins=[first])
        said = "passed" if code == 0 else first.said or "import of hf_prune"
    except BaseException as error:
        said = f"{type(error).__name__} in pytest"
    if modules_file:
        names = sorted(name for name in sys.modules if name.startswith(("transformers.", "torch.", "tokenizers")))
        modules_file.write_text(json.dumps(names), encoding="utf-8")
    os.write(write, said.encode()[:4000])
    os._exit(0)


def copied(place: Path) -> Path:
    for name in ("hf_prune", "tests", "docs", "examples"):
        shutil.copytree(ROOT / name, place / name)
    for name in ("pyproject.toml", "README.md", "Makefile", "LICENSE"):
        shutil.copy2(ROOT / name, place / name)
    return place


def warmed(copy: Path, tests: list[str]) -> None:
    """The tests pass without a mutant, and what they import of torch and transformers is imported here, once."""
    from importlib import import_module

    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    modules = copy / "modules.json"
    for file in tests:
        result = run_tests(copy, [file], 300, modules)
        print(f"{file}: {result['cpu_s']} s", flush=True)
        if result["outcome"] != "survived":
            raise SystemExit(f"without a mutant: {result}")
        for name in json.loads(modules.read_text(encoding="utf-8")):
            if name.startswith("transformers.models."):
                import_module(name)


def judged(mutant: Mutant, copy: Path, limit_s: float) -> dict:
    path = copy / "hf_prune" / f"{mutant.module}.py"
    source = path.read_bytes()
    path.write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])
    try:
        result = run_tests(copy, nearest_tests(mutant.module), limit_s)
    finally:
        path.write_bytes(source)
    line = source[: mutant.start].count(b"\n") + 1
    kept = {name: value for name, value in asdict(mutant).items() if name not in ("start", "end")}
    return {**kept, "line": line, **result}


def page_of(state: dict) -> str:
    import torch
    import transformers

    results = list(state["mutants"].values())
    minutes = sum(result["cpu_s"] for result in results) / 60

    def rows(key: str, names: list[str]) -> list[str]:
        out = []
        for name in names:
            own = [r for r in results if (r["module"].split("/")[0] if key == "folder" else r[key]) == name]
            added = sum(r.get("added", False) for r in own)
            survived = [r for r in own if r["outcome"] == "survived"]
            explained = sum("why" in r for r in survived)
            numbers = [len(own), len(own) - len(survived) - added, added, explained, len(survived) - explained]
            possible = [state["possible"][name]] if key == "folder" else []
            out.append("| " + " | ".join(map(str, [name, *possible, *numbers])) + " |")
        return out

    counts = "mutants tried | killed | killed by a test added for it | survived, explained | open |"
    lines = [
        "# Mutants",
        "",
        "Small faults put into `structure/`, `surgery/` and `checkpoint/`, one at a time: do the tests notice?",
        f"A seeded sample (seed {state['seed']}), drawn evenly over the functions, each run against the test files",
        "nearest to its module ([`mutants.py`](../tests/benchmarks/mutants.py), `make mutants`; goes on where it",
        "stopped), until a test fails. A mutant that exceeds the time limit counts as killed.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{minutes:.0f} minutes of one core.",
        "",
        f"| folder | mutants there | {counts}",
        "| --- |" + " --- |" * 6,
        *rows("folder", FOLDERS),
        "",
        f"| operator | {counts}",
        "| --- |" + " --- |" * 5,
        *rows("operator", sorted({r["operator"] for r in results})),
        "",
        "## Survivors",
        "",
        *(
            f"- {_shown(name, r)}: {r.get('why', 'open.')}"
            for name, r in state["mutants"].items()
            if r["outcome"] == "survived"
        ),
        "",
        "## Killed by tests added for them",
        "",
        *(f"- {_shown(name, r)}: `{r['by']}`" for name, r in state["mutants"].items() if r.get("added")),
    ]
    return "\n".join(lines) + "\n"


def _shown(name: str, result: dict) -> str:
    before, after = (" ".join(result[key].split()) for key in ("before", "after"))
    return f"**{name}** (line {result['line']}): `{before[:160]}` → `{after[:160]}`"


def save(state: dict) -> None:
    for path, text in ((RESULTS, json.dumps(state, indent=1) + "\n"), (PAGE, page_of(state))):
        new = path.with_name(path.name + ".new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-folder", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=120, help="seconds a mutant may take")
    parser.add_argument("--only", help="the name of one mutant")
    parser.add_argument("--again", action="store_true", help="try again those that survived")
    parser.add_argument("--page", action="store_true", help="write the page again, run nothing")
    args = parser.parse_args()
    every = {folder: mutants_of(folder) for folder in FOLDERS}
    state = {"seed": args.seed, "possible": {}, "mutants": {}}
    if RESULTS.exists():
        state = json.loads(RESULTS.read_text(encoding="utf-8"))
    if args.page:
        save(state)
        return 0
    state["possible"] = {folder: len(mutants) for folder, mutants in every.items()}
    if args.only:
        todo = [mutant for mutants in every.values() for mutant in mutants if mutant.name == args.only]
    elif args.again:
        todo = [m for ms in every.values() for m in ms if state["mutants"].get(m.name, {}).get("outcome") == "survived"]
    else:
        left = [_left(mutants, state, args.per_folder) for mutants in every.values()]
        todo = [mutant for row in itertools.zip_longest(*left) for mutant in row if mutant is not None]
    if not todo:
        print("nothing left to try")
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as place:
        copy = copied(Path(place).resolve())
        warmed(copy, list(dict.fromkeys(file for mutant in todo for file in nearest_tests(mutant.module))))
        for i, mutant in enumerate(todo, 1):
            result = judged(mutant, copy, args.limit_s)
            print(
                f"{i}/{len(todo)} {mutant.name} (line {result['line']}): {result['outcome']} {result['by']}", flush=True
            )
            if not args.only:
                if args.again:
                    kept = {"why": state["mutants"][mutant.name].get("why")} if result["outcome"] == "survived" else {}
                    result |= (
                        {"added": True} if result["outcome"] != "survived" else {k: v for k, v in kept.items() if v}
                    )
                state["mutants"][mutant.name] = result
                save(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
