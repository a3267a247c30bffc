"""The law of the ladder: same name, same text, and each script is a program of its own."""

import ast
import difflib
import itertools
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from environments import LADDER, arguments, metrics

# What may differ: an algorithm's own. REINFORCE has no critic and collects whole episodes.
EXEMPT = {name: {"Args", "make_optimizers", "update"} for name in ("vpg", "trpo", "ppo")}
EXEMPT["reinforce"] = EXEMPT["vpg"] | {"Agent", "rollouts", "estimate"}
# Lines of `diff a.py b.py`: grow one only for an idea.
BUDGET = {("reinforce", "vpg"): 78, ("vpg", "ppo"): 78, ("vpg", "trpo"): 91}
TEXTS = {script.__name__: Path(script.__file__).read_text() for script in LADDER}
PAIRS = list(itertools.combinations(TEXTS, 2))
SMALL = {"num_envs": 2, "num_steps": 64, "total_timesteps": 300, "eval_episodes": 2}

both = pytest.mark.parametrize("one, other", PAIRS)
each = pytest.mark.parametrize("script", LADDER)


def definitions(name):
    nodes = ast.parse(TEXTS[name]).body
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name: ast.unparse(node) for node in nodes if isinstance(node, kinds)}


@both
def test_same_name_same_text(one, other):
    ones, others = definitions(one), definitions(other)
    shared = (ones.keys() & others.keys()) - EXEMPT[one] - EXEMPT[other]
    assert {"compute_gae_python", "mlp", "make_envs", "Adam", "evaluate", "train"} <= shared
    differing = {name for name in shared if ones[name] != others[name]}
    assert not differing, f"{one}.py and {other}.py differ in {differing}"


@both
def test_the_rest_of_the_top_level_is_the_same_too(one, other):
    """All but the docstring, imports and definitions, which the algorithms tell apart."""

    def rest(name):
        nodes = ast.parse(TEXTS[name]).body[1:]
        own = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
        return [ast.unparse(node) for node in nodes if not isinstance(node, own)]

    assert rest(one) == rest(other)


@both
def test_shared_arguments_have_the_same_order_type_and_help(one, other):
    def arguments(name):
        lines = TEXTS[name].splitlines()
        (body,) = (
            node.body
            for node in ast.parse(TEXTS[name]).body
            if isinstance(node, ast.ClassDef) and node.name == "Args"
        )
        helps = {n.target.id: lines[n.lineno - 1][n.end_col_offset :].strip() for n in body}
        assert all(text.startswith("# ") for text in helps.values()), "an argument without help"
        # What one algorithm needs another may leave out: `float | None` is a float.
        types = {n.target.id: ast.unparse(n.annotation).removesuffix(" | None") for n in body}
        return {name: (types[name], helps[name]) for name in helps}

    ones, others = arguments(one), arguments(other)
    assert [(n, ones[n]) for n in ones if n in others] == [
        (n, others[n]) for n in others if n in ones
    ]


@each
def test_importing_only_defines(script):
    """Names, and not one call but those listed: all else waits for train or __main__."""
    calls = {"namedtuple", "Distribution.set_default_validate_args"}  # the latter is idempotent

    def statements(nodes):
        for node in nodes:
            if isinstance(node, ast.Try):
                yield from statements(node.body + node.orelse + node.finalbody)
                yield from statements(part for handler in node.handlers for part in handler.body)
            elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node

    docstring, *nodes, main = ast.parse(TEXTS[script.__name__]).body
    assert isinstance(docstring.value, ast.Constant)
    assert ast.unparse(main).startswith("if __name__ == '__main__':\n")
    for node in statements(nodes):
        assert isinstance(
            node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Expr
        ), node
        for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
            assert ast.unparse(call.func) in calls


@pytest.mark.parametrize("one, other", BUDGET)
def test_a_diff_shows_its_idea_and_little_else(one, other):
    groups = difflib.SequenceMatcher(
        None, TEXTS[one].splitlines(), TEXTS[other].splitlines(), autojunk=False
    ).get_opcodes()
    changed = [(a1 - a0, b1 - b0) for tag, a0, a1, b0, b1 in groups if tag != "equal"]
    # As diff prints them: a line that says where, the lines, and "---" between old and new.
    lines = sum(1 + old + new + bool(old and new) for old, new in changed)
    assert lines <= BUDGET[one, other]


@each
def test_a_script_copied_alone_runs_there_as_here(script, tmp_path, monkeypatch):
    """With torch, gymnasium, numpy and tyro alone: no kernel, no tqdm, no wandb, no repository."""
    alone, here = tmp_path / "alone", tmp_path / "here"
    alone.mkdir(), here.mkdir()
    path = shutil.copy(script.__file__, alone)
    args = arguments(script, "CartPole-v1", **SMALL)
    wanted = {field.name: getattr(args, field.name) for field in fields(args)}
    flags = [f"--{name.replace('_', '-')}={wanted[name]}" for name in SMALL if name in wanted]
    absent = "import sys; sys.modules |= dict.fromkeys(['gae_kernel', 'tqdm', 'wandb'])"
    code = f"{absent}; import runpy; runpy.run_path({path!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", code, *flags], cwd=alone, check=True)
    monkeypatch.chdir(here)
    script.train(args)
    assert len(metrics(here)) > 1
    assert str(metrics(alone)) == str(metrics(here))  # as text: a NaN equals a NaN
