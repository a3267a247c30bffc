"""The law of the ladder: same name, same text; each script is short, plain and a program alone."""

import ast
import difflib
import io
import itertools
import re
import tokenize
from pathlib import Path

import pytest

# What may differ: an algorithm's own. REINFORCE has no critic and collects whole episodes.
OWN = {"Args", "check_args", "make_optimizers", "update"}
EXEMPT = {name: OWN for name in ("vpg", "trpo", "ppo")}
EXEMPT["reinforce"] = OWN | {"Agent", "Rollout", "collect_rollout", "Batch", "learn"}
EXEMPT["ppo_torchrun"] = {"RunningMeanStd", "update", "learn", "train"}
# Tokens and lines of a script, and lines of `diff a.py b.py`: grow one only for an idea.
SIZES = {"reinforce": (2_567, 359), "vpg": (2_952, 421), "trpo": (3_429, 483), "ppo": (3_073, 428)}
SIZES["ppo_torchrun"] = (3_352, 458)
DIFFS = {("reinforce", "vpg"): 228, ("vpg", "ppo"): 68, ("vpg", "trpo"): 101}
DIFFS["ppo", "ppo_torchrun"] = 50
TEXTS = {name: Path(__file__).parents[1].joinpath(f"{name}.py").read_text() for name in EXEMPT}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
DEFINITION = ast.FunctionDef | ast.ClassDef
KERNEL = """try:
    from gae_kernel import compute_gae
except ImportError:
    compute_gae = compute_gae_python"""

each = pytest.mark.parametrize("name", TEXTS)


def definitions(name):
    """The text of each function and class."""
    nodes = [node for node in TREES[name].body if isinstance(node, DEFINITION)]
    return {node.name: ast.get_source_segment(TEXTS[name], node) for node in nodes}


@pytest.mark.parametrize("one, other", [*itertools.combinations(TEXTS, 2)])
def test_same_name_same_text_and_arguments_in_the_same_order_and_type(one, other):
    ones, others = definitions(one), definitions(other)
    shared = (ones.keys() & others.keys()) - EXEMPT[one] - EXEMPT[other]
    assert {"make_envs", "mlp", "evaluate", "log", "save", "load"} <= shared
    assert not {name for name in shared if ones[name] != others[name]}
    # name: type. What one algorithm needs another may leave out: `float | None` is a float.
    field = r"(?m)^    (\w+): (.+?)(?: \| None)?(?: =|$)"
    ones, others = re.findall(field, ones["Args"]), re.findall(field, others["Args"])
    shared = [x for x in ones if x[0] in dict(others)]
    assert shared == [x for x in others if x[0] in dict(ones)] != []


@each
def test_importing_only_defines(name):
    """What is neither import nor definition takes the kernel or is the program, the same in all."""
    own = DEFINITION | ast.Import | ast.ImportFrom
    rest = [ast.unparse(node) for node in TREES[name].body[1:] if not isinstance(node, own)]
    if name != "reinforce":
        assert rest.pop(0) == KERNEL
    if name != "ppo_torchrun":  # where the program starts and ends a group of processes
        assert rest == [ast.unparse(TREES["ppo"].body[-1])]
    assert len(rest) == 1 and rest[0].startswith("if __name__ == '__main__':")


@each
def test_a_script_is_plain(name):
    """No private API, thread, signal, process, set variable, hidden default or walrus."""
    modules = "signal|threading|subprocess|multiprocessing|os|ctypes|warnings"
    banned = {
        "a module": rf"^ *(import|from) .*\b({modules})\b",
        "a variable of another scope": r"^ *(global|nonlocal) ",
        "private": r"\._(?!_)",
        "a walrus": r":=",
        "a lambda": r"\blambda\b.*:",
        "a hidden default": r"\bgetattr\(.+,.+,",
    }
    text = ast.unparse(TREES[name])
    assert not {kind for kind, x in banned.items() if re.search(x, text, re.MULTILINE)}


@each
def test_a_script_is_short(name):
    """Tokens are names, operators, numbers and strings, however they are laid out."""
    # From Python 3.12 on, an f-string has tokens of its own.
    text = re.sub(r"\bf(?=[\"'])", "", TEXTS[name])
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    words = [x for x in tokens if x.type != tokenize.COMMENT and x.string.strip()]
    assert len(words) <= SIZES[name][0]
    assert len(TEXTS[name].splitlines()) <= SIZES[name][1]


@pytest.mark.parametrize("one, other", DIFFS)
def test_a_diff_shows_its_idea_and_little_else(one, other):
    """Lines that `diff` prints: where, the old lines, "---" between old and new, the new lines."""
    texts = TEXTS[one].splitlines(), TEXTS[other].splitlines()
    changes = difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
    changes = [change for change in changes if change[0] != "equal"]
    lines = [1 + i1 - i0 + j1 - j0 + (kind == "replace") for kind, i0, i1, j0, j1 in changes]
    assert sum(lines) <= DIFFS[one, other]
