"""Tests of the README: its Python snippet runs, and the flags in its commands exist."""

import re
import shlex

import pytest
from conftest import ROOT

import evaluation
import function_calling_train as train
import prepare_function_calling_dataset as prepare

README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSERS = {
    "prepare_function_calling_dataset.py": prepare.parse_args,
    "function_calling_train.py": train.parse_args,
    "evaluation.py": evaluation.parse_args,
}


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_command_in_the_readme_is_accepted():
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    commands += [shlex.split(text) for text in re.findall(r"`(python \w+\.py[^`]*)`", README)]
    checked = [words for words in commands if len(words) > 1 and words[1] in PARSERS]
    assert len(checked) >= 8
    for _, script, *flags in checked:
        PARSERS[script](flags)


@pytest.mark.slow
def test_the_python_snippet_runs_as_printed(finished, capsys):
    """Only the name of the adapter and the number of new tokens are replaced."""
    (snippet,) = [block for block in code_blocks("python") if "ADAPTER = " in block]
    snippet = re.sub(r'ADAPTER = ".*"', f"ADAPTER = {str(finished.adapter)!r}", snippet)
    exec(snippet.replace("max_new_tokens=256", "max_new_tokens=8"), {})
    assert capsys.readouterr().out.endswith("\n")
