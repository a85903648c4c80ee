"""Prompts as they really come: what is refused, and what of a long one the model does not see."""

import logging

import pytest

import forgedit.prompts
from forgedit import EditConfig, InputError, TuneConfig
from forgedit.cli import main

TUNE = TuneConfig(num_steps=1, batch_size=1, caption="a cat")
EDIT = EditConfig(num_steps=1)


@pytest.mark.parametrize("prompt", ["a\ndog", "a dog\0", "\x1b[31ma dog", "a\tdog", "a \x85dog", "a \ud800dog"])
def test_control_characters_in_a_prompt(editor, photo, tmp_path, monkeypatch, folder, capsys, prompt):
    session = editor.tune(photo, TUNE)
    with pytest.raises(InputError, match="target prompt has the control character"):
        session.edit(prompt, EDIT)
    with pytest.raises(InputError, match="caption has the control character"):
        editor.tune(photo, TUNE.replace(caption=prompt))
    monkeypatch.chdir(tmp_path)
    assert main(["edit", str(photo), prompt, "--model", str(folder), "--threads", "1"]) == 2
    assert "control character" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_prompts_in_other_scripts_are_taken(editor, photo):
    assert editor.tune(photo, TUNE).edit("ein Hündchen 🐕\u200d🦺 犬", EDIT).cut == ""


def test_what_was_cut_from_a_long_prompt_is_reported(editor, photo, caplog):
    session = editor.tune(photo, TUNE)
    with caplog.at_level(logging.WARNING, "forgedit"):
        edits = [session.edit("ab " * 37 + "c def", EDIT) for _ in range(2)]
    assert "longer than 77 tokens" in caplog.text and "def" in caplog.text
    assert [edit.cut.replace(" ", "") for edit in edits] == ["def"] * 2


def test_a_target_is_tokenised_once_a_session(editor, photo, monkeypatch):
    session, read = editor.tune(photo, TUNE), []
    tokenize = forgedit.prompts.tokenize
    monkeypatch.setattr(
        forgedit.prompts, "tokenize", lambda prompt, *rest: read.append(prompt) or tokenize(prompt, *rest)
    )
    for target in ("a dog", "a dog", "a wall"):
        session.edit(target, EDIT)
    assert sorted(read) == ["", "a dog", "a wall"]
