"""The law of the ladder: same name, same text; each script is short, plain and a program alone."""

import ast
import difflib
import io
import itertools
import tokenize
from pathlib import Path

import pytest

# What may differ: an algorithm's own. REINFORCE has no critic and collects whole episodes.
OWN = {"Args", "check_args", "make_optimizers", "update"}
EXEMPT = {name: OWN for name in ("vpg", "trpo", "ppo")}
EXEMPT["reinforce"] = OWN | {"Agent", "Rollout", "collect_rollout", "Batch", "learn"}
EXEMPT["ppo_torchrun"] = {"RunningMeanStd", "update", "learn", "train"}
# Tokens and lines of a script, and lines of `diff a.py b.py`: grow one only for an idea.
SIZES = {"reinforce": (2_657, 372), "vpg": (3_073, 437), "trpo": (3_550, 499), "ppo": (3_194, 444)}
SIZES["ppo_torchrun"] = (3_473, 477)
DIFFS = {("reinforce", "vpg"): 231, ("vpg", "ppo"): 68, ("vpg", "trpo"): 101}
DIFFS["ppo", "ppo_torchrun"] = 63
ROOT = Path(__file__).resolve().parents[1]
TEXTS = {name: (ROOT / f"{name}.py").read_text() for name in EXEMPT}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
DEFINITION = ast.FunctionDef | ast.ClassDef
KERNEL = """try:
    from gae_kernel import compute_gae
except ImportError:
    compute_gae = compute_gae_python"""

each = pytest.mark.parametrize("name", TEXTS)
pairs = pytest.mark.parametrize("one, other", [*itertools.combinations(TEXTS, 2)])


def definitions(name):
    """The text of each function and class."""
    nodes = [node for node in TREES[name].body if isinstance(node, DEFINITION)]
    return {node.name: ast.get_source_segment(TEXTS[name], node) for node in nodes}


@pairs
def test_same_name_same_text(one, other):
    ones, others = definitions(one), definitions(other)
    shared = (ones.keys() & others.keys()) - EXEMPT[one] - EXEMPT[other]
    assert {"make_envs", "mlp", "evaluate", "log", "save", "load"} <= shared
    assert not {name for name in shared if ones[name] != others[name]}


@pairs
def test_shared_arguments_have_the_same_order_and_type(one, other):
    def arguments(name):
        (args,) = ast.parse(definitions(name)["Args"]).body
        # What one algorithm needs another may leave out: `float | None` is a float.
        return {x.target.id: ast.unparse(x.annotation).removesuffix(" | None") for x in args.body}

    ones, others = arguments(one), arguments(other)
    shared = [x for x in ones.items() if x[0] in others]
    assert shared == [x for x in others.items() if x[0] in ones]


@each
def test_importing_only_defines(name):
    """What is neither import nor definition takes the kernel or is the program, the same in all."""
    own = DEFINITION | ast.Import | ast.ImportFrom
    rest = [node for node in TREES[name].body[1:] if not isinstance(node, own)]
    texts = [ast.unparse(node) for node in rest]
    if name != "reinforce":
        assert texts.pop(0) == KERNEL
    if name != "ppo_torchrun":  # where the program starts and ends a group of processes
        assert texts == [ast.unparse(TREES["ppo"].body[-1])]
    assert len(texts) == 1 and texts[0].startswith("if __name__ == '__main__':")


@each
def test_a_script_is_plain(name):
    """No private API, thread, signal, process, set variable, hidden default or walrus."""
    banned = {"signal", "threading", "subprocess", "multiprocessing", "os", "ctypes", "warnings"}
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.NamedExpr | ast.Global | ast.Nonlocal | ast.Lambda)
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & banned
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in banned
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            assert not node.attr.startswith("_"), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            assert len(node.args) < 3, ast.unparse(node)


def count_tokens(text):
    """What there is to read: names, operators, numbers and strings, however they are laid out."""
    count = depth = 0  # from Python 3.12 on, an f-string has tokens of its own: it counts as one
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        depth -= name == "FSTRING_END"
        layout = name == "COMMENT" or not token.string.strip()
        count += depth == 0 and not layout and name != "FSTRING_END"
        depth += name == "FSTRING_START"
    return count


def count_diff(one, other):
    """Lines that `diff` prints: where, the old lines, "---" between old and new, the new lines."""
    matcher = difflib.SequenceMatcher(None, one.splitlines(), other.splitlines(), autojunk=False)
    changed = [op for op in matcher.get_opcodes() if op[0] != "equal"]
    return sum(1 + a1 - a0 + b1 - b0 + (a1 > a0 and b1 > b0) for _, a0, a1, b0, b1 in changed)


@each
def test_a_script_is_short(name):
    tokens, lines = SIZES[name]
    assert count_tokens(TEXTS[name]) <= tokens
    assert len(TEXTS[name].splitlines()) <= lines


@pytest.mark.parametrize("one, other", DIFFS)
def test_a_diff_shows_its_idea_and_little_else(one, other):
    assert count_diff(TEXTS[one], TEXTS[other]) <= DIFFS[one, other]
